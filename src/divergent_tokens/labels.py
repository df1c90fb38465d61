"""Labels drawn from the base's own distribution, and the gradients that start from them."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.backward import Sums
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head
from divergent_tokens.measure.scores import chunk_tokens
from divergent_tokens.measure.states import completion_states
from divergent_tokens.models import Model


def at_completions(
    base: Model,
    head: Head,
    completions: Completions,
    sums: Sums,
    seed: int,
    batch: Sequence[int],
    ids: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor]:
    """The states that predict a batch's completions, and the labels' gradients at them, by draw.

    From final hidden states [prompt, token, hidden]: [token, hidden] and [draw, token, hidden].
    """
    rows = np.repeat(np.arange(len(batch)), completions.lengths[list(batch)])
    chosen = torch.cat(completion_states(base, completions, batch, ids, hidden))
    uniforms = torch.cat([_uniforms(completions, i, sums.n_draws, seed) for i in batch], 1)
    return chosen, _head_gradients(head, chosen.detach(), uniforms, sums, rows)


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
        n = max(1, chunk_tokens(head, hidden) // 2)  # what is drawn from is in float64
    try:
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
    finally:  # also where memory runs out: the layers come next
        sums.head_rows = None
    return found
