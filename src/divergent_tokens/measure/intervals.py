"""Estimates with intervals: numbers per prompt in, a value with its low and high bound out.

The prompt is the unit that is resampled. All intervals come from one idea: weigh the n prompts by
random shares (the Bayesian bootstrap of Rubin 1981), together with one more prompt, unseen and as
extreme as the most extreme one seen: the largest for the high bound, the smallest for the low one.
The bounds are quantiles of the weighted means. They stay inside the metric's range by themselves,
know that a skewed sample hides its tail, and need no standard error that may be zero.

With the worst *possible* prompt as the extra one, counted in full, this is Gaffke's bound (2005),
which for yes-or-no values is exactly Clopper and Pearson's binomial one. So that is also the answer
where nothing was seen to vary, no prompt diverged, say: such an interval never has width zero.
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

N_DRAWS = 1999
EXTRA_PROMPT = 0.75
"""How much of a prompt the extra one counts, chosen by coverage at level 0.95 over four strengths
of made-up schemes, 50 and 200 prompts: with ¾ between 91 and 97 %; with ½ down to 90 %, with 1 up
to 98 %. The percentile bootstrap goes down to 88 %, BCa to 89 %; the studentized bootstrap lies
between 92 and 99 %, but runs out of its range and finds no standard error where one prompt in
fifty diverges. On real prompts: benchmarks/coverage.py, and docs/log.md for all methods."""
ROUNDING = 1e-6
"""Relative: values that differ by less are alike, as acceptances of 1 in float32 are."""
_BLOCK = 1 << 20  # random numbers held at once


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that should hold the population's; None where nothing is known."""

    value: float | None
    low: float | None
    high: float | None
    level: float
    n_prompts: int
    method: str
    """"one more prompt", "exact binomial", "survival band"; "none" for fewer than two prompts."""
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
    values: ArrayLike,
    *,
    ceiling: ArrayLike,
    extreme: float | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Plain mean over prompts of a number in 0..ceiling: FDT, with the completions' lengths.

    `ceiling` is one number, or one per prompt. The extra prompt of the low bound has the value 0:
    completions that all stay whole still leave room for one that would not. That of the high bound
    has the value `extreme`, or the largest seen if that is more. Where lengths differ the high
    bound may lie above their mean: other prompts could have longer completions.
    """
    x = _numbers("values", values)
    top = np.broadcast_to(_numbers("ceiling", ceiling), x.shape)
    _check(level, "values", x, top)
    if len(x) == 0:
        return Estimate(None, None, None, level, 0, "none", seed)
    if len(x) > 1 and np.array_equal(x, top):  # also where the ceilings differ
        mean = float(x.mean())
        low = mean * (1 - _unseen_share(len(x), level))
        return Estimate(mean, low, mean, level, len(x), "exact binomial", seed)
    return _estimate(
        x,
        np.ones_like(x),
        extras=((0.0, 1.0), (max(float(x.max()), extreme or 0.0), 1.0)),
        ends=(0.0, float(top.mean())),
        level=level,
        seed=seed,
    )


def estimate_ratio(
    sums: ArrayLike, counts: ArrayLike, *, unit: Unit, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Σ sums / Σ counts over prompts, a row of each per prompt: all tokens pooled.

    `unit` says what the ratio is, and so its range: a "share" in 0..1 (SDT, acceptance), "nats"
    from 0 (KL), or the "perplexity" from 1 that is exp of nats per token (DPPL). Prompts without a
    token are left out. Where no prompt differs from another (no token diverged, say), the high
    bound of a share is the exact binomial one, and that of nats is None: however few other prompts
    there are, nothing bounds their nats.
    """
    s, c = _numbers("sums", sums), _numbers("counts", counts)
    if s.shape != c.shape:
        raise ValueError(f"{len(s)} sums and {len(c)} counts; expected one of each per prompt")
    s, c = s[c > 0], c[c > 0]
    highest = c if unit == "share" else np.full_like(c, np.inf)
    _check(level, "sums", s, highest)
    if len(s) == 0:
        return Estimate(None, None, None, level, 0, "none", seed)
    s = np.clip(s, 0, highest)
    above_mean = s - s.sum() / c.sum() * c
    least, most = int(np.argmin(above_mean)), int(np.argmax(above_mean))
    ratio = _estimate(
        s,
        c,
        extras=((float(s[least]), float(c[least])), (float(s[most]), float(c[most]))),
        ends=(0.0, 1.0 if unit == "share" else math.inf),
        level=level,
        seed=seed,
    )
    if unit != "perplexity":
        return ratio
    value, low, high = (
        None if x is None else _exp(x) for x in (ratio.value, ratio.low, ratio.high)
    )
    return Estimate(value, low, high, level, ratio.n_prompts, ratio.method, seed)


def pooled(sums: ArrayLike, counts: ArrayLike) -> tuple[float, float | None]:
    """Σ sums / Σ counts, and its standard error over prompts, that of a ratio of sums.

    Both are [prompt]; the error is None for a single prompt. For sums and ranks; what is shown to
    people has an interval, see `estimate_ratio`.
    """
    tops, bottoms = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    value, n = float(tops.sum() / bottoms.sum()), len(tops)
    if n < 2:
        return value, None
    residuals = tops - value * bottoms
    return value, math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) / float(bottoms.sum())


def estimate_difference(
    a: ArrayLike, b: ArrayLike, *, ceiling: ArrayLike, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean over prompts of a − b: two candidates' FDT on the same prompts, row by row.

    The extra prompt is plus or minus the largest difference seen, whichever side it was seen on:
    three prompts that differ in one direction, among many that do not, leave 0 inside.
    """
    x, y = _numbers("a", a), _numbers("b", b)
    if x.shape != y.shape:
        raise ValueError(
            f"a has {len(x)} prompts, b has {len(y)}; expected the same prompts in both"
        )
    top = np.broadcast_to(_numbers("ceiling", ceiling), x.shape)
    _check(level, "a", x, top)
    _check(level, "b", y, top)
    if len(x) == 0:
        return Estimate(None, None, None, level, 0, "none", seed)
    d = x - y
    largest = float(np.abs(d).max())
    return _estimate(
        d,
        np.ones_like(d),
        extras=((-largest, 1.0), (largest, 1.0)),
        ends=(-float(top.mean()), float(top.mean())),
        level=level,
        seed=seed,
    )


def _estimate(
    sums: Floats,
    counts: Floats,
    *,
    extras: tuple[tuple[float, float], tuple[float, float]],
    ends: tuple[float, float],
    level: float,
    seed: int,
) -> Estimate:
    """The pooled ratio of one row or more; `extras` are the low and the high bound's extra rows."""
    n = len(sums)
    value = float(sums.sum() / counts.sum())
    if n == 1:
        return Estimate(value, None, None, level, n, "none", seed)
    rates = sums / counts
    if np.ptp(rates) <= ROUNDING * np.abs(rates).max():
        share = _unseen_share(n, level)
        low, high = (value + share * (end - value) for end in ends)
        return Estimate(
            value, low, high if math.isfinite(high) else None, level, n, "exact binomial", seed
        )
    low, high = _one_more_prompt(sums, counts, extras, level, seed)
    # Near level 0 the drawing alone could leave the value a hair outside.
    return Estimate(value, min(low, value), max(high, value), level, n, "one more prompt", seed)


def _one_more_prompt(
    sums: Floats,
    counts: Floats,
    extras: tuple[tuple[float, float], tuple[float, float]],
    level: float,
    seed: int,
) -> tuple[float, float]:
    """Quantiles of the randomly weighted ratio; the same numbers whatever the prompts' order."""
    rows = np.stack([sums, counts], axis=1)[np.lexsort((counts, sums))]  # [prompt, 2]
    n = len(rows)
    rng = np.random.default_rng(seed)
    extra_weights = rng.standard_gamma(EXTRA_PROMPT, N_DRAWS)[:, np.newaxis]  # [draw, 1]
    ratios = np.empty((2, N_DRAWS))  # [bound, draw]
    n_block = max(1, _BLOCK // n)
    for start in range(0, N_DRAWS, n_block):
        block = slice(start, min(start + n_block, N_DRAWS))
        totals = rng.standard_exponential((block.stop - block.start, n)) @ rows  # [draw, 2]
        for bound, extra in enumerate(extras):
            with_extra = totals + extra_weights[block] * np.array(extra)
            ratios[bound, block] = with_extra[:, 0] / with_extra[:, 1]
    tail = (1 - level) / 2
    return float(np.quantile(ratios[0], tail)), float(np.quantile(ratios[1], 1 - tail))


def _unseen_share(n: int, level: float) -> float:
    """Upper bound on the share of a kind of prompt that none of n was (Clopper, Pearson 1934)."""
    return float(1 - ((1 - level) / 2) ** (1 / n))


@dataclass(frozen=True)
class Survival:
    """Share of prompts with FDT > t for t = 0, 1, …, and a band that covers at each t by itself."""

    share: Floats  # [t]
    low: Floats  # [t]
    high: Floats  # [t]
    level: float
    n_prompts: int

    def to_json(self) -> list[list[float]]:
        """Rows [t, S, low, high], one for every t at which any of the three changes."""
        rows = np.stack([self.share, self.low, self.high], axis=1)  # [t, 3]
        steps = np.abs(np.diff(rows, axis=0, prepend=-1))
        changes = np.any(steps > 1e-9, axis=1)
        return [[int(t), *map(float, rows[t])] for t in np.flatnonzero(changes)]


def survival(fdt: ArrayLike, censored: ArrayLike, *, level: float = 0.95) -> Survival:
    """S(t), the share of prompts with FDT > t (Kaplan and Meier 1958), for t below the longest FDT.

    An FDT of 0 is a divergence at t = 0, so S(0) may be below 1. An FDT of L that is censored had
    its last chance at t = L − 1 and counts as seen there, but no longer at t = L.

    FDT = [0, 2, 2] with the last one censored (it has two tokens): S(0) = 2/3, S(1) = 2/3, and at
    t = 2 only the second is left and diverges: S(2) = 0.

    The band is Clopper and Pearson's for S(t) among n′ = (prompts still seen at t) / S(t − 1): the
    number of prompts there are as long as no completion has ended. Unlike Greenwood's formula on
    any scale (scipy's ecdf) it has no gaps where S is 1 or 0.
    """
    time, is_censored = _numbers("fdt", fdt), np.asarray(censored, dtype=bool)
    _check(level, "fdt", time, np.full_like(time, np.inf))
    if time.shape != is_censored.shape:
        raise ValueError(
            f"{len(time)} FDTs and {len(is_censored)} censoring marks; expected as many"
        )
    t = time.astype(np.int64)
    n_steps = int(np.max(t + ~is_censored, initial=0))
    diverged = np.bincount(t[~is_censored], minlength=n_steps)  # [t]
    ended = np.bincount(t[is_censored], minlength=n_steps)[:n_steps]  # [t], last seen at t − 1
    seen = len(t) - np.cumsum(ended) - np.cumsum(diverged) + diverged  # [t]
    share = np.cumprod(1 - diverged / seen)
    n_like = seen / np.r_[1.0, share[:-1]]
    alive, tail = n_like * share, (1 - level) / 2
    low, high = np.zeros(n_steps), np.ones(n_steps)
    some, not_all = share > 0, share < 1
    low[some] = stats.beta.ppf(tail, alive[some], (n_like - alive)[some] + 1)
    high[not_all] = stats.beta.isf(tail, alive[not_all] + 1, (n_like - alive)[not_all])
    # S never rises, so a bound at an earlier t holds at every later one.
    return Survival(share, low, np.minimum.accumulate(high), level, len(t))


def median_fdt(fdt: ArrayLike, censored: ArrayLike, *, level: float = 0.95) -> Estimate:
    """The first t with S(t) ≤ ½; its bounds are where the band's two sides get there.

    That is Brookmeyer and Crowley's interval (1982). The value is None where S stays above ½, the
    high bound where the band's upper side does. Where even the lower side does, the low bound is
    the longest FDT seen: the median is no less.
    """
    curve = survival(fdt, censored, level=level)

    def first_below(side: Floats) -> float | None:
        below = np.flatnonzero(side <= 0.5 + 1e-12)  # a product of shares may round to above ½
        return float(below[0]) if len(below) else None

    value, n = first_below(curve.share), curve.n_prompts
    if n < 2:
        return Estimate(value, None, None, level, n, "none")
    low, high = first_below(curve.low), first_below(curve.high)
    low = float(len(curve.share)) if low is None else low
    return Estimate(value, low, high, level, n, "survival band")


def sign_flip_p_value(
    a: ArrayLike, b: ArrayLike, *, seed: int = 0, n_resamples: int = 9999
) -> float | None:
    """Two-sided p-value of "a and b differ by chance": two candidates' FDT on the same prompts.

    How often the mean of a − b is as far from 0 when each prompt's difference gets a random sign;
    all sign patterns are tried where there are no more than `n_resamples`. None without prompts.
    """
    x, y = _numbers("a", a), _numbers("b", b)
    if x.shape != y.shape:
        raise ValueError(
            f"a has {len(x)} prompts, b has {len(y)}; expected the same prompts in both"
        )
    if len(x) == 0:
        return None
    d = x - y
    d = d[d != 0]  # a zero stays zero under any sign
    if len(d) < 2:
        return 1.0
    d = d if d.sum() >= 0 else -d  # the same answer for (b, a) ...
    d = d[np.lexsort((d, np.abs(d)))]  # ... and for any order of the prompts
    test = stats.permutation_test(
        (d,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, _BLOCK // len(d)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given.

    The smallest of m is multiplied by m, the next by m − 1, and so on; none may be smaller than
    the one before it. [0.01, 0.04, 0.03] becomes [0.03, 0.06, 0.06].
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return [float(x) for x in np.minimum(corrected, 1)]


def _numbers(name: str, values: ArrayLike) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if not np.all(np.isfinite(numbers)):
        raise ValueError(f"{name} holds a NaN or an infinity; expected a finite number per prompt")
    return numbers


def _check(level: float, name: str, values: Floats, ceiling: Floats) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected a share between 0 and 1, such as 0.95")
    if values.ndim != 1:
        raise ValueError(f"{name} has the shape {values.shape}; expected one number per prompt")
    outside = (values < -ROUNDING) | (values > ceiling * (1 + ROUNDING))
    if outside.any():
        at = int(np.argmax(outside))
        raise ValueError(
            f"{name}[{at}] is {values[at]:g}; expected a number from 0 to {ceiling[at]:g}"
        )


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # no float holds more
