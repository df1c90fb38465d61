"""Estimates with intervals: numbers per prompt in, a value with its low and high bound out.

First version: the signatures are final, the choice of interval is being measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Unit = Literal["share", "nats", "perplexity"]

N_RESAMPLES = 1999
_CHUNK = 1 << 20  # numbers drawn at once


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that holds the population's value at `level`; None is "not known"."""

    value: float | None
    low: float | None
    high: float | None
    level: float
    n_prompts: int
    method: str
    seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The ESTIMATE of comparison.json."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "n_prompts": self.n_prompts,
            "seed": self.seed,
        }


def estimate_mean(
    values: ArrayLike, *, ceiling: ArrayLike, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Plain mean over prompts of a number in 0..ceiling (FDT: the ceiling is the completion's length).

    `ceiling` is one number or one per prompt. Where every prompt is at its ceiling the low bound
    is the exact binomial one.
    """
    x = np.asarray(values, dtype=np.float64)
    top = np.broadcast_to(np.asarray(ceiling, dtype=np.float64), x.shape)
    n = len(x)
    if n < 2:
        return Estimate(float(x[0]) if n else None, None, None, level, n, "none", seed)
    mean, mean_top = float(x.mean()), float(top.mean())
    if np.all(x == top):
        low = mean_top * (1 - _none_of(n, level))
        return Estimate(mean, low, mean_top, level, n, "exact binomial", seed)
    if np.all(x == 0):
        return Estimate(mean, 0.0, mean_top * _none_of(n, level), level, n, "exact binomial", seed)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(x.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, max(0.0, mean - half), min(mean_top, mean + half), level, n, "t", seed)


def estimate_ratio(
    sums: ArrayLike, counts: ArrayLike, *, unit: Unit, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Pooled Σ sums / Σ counts over prompts.

    `unit` says what it is: a "share" in 0..1 (SDT, acceptance), "nats" ≥ 0 (KL), or the
    "perplexity" ≥ 1 that is exp of nats per token (DPPL). Prompts without a token are left out.
    """
    s, c = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    s, c = s[c > 0], c[c > 0]
    n = len(s)

    def finish(value: float | None, low: float | None, high: float | None, how: str) -> Estimate:
        if unit == "perplexity":
            value, low, high = (None if x is None else math.exp(x) for x in (value, low, high))
        return Estimate(value, low, high, level, n, how, seed)

    if n == 0:
        return finish(None, None, None, "none")
    ratio = float(s.sum() / c.sum())
    if n == 1:
        return finish(ratio, None, None, "none")
    if not s.any():
        return finish(ratio, 0.0, _none_of(n, level) if unit == "share" else None, "exact binomial")
    if unit == "share" and np.all(s == c):
        return finish(1.0, 1 - _none_of(n, level), 1.0, "exact binomial")
    e = s - ratio * c
    se = math.sqrt(float(e @ e) * n / (n - 1)) / float(c.sum())
    factor = math.exp(float(stats.t.ppf((1 + level) / 2, n - 1)) * se / ratio)
    high = ratio * factor
    return finish(ratio, ratio / factor, min(1.0, high) if unit == "share" else high, "t of log")


@dataclass(frozen=True)
class Survival:
    """Kaplan–Meier share of prompts with FDT > t, for t = 0, 1, …, with a pointwise band."""

    share: Floats  # [t]
    low: Floats  # [t]
    high: Floats  # [t]
    level: float
    n_prompts: int

    def to_json(self) -> list[list[float]]:
        """Rows [t, S, low, high], one wherever one of the three changes."""
        rows = np.stack([self.share, self.low, self.high], axis=1)  # [t, 3]
        changed = np.r_[True, np.any(rows[1:] != rows[:-1], axis=1)] if len(rows) else []
        return [[int(t), *map(float, rows[t])] for t in np.flatnonzero(changed)]


def survival(fdt: ArrayLike, censored: ArrayLike, *, level: float = 0.95) -> Survival:
    """S(t), the share of prompts with FDT > t.

    A prompt that diverges at token t leaves S at t, so that S(0) is the share that survives the
    first token; a prompt censored at L had its last chance at t = L − 1.
    """
    time, open_end = np.asarray(fdt, dtype=np.int64), np.asarray(censored, dtype=bool)
    n = len(time)
    n_steps = int(np.max(time + ~open_end, initial=0))
    events = np.bincount(time[~open_end], minlength=n_steps)[:n_steps]  # [t]
    leaves = np.bincount(time, minlength=n_steps + 1)[: n_steps + 1]
    beyond = n - np.cumsum(leaves)[:n_steps]  # prompts with FDT > t
    at_risk = beyond + events
    share = np.cumprod(1 - events / at_risk)
    before = np.r_[1.0, share[:-1]]
    n_effective = at_risk / before
    alpha = 1 - level
    dead, alive = n_effective * (1 - share), n_effective * share
    low = np.where(alive > 0, stats.beta.ppf(alpha / 2, np.maximum(alive, 1e-9), dead + 1), 0.0)
    high = np.where(dead > 0, stats.beta.isf(alpha / 2, alive + 1, np.maximum(dead, 1e-9)), 1.0)
    return Survival(share, np.minimum.accumulate(low), np.minimum.accumulate(high), level, n)


def median_fdt(fdt: ArrayLike, censored: ArrayLike, *, level: float = 0.95) -> Estimate:
    """The first t with S(t) ≤ ½, and the same of the band's two sides (Brookmeyer and Crowley 1982).

    The value is None where S stays above ½, the high bound where the upper side does; a lower side
    that stays above ½ still says that the median is at least the longest completion.
    """
    curve = survival(fdt, censored, level=level)

    def first(side: Floats) -> float | None:
        below = np.flatnonzero(side <= 0.5)
        return float(below[0]) if len(below) else None

    value, low, high = first(curve.share), first(curve.low), first(curve.high)
    if curve.n_prompts < 2:
        return Estimate(value, None, None, level, curve.n_prompts, "none")
    low = float(len(curve.share)) if low is None else low
    return Estimate(value, low, high, level, curve.n_prompts, "Brookmeyer-Crowley")


def estimate_difference(
    a: ArrayLike, b: ArrayLike, *, ceiling: ArrayLike, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean over prompts of a − b, two candidates on the same prompts, each in 0..ceiling."""
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    top = np.broadcast_to(np.asarray(ceiling, dtype=np.float64), d.shape)
    n = len(d)
    if n < 2:
        return Estimate(float(d[0]) if n else None, None, None, level, n, "none", seed)
    mean, mean_top = float(d.mean()), float(top.mean())
    if not d.any():
        bound = mean_top * _none_of(n, level)
        return Estimate(0.0, -bound, bound, level, n, "exact binomial", seed)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(d.std(ddof=1)) / math.sqrt(n)
    low, high = max(-mean_top, mean - half), min(mean_top, mean + half)
    return Estimate(mean, low, high, level, n, "t", seed)


def sign_flip_p_value(
    a: ArrayLike, b: ArrayLike, *, seed: int = 0, n_resamples: int = 9999
) -> float | None:
    """Two-sided p-value of "a and b are alike": the mean of a − b under random flips of its signs."""
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    if len(d) == 0:
        return None
    d = np.sort(d[d != 0])
    if len(d) == 0:
        return 1.0
    if len(d) == 1:
        return 1.0
    test = stats.permutation_test(
        (d,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    steps = p[order] * np.arange(len(p), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(x) for x in corrected]


def _none_of(n: int, level: float) -> float:
    """Upper bound of a share that was seen in none of n prompts (Clopper and Pearson 1934)."""
    return 1.0 - ((1.0 - level) / 2) ** (1.0 / n)
