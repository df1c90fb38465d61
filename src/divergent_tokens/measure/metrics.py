"""Token scores in, divergence out: numpy only, so that arrays from anywhere can be measured.

Every function takes plain arrays, with axes [prompt, token] or [..., vocab]. `mask` marks the
tokens that exist, True from the left; without one all do. The definitions are those of
docs/metrics.md; FDT, SDT and DPPL are from Deiseroth et al., NAACL 2024 (arXiv 2311.01544),
section 3, there called Divergent Token Metrics.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]
Booleans = NDArray[np.bool_]

NEAR_TIE_LOGITS = 0.1
"""A first divergence where the base preferred its token by less than this is a near tie."""
REPEATED_NGRAM = 8
"""A token counts as repeated when it lies in an n-gram of this length seen before or again."""


def divergent(
    argmax_ids: ArrayLike, completion_ids: ArrayLike, mask: ArrayLike | None = None
) -> Booleans:
    """Where the candidate's argmax differs from the base's token, [prompt, token]."""
    argmax_ids, completion_ids = np.asarray(argmax_ids), np.asarray(completion_ids)
    if argmax_ids.shape != completion_ids.shape or argmax_ids.ndim != 2:
        raise ValueError(
            f"argmax_ids has shape {argmax_ids.shape} and completion_ids {completion_ids.shape}; "
            "both must be [prompt, token], padded alike"
        )
    return np.asarray((argmax_ids != completion_ids) & _mask(mask, completion_ids))


def fdt(
    argmax_ids: ArrayLike, completion_ids: ArrayLike, mask: ArrayLike | None = None
) -> Integers:
    """First divergent token: how many leading tokens agree, [prompt]; the length if all do.

    >>> fdt([[5, 7, 9], [5, 7, 7]], [[5, 7, 9], [5, 6, 7]]).tolist()
    [3, 1]
    """
    apart = divergent(argmax_ids, completion_ids, mask)
    lengths = _mask(mask, np.asarray(completion_ids)).sum(1)
    if not apart.shape[1]:
        return np.zeros(len(apart), dtype=np.int64)
    return np.asarray(np.where(apart.any(1), apart.argmax(1), lengths))


def sdt(
    argmax_ids: ArrayLike, completion_ids: ArrayLike, mask: ArrayLike | None = None
) -> float | None:
    """Share of divergent tokens, over all tokens of all prompts; None if there are none."""
    apart = divergent(argmax_ids, completion_ids, mask)
    return _share(apart.sum(), _mask(mask, np.asarray(completion_ids)).sum())


def dppl(logprobs: ArrayLike, mask: ArrayLike | None = None) -> float | None:
    """Divergent perplexity: exp of the candidate's nats per token of the base's completions.

    `logprobs` are natural log-probabilities of the completions' own tokens, [prompt, token].
    """
    logprobs = np.asarray(logprobs, dtype=np.float64)
    there = _mask(mask, logprobs)
    nats = _share(-logprobs[there].sum(), there.sum())
    return None if nats is None else float(np.exp(nats))


def log_softmax(logits: ArrayLike) -> Floats:
    """Natural log-probabilities over the last axis, in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def kl(base_logits: ArrayLike, candidate_logits: ArrayLike) -> Floats:
    """KL(base ‖ candidate) in nats, [...] from logits [..., vocab]; never negative.

    Σ p (e^d − 1 − d) with d = log q − log p equals Σ p (log p − log q), since both sum to one,
    but adds up terms that are all ≥ 0: nothing cancels when the two are close. Infinite where q
    rules out (a logit of −inf) what p does not.
    """
    base, candidate = log_softmax(base_logits), log_softmax(candidate_logits)
    p, q = np.exp(base), np.exp(candidate)
    with np.errstate(invalid="ignore"):  # logits of −inf: 0 · ∞ is 0 here, and ∞ − ∞ too
        d = np.where(base == candidate, 0, candidate - base)
        near = np.abs(d) < 1
        close_by = p * (np.expm1(np.where(near, d, 0)) - np.where(near, d, 0))
        far_off = q - np.where(p == 0, 0, p * (1 + d))  # p e^d could overflow; q is the same
    return np.asarray(np.where(near, close_by, far_off).clip(0).sum(-1))


def acceptance(base_logits: ArrayLike, candidate_logits: ArrayLike) -> Floats:
    """Σ min(p, q), [...] from logits [..., vocab]: the share of q's drafts that p accepts.

    Leviathan et al. 2023 (arXiv 2211.17192), corollary 3.6.
    """
    p, q = np.exp(log_softmax(base_logits)), np.exp(log_softmax(candidate_logits))
    return np.asarray((1 - 0.5 * np.abs(p - q).sum(-1)).clip(0, 1))


def margin(base_logits: ArrayLike, completion_ids: ArrayLike) -> Floats:
    """The logit of y_t minus the best other token's, [...] from [..., vocab] and [...].

    Negative where rounding made y_t not the top.
    """
    logits = np.array(base_logits, dtype=np.float64)
    at = np.asarray(completion_ids)[..., None]
    own = np.take_along_axis(logits, at, -1)[..., 0]
    np.put_along_axis(logits, at, -np.inf, -1)
    return np.asarray(own - logits.max(-1))


def repeated(
    completion_ids: ArrayLike, mask: ArrayLike | None = None, n: int = REPEATED_NGRAM
) -> Booleans:
    """Tokens inside an n-gram that occurs more than once in their completion, [prompt, token]."""
    ids = np.asarray(completion_ids)
    there = _mask(mask, ids)
    inside = np.zeros_like(there)
    for row, length in enumerate(there.sum(1)):
        if length <= n:
            continue
        grams = np.lib.stride_tricks.sliding_window_view(ids[row, :length], n)
        _, which, counts = np.unique(grams, axis=0, return_inverse=True, return_counts=True)
        for start in np.flatnonzero(counts[which.ravel()] > 1):
            inside[row, start : start + n] = True
    return inside


def sdt_by_quarter(apart: Booleans, mask: ArrayLike | None = None) -> list[float | None]:
    """SDT within each quarter of the longest completion's length: does divergence fade with t?"""
    there = _mask(mask, apart)
    edges = np.linspace(0, apart.shape[1], 5).round().astype(int)
    return [
        _share((apart & there)[:, a:b].sum(), there[:, a:b].sum())
        for a, b in itertools.pairwise(edges)
    ]


def near_ties(margins_at_first: Iterable[float | None]) -> float | None:
    """Share of first divergences where the base's margin was under 0.1; None if there are none."""
    known = [value for value in margins_at_first if value is not None]
    return _share(sum(value < NEAR_TIE_LOGITS for value in known), len(known))


@dataclass(frozen=True)
class Divergence:
    """One row a prompt: sums and counts, kept apart until the end."""

    fdt: Integers
    """Leading tokens that agree, 0..L. [prompt]"""
    censored: Booleans
    """No divergence up to L: the true FDT is at least `fdt`. [prompt]"""
    n_divergent: Integers
    """Tokens where the argmax differs. [prompt]"""
    n_tokens: Integers
    """L, the completion's length. [prompt]"""
    apart: Booleans
    """Which tokens differ. [prompt, token]"""
    mask: Booleans
    """Which tokens exist. [prompt, token]"""
    nats: Floats | None
    """−log q summed over the completion. [prompt]"""
    base_nats: Floats | None
    """−log p summed over the completion. [prompt]"""
    kl: Floats | None
    """KL(p ‖ q) summed over the completion, in nats. [prompt]"""
    kl_per_token: Floats | None
    """KL(p ‖ q) in nats. [prompt, token]"""
    acceptance: Floats | None
    """Σ min(p, q) summed over the completion. [prompt]"""

    @property
    def longest_agreement(self) -> Integers:
        """The longest run of tokens that agree, anywhere in the completion. [prompt]"""
        agree = self.mask & ~self.apart
        run = np.zeros(len(agree), dtype=np.int64)
        longest = run.copy()
        for t in range(agree.shape[1]):
            run = np.where(agree[:, t], run + 1, 0)
            longest = np.maximum(longest, run)
        return longest

    def beginning(self, n_tokens: int) -> "Divergence":
        """The same with completions of `n_tokens` at most, as fewer new tokens give it.

        Greedy completions of fewer tokens are the beginnings of longer ones. What is known as a sum
        over the whole completion only is None: nats and acceptance.
        """
        apart = self.apart[:, :n_tokens]
        return divergence(
            apart,  # as if the base's tokens were 0, and what differs 1
            np.zeros_like(apart),
            self.mask[:, :n_tokens],
            kl=None if self.kl_per_token is None else self.kl_per_token[:, :n_tokens],
        )

    def subset(self, prompts: Sequence[int]) -> "Divergence":
        """The same for some of the prompts."""
        rows = list(prompts)
        part: dict[str, Any] = {
            name: None if values is None else values[rows] for name, values in vars(self).items()
        }
        return Divergence(**part)


def divergence(
    argmax_ids: ArrayLike,
    completion_ids: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    logprobs: ArrayLike | None = None,
    base_logprobs: ArrayLike | None = None,
    kl: ArrayLike | None = None,
    acceptance: ArrayLike | None = None,
) -> Divergence:
    """Every prompt's sums and counts from arrays [prompt, token]; what is absent stays None."""
    ids = np.asarray(completion_ids)
    there = _mask(mask, ids)
    apart = divergent(argmax_ids, ids, there)
    first = fdt(argmax_ids, ids, there)
    return Divergence(
        fdt=first,
        censored=np.asarray(~apart.any(1)),
        n_divergent=apart.sum(1),
        n_tokens=there.sum(1),
        apart=apart,
        mask=there,
        nats=_sums(logprobs, there, sign=-1),
        base_nats=_sums(base_logprobs, there, sign=-1),
        kl=_sums(kl, there),
        kl_per_token=None if kl is None else np.asarray(kl),
        acceptance=_sums(acceptance, there),
    )


def _sums(values: ArrayLike | None, there: Booleans, sign: int = 1) -> Floats | None:
    if values is None:
        return None
    return np.asarray(sign * np.where(there, np.asarray(values, dtype=np.float64), 0).sum(1))


def _mask(mask: ArrayLike | None, like: NDArray[np.generic]) -> Booleans:
    if mask is None:
        return np.ones(like.shape, dtype=bool)
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != like.shape:
        raise ValueError(f"mask has shape {mask.shape}, the tokens have {like.shape}")
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("a mask must be True from the left: completions are padded on the right")
    return mask


def _share(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None
