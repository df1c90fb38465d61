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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from divergent_tokens.backward import Sums, only_linear
from divergent_tokens.compiled import (
    can_compile,
    compiled_layers,
    compiled_norms,
    compiler_works,
    compiling_pays,
    several_passes_back,
)
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.labels import at_completions
from divergent_tokens.layers import decoder_layers, layer_matrices, operations_a_token, used_experts
from divergent_tokens.layerwise import probe_by_layers
from divergent_tokens.measure.batches import BatchSize, free_bytes, padded, run_batches
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head, find_head
from divergent_tokens.measure.intervals import pooled
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.states import by_length
from divergent_tokens.models import Model
from divergent_tokens.offload import is_offloaded

FIRST_TRY_CPU, MOST_AT_ONCE = 8, 128
"""Sequences at once."""
ACTIVATION_BYTES = 24 * 2**30
"""On an accelerator: what a backward pass keeps of all layers may take so much, by estimate."""
SHARE_IF_COMPILED = 0.75
"""Compiled layers make some of it again."""


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
    does not see all tokens of a prompt in order, its experts cannot be run one by one, or layers
    that wait outside the device hand on more than hidden states.
    """
    for scheme in schemes:
        scheme.check(components)
    head = find_head(base.network)
    if compiled is None:
        compiled = compiling_pays(base.network, _operations(base, len(schemes), completions))
    compiled = compiled and can_compile(base.network) and compiler_works(base.device)
    compiles_layers = compiled and only_linear(base.network, components)
    size = BatchSize(batch_size or _first_batch(base, completions, compiles_layers))
    if any(c.expert is not None and c.stack_index is None for c in components):
        size.value = 1  # modules of their own, which see some tokens of all prompts together
    sums = Sums(
        base,
        components,
        schemes,
        n_draws,
        int(completions.sequence_lengths.max()),
        keep=n_draws > 1 or len(completions.prompts) > size.value,
        fused=compiled,
        in_compiled=compiles_layers,
    )
    draws = np.zeros((len(components), len(schemes), len(completions.prompts), n_draws), np.float32)
    order = by_length(completions)
    done = 0
    run = partial(_run, base, head, completions, sums, seed)
    if is_offloaded(base.network):
        batches = probe_by_layers(base, head, completions, sums, seed, order, size, progress)
    else:
        batches = run_batches(order, size, run)
    running = compiled_layers if compiles_layers else compiled_norms
    with running(base.network, compiled), sums.watching(), several_passes_back(compiled):
        for batch, found in batches:
            draws[:, :, list(batch)] = found
            done += len(batch)
            progress("probe", done, len(order), "prompts")
    if compiles_layers:
        sums.check_all_met()
    return Probe(
        tuple(components),
        tuple(schemes),
        draws,
        sums.changes.relative_errors,
        completions.lengths,
        size.value,
    )


def _first_batch(base: Model, completions: Completions, compiles_layers: bool) -> int:
    """With how many sequences trying starts: batches of one size, as large as may fit."""
    if base.device.type == "cpu":
        return FIRST_TRY_CPU
    used = used_experts(base.network)
    widths = sum(  # what a backward pass keeps of a token: what goes into and comes out of products
        sum(parameter.shape[-2:]) * (used if is_stack else 1)
        for parameter, is_stack in layer_matrices(base.network)
    )
    if is_offloaded(base.network):  # one layer's at a time
        widths = math.ceil(widths / len(decoder_layers(base.network)[1]))
    share = SHARE_IF_COMPILED if compiles_layers else 1.0
    longest = int(completions.sequence_lengths.max())
    # Where layers wait elsewhere, inputs and gradients of all of them are kept beside.
    room_share = 0.4 if is_offloaded(base.network) else 0.8
    room = min(ACTIVATION_BYTES, room_share * free_bytes(base.device))
    fitting = max(1, int(room / (longest * widths * base.dtype.itemsize * share)))
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
    with torch.enable_grad():
        chosen, gradients = at_completions(
            base, head, completions, sums, seed, batch, ids, head.hidden(ids)
        )
        for draw, gradient in enumerate(gradients):
            sums.draw = draw
            last = draw == sums.n_draws - 1
            torch.autograd.grad(chosen, sums.leaf, gradient, retain_graph=not last)
    return sums.take()
