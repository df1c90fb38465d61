"""The probe: every component under every scheme, judged by one forward and one backward pass.

A change of a component moves its output at token t by dz_t, on the base's own inputs. Let labels be
drawn from the base's own distribution at each token of the completion, and δ_t be the gradient of
their summed log-probability at that output. With s = Σ_t ⟨δ_t, dz_t⟩ over a prompt, E[s²] / (2 L)
is the second-order term of KL(base ‖ changed), in nats per token: a draw of ½ ΔWᵀ F ΔW / L with F
the Fisher matrix. The labels come from the model, so it is the true Fisher and not the empirical
one (Kunstner, Balles, Hennig 2019, arXiv 1905.12558). t runs over the prompt's tokens too: a change
there reaches the completion through attention.

All components' s come from the same backward pass, which needs no gradient of any weight.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.backward import Sums
from divergent_tokens.compiled import compiled_norms, compiler_works, compiling_pays
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.layers import layer_matrices, operations_a_token, used_experts
from divergent_tokens.measure.batches import BatchSize, padded, run_batches
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head, find_head
from divergent_tokens.measure.intervals import pooled
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.scores import chunk_tokens
from divergent_tokens.measure.states import by_length, completion_states
from divergent_tokens.models import Model

FIRST_TRY_CPU, MOST_AT_ONCE = 8, 128
"""Sequences at once."""
ACTIVATION_BYTES = 20 * 2**30
"""On an accelerator: what a backward pass keeps of all layers may take so much, by estimate."""


@dataclass(frozen=True)
class Probe:
    """One signed number a component, scheme, prompt and draw; all that plans are judged by."""

    components: tuple[Component, ...]
    schemes: tuple[Scheme, ...]
    draws: NDArray[np.float32]
    """s. [component, scheme, prompt, draw]"""
    weight_errors: NDArray[np.float64]
    """‖W′ − W‖ / ‖W‖, Frobenius. [component, scheme]"""
    lengths: NDArray[np.int64]
    """L of each completion. [prompt]"""
    batch_size: int


def probe(
    base: Model,
    components: Sequence[Component],
    schemes: Sequence[Scheme],
    completions: Completions,
    *,
    n_draws: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    compiled: bool | None = None,
    progress: Progress = silent,
) -> Probe:
    """The draws of all components under all schemes, `n_draws` sets of labels a prompt.

    Changes and sums are computed in float32 whatever the model runs in; products too, but on a
    GPU with few schemes those of a bfloat16 model in bfloat16. The changes of one component live at
    once, and `KEPT_BYTES` of others. Where it pays (on a GPU, for long work) or `compiled` asks
    for it, what works element by element is compiled. The labels depend on the seed, the prompt
    and the number of the draw alone.

    Raises SchemeError where a scheme does not fit a component, and ModelError where a component
    does not see all tokens of a prompt in order, or its experts cannot be run one by one.
    """
    for scheme in schemes:
        scheme.check(components)
    head = find_head(base.network)
    size = BatchSize(batch_size or _first_batch(base, completions))
    if any(c.expert is not None and c.stack_index is None for c in components):
        size.value = 1  # modules of their own, which see some tokens of all prompts together
    longest = int(completions.sequence_lengths.max())
    if compiled is None:
        compiled = compiling_pays(base.network, _operations(base, len(schemes), completions))
    compiled = compiled and compiler_works(base.device)
    sums = Sums(base, components, schemes, n_draws, longest, fused=compiled)
    draws = np.zeros((len(components), len(schemes), len(completions.prompts), n_draws), np.float32)
    order = by_length(completions)
    done = 0
    with compiled_norms(base.network, compiled), sums.watching():
        run = partial(_run, base, head, completions, sums, seed)
        for batch, found in run_batches(order, size, run):
            draws[:, :, list(batch)] = found
            done += len(batch)
            progress("probe", done, len(order), "prompts")
    return Probe(
        tuple(components),
        tuple(schemes),
        draws,
        sums.changes.relative_errors,
        completions.lengths,
        size.value,
    )


def _first_batch(base: Model, completions: Completions) -> int:
    """With how many sequences trying starts: batches of one size, as large as may fit."""
    if base.device.type == "cpu":
        return FIRST_TRY_CPU
    used = used_experts(base.network)
    widths = sum(  # what a backward pass keeps of a token: what goes into and comes out of products
        sum(parameter.shape[-2:]) * (used if is_stack else 1)
        for parameter, is_stack in layer_matrices(base.network)
    )
    longest = int(completions.sequence_lengths.max())
    fitting = max(1, ACTIVATION_BYTES // (longest * widths * base.dtype.itemsize))
    n = len(completions.prompts)
    return math.ceil(n / math.ceil(n / min(MOST_AT_ONCE, fitting)))


def _operations(base: Model, n_schemes: int, completions: Completions) -> float:
    """Of all products: forward, backward, and one for each scheme."""
    n_tokens = int(completions.sequence_lengths.sum())
    return (2 + n_schemes) * n_tokens * operations_a_token(base.network)


def kl_of(draws: NDArray[Any], lengths: NDArray[np.int64]) -> tuple[float, float | None]:
    """KL in nats per token, and its standard error over prompts, from s [prompt, draw].

    Σ s² / (2 Σ L), draws averaged within a prompt first. For a plan give the sum of its components'
    s: interactions are in it (E[s_i s_j] / L).
    """
    return pooled(0.5 * np.square(draws.astype(np.float64)).mean(-1), lengths)


# --- one batch ---


def _run(
    base: Model,
    head: Head,
    completions: Completions,
    sums: Sums,
    seed: int,
    batch: Sequence[int],
) -> NDArray[np.float32]:
    """s of a batch's prompts. [component, scheme, prompt, draw]"""
    sequences = completions.sequences()
    ids = padded([sequences[i] for i in batch], base.device)
    sums.start(ids)
    rows = np.repeat(np.arange(len(batch)), completions.lengths[list(batch)])
    with torch.enable_grad():
        states = completion_states(base, completions, batch, ids, head.hidden(ids))
        chosen = torch.cat(states)  # [token, hidden]
        uniforms = torch.cat([_uniforms(completions, i, sums.n_draws, seed) for i in batch], 1)
        gradients = _head_gradients(head, chosen.detach(), uniforms, sums, rows)
        for draw, gradient in enumerate(gradients):
            sums.draw = draw
            last = draw == sums.n_draws - 1
            torch.autograd.grad(chosen, sums.leaf, gradient, retain_graph=not last)
    return sums.take()


def _uniforms(completions: Completions, prompt: int, n_draws: int, seed: int) -> Tensor:
    """What decides the labels of one prompt's tokens. [draw, token]"""
    digest = completions.prompts.prompts[prompt].digest
    rows = []
    for draw in range(n_draws):
        number = hashlib.sha256(f"{seed} {digest} {draw}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(number[:8], "big") >> 1)
        length = int(completions.lengths[prompt])
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def draw_labels(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Labels [draw, token] of distributions [token, vocab], by inverting their sums at uniforms."""
    sums = probabilities.double().cumsum(-1)
    wanted = uniforms.t().to(sums.device) * sums[:, -1:]
    labels = torch.searchsorted(sums, wanted.contiguous(), right=True)
    return labels.clamp(max=probabilities.shape[1] - 1).t()


def _head_gradients(
    head: Head, hidden: Tensor, uniforms: Tensor, sums: Sums, rows: NDArray[np.int64]
) -> Tensor:
    """Gradients of the labels' log-probabilities at hidden states [token, hidden], by draw.

    Chunk by chunk, so that the vocabulary is never held for all tokens. [draw, token, hidden]
    """
    found = hidden.new_zeros((sums.n_draws, *hidden.shape))
    with torch.no_grad():
        n = chunk_tokens(head, hidden)
    for a in range(0, len(hidden), n):
        part = hidden[a : a + n].clone().requires_grad_(True)
        sums.head_rows = torch.from_numpy(rows[a : a + n]).to(hidden.device)
        logps = head.logits(part).log_softmax(-1)
        labels = draw_labels(logps.detach().exp(), uniforms[:, a : a + n])
        for draw in range(sums.n_draws):
            sums.draw = draw
            own = logps.gather(-1, labels[draw, :, None]).sum()
            last = draw == sums.n_draws - 1
            (found[draw, a : a + n],) = torch.autograd.grad(own, part, retain_graph=not last)
    sums.head_rows = None
    return found
