"""Per-token scores of a model on the base's completions, from one teacher-forced pass."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.compiled import compiled
from divergent_tokens.errors import ModelError
from divergent_tokens.measure.batches import SHARE_OF_MEMORY, BatchSize, free_bytes
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.states import States, by_length, hidden_batches
from divergent_tokens.models import Model

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 128 * 2**20}
"""Size of one [token, vocab] float32 array; ten of them live at once, however many prompts."""
KEPT_LOGITS_BYTES_CPU = 2**30
"""For the base's logits, which every row of a sweep is held against."""
CPU_SLICE_BYTES = 4 * 2**20
"""On a CPU the arithmetic on logits runs in slices that stay in its caches: three times as fast."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class TokenScores:
    """One model, one number a token of the base's completions; all arrays are [prompt, token].

    Log-probabilities are natural. Where `mask` is False the numbers mean nothing.
    """

    mask: NDArray[np.bool_]
    argmax_ids: NDArray[np.int32]
    """The model's own choice: the argmax of its float32 logits, ties to the lowest id."""
    logprobs: Floats
    """log q of the completion's token."""
    argmax_logprobs: Floats
    """log q of the model's own choice."""
    margins: Floats
    """The model's logit of the completion's token minus its best other; negative if it diverges."""
    base_logprobs: Floats
    """log p of the completion's token."""
    base_argmax_logprobs: Floats
    """log p of the model's choice."""
    kl: NDArray[np.float64]
    """KL(p ‖ q) in nats, exact over the vocabulary."""
    acceptance: NDArray[np.float64]
    """Σ min(p, q) over the vocabulary."""


@torch.no_grad()
def score(
    model: Model,
    head: Head,
    completions: Completions,
    base_head: Head,
    states: States,
    *,
    name: str = "scores",
    progress: Progress = silent,
) -> TokenScores:
    """Scores of a candidate; one pass of its layers, the base's head on the base's kept states.

    Raises ModelError where the candidate's numbers are not finite, naming the module.
    """
    size = BatchSize(states.batch_size)
    batches = hidden_batches(model, head, completions, size, name, progress)
    return score_hidden(batches, model, head, completions, BaseLogits(base_head, states))


class BaseLogits:
    """The base's logits at the completions; as many as there is room for are made once."""

    def __init__(self, head: Head, states: States, *, room: int = 0) -> None:
        """By the base's own head; `room` is in bytes."""
        self.states = states
        self._head = head
        self._room = room
        self._kept: dict[tuple[int, int, int, int], Tensor] = {}

    def of(self, batch: Sequence[int], device: torch.device) -> Callable[[int, int], Tensor]:
        """From one to before another token of a batch's completions: float32 [token, vocab]."""
        hidden: Tensor | None = None

        def logits(start: int, end: int) -> Tensor:
            nonlocal hidden
            key = (batch[0], len(batch), start, end)
            if key in self._kept:
                return self._kept[key]
            hidden = self.states.of_batch(batch, device) if hidden is None else hidden
            found = self._head.logits(hidden[start:end])
            if found.nbytes <= self._room:
                self._kept[key] = found
                self._room -= found.nbytes
            return found

        return logits


def room_for_logits(device: torch.device) -> int:
    """Bytes that the base's logits may take where many candidates are held against them."""
    if device.type == "cuda":
        # What a pass needs at its peak is free now, and will be needed again.
        peak = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return int(SHARE_OF_MEMORY * max(0, free_bytes(device) - peak))
    return KEPT_LOGITS_BYTES_CPU


@torch.no_grad()
def score_hidden(
    batches: Iterable[tuple[Sequence[int], list[Tensor]]],
    model: Model,
    head: Head,
    completions: Completions,
    base: BaseLogits,
) -> TokenScores:
    """Scores of a candidate whose hidden states come batch by batch, as of `hidden_batches`."""
    arrays = _empty(completions)
    for batch, rows in batches:
        # Tokens of a whole batch together, so that a chunk of the head is never a short prompt.
        hidden, base_logits = torch.cat(rows), base.of(batch, model.device)
        _score_rows(
            arrays, completions, batch, head, hidden, base_logits, fused=base.states.compiled
        )
    return _checked(TokenScores(mask=completions.mask, **arrays), model)


@torch.no_grad()
def score_base(model: Model, head: Head, completions: Completions, states: States) -> TokenScores:
    """The base on its own completions, from its kept states: the noise floor, and its margins."""
    arrays = _empty(completions)
    order = by_length(completions)
    for start in range(0, len(order), states.batch_size):  # in the batches of its candidates
        batch = order[start : start + states.batch_size]
        hidden = states.of_batch(batch, model.device)
        _score_rows(arrays, completions, batch, head, hidden, None, fused=states.compiled)
    return _checked(TokenScores(mask=completions.mask, **arrays), model)


@torch.no_grad()
def logprobs_of(
    ids: NDArray[np.int32], model: Model, head: Head, completions: Completions, states: States
) -> Floats:
    """The base's log-probability of any tokens [prompt, token] at the completions' positions."""
    found = np.zeros(ids.shape, np.float32)
    for prompt, length in enumerate(completions.lengths):
        hidden = states.of(prompt, model.device)
        wanted = torch.from_numpy(ids[prompt, :length].astype(np.int64)).to(model.device)
        n = chunk_tokens(head, hidden)
        parts = [
            head.logits(hidden[a : a + n]).log_softmax(-1).gather(-1, wanted[a : a + n, None])[:, 0]
            for a in range(0, len(hidden), n)
        ]
        found[prompt, :length] = torch.cat(parts).cpu().numpy()
    return found


def _checked(scores: TokenScores, model: Model) -> TokenScores:
    if not np.isfinite(scores.kl[scores.mask]).all():
        raise ModelError(
            f"{model.reference} gives NaN or infinite logits though its hidden states are finite; "
            "check its output embedding, or run it in another --dtype"
        )
    return scores


_DTYPES: dict[str, type[np.generic]] = {
    field.name: np.float32 for field in dataclasses.fields(TokenScores) if field.name != "mask"
} | {"argmax_ids": np.int32, "kl": np.float64, "acceptance": np.float64}


def _empty(completions: Completions) -> dict[str, NDArray[Any]]:
    return {name: np.zeros(completions.ids.shape, dtype) for name, dtype in _DTYPES.items()}


def _score_rows(
    arrays: dict[str, NDArray[Any]],
    completions: Completions,
    batch: Sequence[int],
    head: Head,
    hidden: Tensor,
    base_logits: Callable[[int, int], Tensor] | None,
    *,
    fused: bool,
) -> None:
    lengths = completions.lengths[list(batch)]
    prompts = np.repeat(batch, lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    targets = torch.from_numpy(completions.ids[prompts, positions].astype(np.int64)).to(
        hidden.device
    )
    kept: dict[str, Tensor] = {}  # copied once a batch: an accelerator waits for each copy
    start = 0
    for chunk in score_chunks(head, hidden, base_logits, targets, fused=fused):
        end = start + len(chunk["kl"])
        for name, values in chunk.items():
            kept.setdefault(name, values.new_empty(len(hidden)))[start:end] = values
        start = end
    for name, values in kept.items():
        arrays[name][prompts, positions] = values.cpu().numpy()


def score_chunks(
    head: Head,
    hidden: Tensor,
    base_logits: Callable[[int, int], Tensor] | None,
    targets: Tensor,
    *,
    fused: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Scores of tokens [token] chunk by chunk, so that [token, vocab] is never held whole.

    `base_logits` gives those of a range of tokens; None where the candidate's own are the base's.
    `fused`: by compiled kernels.
    """
    scored = partial(compiled(score_logits), series=True) if fused else score_logits
    n = chunk_tokens(head, hidden)
    for a in range(0, len(hidden), n):
        logits = head.logits(hidden[a : a + n])
        of_base = logits if base_logits is None else base_logits(a, a + len(logits))
        on_cpu = logits.device.type == "cpu"
        step = max(1, n * CPU_SLICE_BYTES // CHUNK_BYTES["cpu"]) if on_cpu else n
        for b in range(0, len(logits), step):
            rows = slice(b, b + step)
            yield scored(logits[rows], of_base[rows], targets[a : a + n][rows])


def chunk_tokens(head: Head, hidden: Tensor) -> int:
    """How many tokens' logits are held at once."""
    vocabulary = head.logits(hidden[:1]).shape[1]
    size = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    return max(1, size // (4 * vocabulary))


def score_logits(
    logits: Tensor, base_logits: Tensor, targets: Tensor, *, series: bool = False
) -> dict[str, Tensor]:
    """Scores [token] of float32 logits [token, vocab] against the base's; see TokenScores.

    With `series` small differences go through a polynomial, for compiled kernels: on a CPU their
    expm1 is exp − 1, and on a GPU the polynomial costs nothing.
    """
    argmax = logits.argmax(-1, keepdim=True)  # the lowest id of equals
    at = targets[:, None]
    own = logits.gather(-1, at)
    best_other = logits.scatter(-1, at, -torch.inf).amax(-1, keepdim=True)
    q, p = logits.log_softmax(-1), base_logits.log_softmax(-1)
    return {
        "argmax_ids": argmax[:, 0],
        "logprobs": q.gather(-1, at)[:, 0],
        "argmax_logprobs": q.gather(-1, argmax)[:, 0],
        "margins": (own - best_other)[:, 0],
        "base_logprobs": p.gather(-1, at)[:, 0],
        "base_argmax_logprobs": p.gather(-1, argmax)[:, 0],
        **_kl_and_acceptance(p, q, series=series),
    }


def _kl_and_acceptance(p: Tensor, q: Tensor, *, series: bool) -> dict[str, Tensor]:
    """KL(p ‖ q) and Σ min(p, q) from log-probabilities [token, vocab].

    As in metrics.kl: terms p (e^d − 1 − d), none negative; the sum of p (−d) would cancel.
    Nothing cancels in the sums either, so float32's are good to a millionth.
    """
    d = q - p
    probability, candidate = p.exp(), q.exp()
    beyond = _series(d) if series else torch.expm1(d).sub_(d)
    near = beyond.mul_(probability)
    far = candidate - probability * (1 + d)  # p e^d could overflow; q is the same
    kl = torch.where(d.abs() < 1, near, far).clamp_(min=0).sum(-1)
    apart = (probability - candidate).abs_().sum(-1)
    return {"kl": kl.double(), "acceptance": (1 - 0.5 * apart.double()).clamp(0, 1)}


def _series(d: Tensor) -> Tensor:
    """e^d − 1 − d for |d| < 1, to float32's precision: d² (1/2! + d/3! + … + d¹⁰/12!)."""
    found = torch.full_like(d, 1 / math.factorial(12))
    for n in range(11, 1, -1):
        found = found * d + 1 / math.factorial(n)
    return found * d * d
