"""The flip law: what FDT, SDT and survival follow from the base's margins and a KL.

A token flips when noise on the gap between the base's two best logits exceeds its margin m. With
Gaussian noise of standard deviation σ, each token on its own, P(flip) = Φ(−m/σ); and σ = a √KL,
since a KL is half the variance that a change gives the logits. The constant a belongs to the base:
it is read off candidates whose KL, SDT and FDT were measured, once by what SDT asks for and once by
what FDT does, since flips that come together leave the mean SDT alone and change the first one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from divergent_tokens.measure.intervals import Estimate

Floats = NDArray[np.float64]

KL_LIMIT = 0.3
"""Nats per token. Above, KLs of single components were seen to add up to half of the joint one."""
METHOD = "flip law"
_SIGMA_RANGE = (1e-4, 1e3)
"""Logits. Below, nothing flips that was no tie; above, every other token does."""
_N_SIGMAS = 300
_PRIOR_READINGS = 2.0
"""So many readings the spread that other bases showed counts for, beside those of this base."""


@dataclass(frozen=True)
class Constant:
    """σ / √KL, in logits, for one of the two metrics."""

    value: float
    spread: float
    """Standard deviation of its logarithm from one candidate to the next."""
    n_measured: int
    """How many candidates it was read off; 0 where it was taken over from other bases."""


@dataclass(frozen=True)
class FlipLaw:
    """The two constants of a base."""

    sdt: Constant
    fdt: Constant

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"sdt": dict(vars(self.sdt)), "fdt": dict(vars(self.fdt))}


UNFITTED = FlipLaw(Constant(2.4, 0.3, 0), Constant(2.4, 0.4, 0))
"""For a base of which nothing was measured: 2.1 to 2.5 on SmolLM2, 1.6 to 2 on another family."""


@dataclass(frozen=True)
class Reading:
    """The constants that one measured candidate asks for."""

    sdt: float | None
    """0 where no more diverged than without any noise; None where more did than any noise makes."""
    fdt: float | None
    """The same, by the mean FDT."""
    n_flips: float
    """Divergent tokens to expect at its KL: what `sdt` rests on."""
    n_first: float
    """Diverged prompts to expect at its KL: what `fdt` rests on."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class Expected:
    """What noise of one σ does to a set of prompts."""

    sdt: float
    fdt: float
    """Tokens."""
    survival: Floats
    """Share of prompts with FDT > t. [t]"""
    sdt_variance: float
    """Of one prompt's flips around the pooled share, over the mean length squared: from prompt to
    prompt, and by chance within one."""
    sdt_variance_between: float
    """The part from prompt to prompt."""
    fdt_variance: float
    """Of one prompt's FDT: from prompt to prompt, and by chance within one."""
    fdt_variance_between: float
    """The part from prompt to prompt."""
    n_first: float
    """Prompts that diverge."""
    log_whole: float
    """Logarithm of the chance that a prompt does not diverge, averaged over prompts."""


@dataclass(frozen=True)
class Prediction:
    """What a measurement on other prompts may show; None, with a reason, where nothing is known."""

    sdt: Estimate | None
    fdt: Estimate | None
    survival: tuple[tuple[int, float, float, float], ...]
    """Rows of t, S(t), low, high; one for every t."""
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "sdt": None if self.sdt is None else self.sdt.to_json(),
            "fdt": None if self.fdt is None else self.fdt.to_json(),
            "survival": [list(row) for row in self.survival],
            "reason": self.reason,
        }


# --- the law ---


def expected(margins: Sequence[ArrayLike], sigma: float) -> Expected:
    """SDT, FDT and survival under noise of standard deviation `sigma` on the gap, in logits.

    `margins` holds one array [token] a prompt. One prompt with margins 0 and 1 under σ = 1:
    P = 0.5 and 0.16, SDT = 0.33, S = 0.5 and 0.42, FDT = 0.92. Without noise a token flips where
    its margin is negative, and every other time where it is 0.
    """
    return _expected(*_padded(margins), sigma)


def _padded(margins: Sequence[ArrayLike]) -> tuple[Floats, NDArray[np.bool_]]:
    """Margins and which of them there are, both [prompt, token]."""
    rows = [np.asarray(row, dtype=np.float64) for row in margins]
    if not any(len(row) for row in rows):
        raise ValueError("there are no margins; expected one for every token of the completions")
    lengths = np.array([len(row) for row in rows])
    there = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(there.shape, np.inf)  # never flips
    padded[there] = np.concatenate(rows)
    return padded, there


def _expected(margins: Floats, there: NDArray[np.bool_], sigma: float) -> Expected:
    flips = _flips(margins, sigma)  # [prompt, token]
    lengths = there.sum(1)
    n_tokens = int(lengths.sum())
    alive = np.asarray(np.cumprod(1 - flips, axis=1), np.float64)  # each prompt's S(t)
    steps = np.arange(alive.shape[1])
    fdt = np.where(there, alive, 0).sum(1)  # [prompt]
    # E[FDT²] = Σ (2t + 1) P(FDT > t)
    squared = np.where(there, (2 * steps + 1) * alive, 0).sum(1)
    n_flips = flips.sum(1)
    sdt = float(n_flips.sum() / n_tokens)
    sdt_between = _variance(n_flips - sdt * lengths, mean=0.0)
    sdt_within = float((flips * (1 - flips)).sum(1).mean())
    mean_length_squared = float(lengths.mean()) ** 2
    fdt_between = _variance(fdt, mean=float(fdt.mean()))
    return Expected(
        sdt=sdt,
        fdt=float(fdt.mean()),
        survival=_survival(flips, alive, there),
        sdt_variance=(sdt_between + sdt_within) / mean_length_squared,
        sdt_variance_between=sdt_between / mean_length_squared,
        fdt_variance=fdt_between + float((squared - fdt**2).mean()),
        fdt_variance_between=fdt_between,
        n_first=float((1 - alive[:, -1]).sum()),
        log_whole=float(np.log(np.maximum(alive[:, -1], 1e-300)).mean()),
    )


def _flips(margins: Floats, sigma: float) -> Floats:
    if sigma == 0:
        return np.where(margins > 0, 0.0, np.where(margins < 0, 1.0, 0.5))
    return np.asarray(ndtr(-margins / sigma))


def _survival(flips: Floats, alive: Floats, there: NDArray[np.bool_]) -> Floats:
    """What Kaplan and Meier's estimate expects where completions have different lengths. [t]"""
    before = np.concatenate([np.ones((len(alive), 1)), alive[:, :-1]], axis=1)
    seen = np.where(there, before, 0).sum(0)
    diverged = np.where(there, before * flips, 0).sum(0)
    shares = 1 - np.divide(diverged, seen, out=np.ones_like(seen), where=seen > 0)
    return np.asarray(np.cumprod(shares))


def _variance(values: Floats, *, mean: float) -> float:
    return float(((values - mean) ** 2).sum() / max(1, len(values) - 1))


# --- its constants ---


def readings(
    margins: Sequence[ArrayLike], measured: Sequence[tuple[float, float, float]]
) -> tuple[Reading, ...]:
    """The constants that candidates ask for, each measured on these prompts as KL, SDT, FDT.

    KL in nats per token; above `KL_LIMIT` nothing is read off, since nothing is predicted there.
    The law is inverted through a table of 300 values of σ, to a few parts in ten thousand.
    """
    padded, there = _padded(margins)
    sigmas = np.geomspace(*_SIGMA_RANGE, _N_SIGMAS)
    table = [_expected(padded, there, float(sigma)) for sigma in sigmas]
    by_sdt = np.array([row.sdt for row in table])
    by_fdt = np.array([row.fdt for row in table])
    n_first = np.array([row.n_first for row in table])
    n_tokens = int(there.sum())

    def read(kl: float, sdt: float, fdt: float) -> Reading:
        if not 0 < kl <= KL_LIMIT:
            return Reading(None, None, 0.0, 0.0)
        from_sdt = _crossing(sigmas, by_sdt, sdt)
        from_fdt = _crossing(sigmas, -by_fdt, -fdt)
        usual = UNFITTED.sdt.value * math.sqrt(kl)
        return Reading(
            sdt=None if from_sdt is None else from_sdt / math.sqrt(kl),
            fdt=None if from_fdt is None else from_fdt / math.sqrt(kl),
            n_flips=n_tokens * float(np.interp(usual, sigmas, by_sdt)),
            n_first=float(np.interp(usual, sigmas, n_first)),
        )

    return tuple(read(*one) for one in measured)


def _crossing(sigmas: Floats, rising: Floats, value: float) -> float | None:
    """The σ at which a rising curve has a value, between two entries of the table.

    0 for a value below the curve, None for one above it.
    """
    rising = np.maximum.accumulate(rising)  # negative margins let it dip where σ is small
    if value <= rising[0]:
        return 0.0
    at = int(np.searchsorted(rising, value, side="right"))
    if at == len(rising):
        return None
    share = (value - rising[at - 1]) / (rising[at] - rising[at - 1])
    return float(sigmas[at - 1] ** (1 - share) * sigmas[at] ** share)


def fit(found: Iterable[Reading]) -> FlipLaw:
    """The constants of a base from its measured candidates; those of other bases without any.

    Each reading counts by the divergences to expect of it, also where there were none: to leave
    those out would keep the candidates that diverged by luck. That luck is taken out of the spread;
    a prediction adds that of its own prompts.
    """
    rows = list(found)
    return FlipLaw(
        sdt=_constant([(r.sdt, r.n_flips) for r in rows], UNFITTED.sdt),
        fdt=_constant([(r.fdt, r.n_first) for r in rows], UNFITTED.fdt),
    )


def _constant(found: Sequence[tuple[float | None, float]], before: Constant) -> Constant:
    known = [(value, weight) for value, weight in found if value is not None and weight > 0]
    values, weights = np.array(known).reshape(-1, 2).T
    if not values.any():
        return before
    mean = float(np.average(values, weights=weights))
    n_like = float(weights.sum() ** 2 / (weights**2).sum())  # equally weighted readings
    luck = len(known) / float(weights.sum())  # 1 / divergences, averaged by the same weights
    around = float(np.average((values / mean - 1) ** 2, weights=weights))
    total = _PRIOR_READINGS * before.spread**2 + n_like * max(0.0, around - luck)
    return Constant(mean, math.sqrt(total / (_PRIOR_READINGS + n_like - 1)), len(known))


# --- predictions ---


def predict(
    margins: Sequence[ArrayLike],
    kl: float,
    law: FlipLaw = UNFITTED,
    *,
    kl_se: float = 0.0,
    n_prompts: int | None = None,
    level: float = 0.95,
) -> Prediction:
    """What a measurement on `n_prompts` other prompts may show (default: as many as these).

    The intervals hold the constant's spread, the KL's standard error, and the luck of both sets of
    prompts. Above a KL of 0.3 there is no number, but the reason.
    """
    if kl > KL_LIMIT:
        return Prediction(None, None, (), f"the KL is above {KL_LIMIT}: sums fall short there")
    padded, there = _padded(margins)
    n_own = int(there.any(1).sum())
    n_new = n_prompts or n_own
    z = float(ndtri((1 + level) / 2))
    error = kl_se / kl / 2 if kl > 0 else 0.0  # of log √KL

    def side(constant: Constant, sign: int) -> Expected:
        spread = math.hypot(constant.spread, error)
        sigma = constant.value * math.sqrt(kl) * math.exp(sign * z * spread)
        return _expected(padded, there, sigma)

    few, sdt, many = (side(law.sdt, sign) for sign in (-1, 0, 1))
    long, fdt, short = (side(law.fdt, sign) for sign in (-1, 0, 1))
    sdt_luck = math.sqrt(sdt.sdt_variance / n_new + sdt.sdt_variance_between / n_own)
    fdt_luck = math.sqrt(fdt.fdt_variance / n_new + fdt.fdt_variance_between / n_own)
    share = fdt.survival  # [t]
    luck = np.sqrt(share * (1 - share) * (1 / n_new + 1 / n_own))

    def estimate(value: float, low: float, high: float, luck: float, top: float) -> Estimate:
        below, above = _bounds(*(np.array([x / top]) for x in (value, low, high, z * luck)))
        return Estimate(value, float(top * below[0]), float(top * above[0]), level, n_new, METHOD)

    longest = float(there.shape[1])  # other prompts may have longer completions than these
    sdt_found = estimate(sdt.sdt, few.sdt, many.sdt, sdt_luck, 1.0)
    fdt_found = estimate(fdt.fdt, short.fdt, long.fdt, fdt_luck, longest)
    if math.exp(n_new * fdt.log_whole) > (1 - level) / 2:  # likely enough that nothing diverges
        sdt_found, fdt_found = replace(sdt_found, low=0.0), replace(fdt_found, high=longest)
    below, above = _bounds(share, short.survival, long.survival, z * luck)
    return Prediction(
        sdt=sdt_found,
        fdt=fdt_found,
        survival=tuple(
            (t, float(share[t]), float(below[t]), float(above[t])) for t in range(len(share))
        ),
    )


def _bounds(share: Floats, low: Floats, high: Floats, luck: Floats) -> tuple[Floats, Floats]:
    """Bounds of shares: by the constant's spread and the prompts' luck, in quadrature. [t]

    On the scale of arcsin √share, on which luck is about the same everywhere: so the bounds stay
    within 0..1, and a small share has a long way up.
    """
    angle, below, above = (np.arcsin(np.sqrt(np.clip(x, 0, 1))) for x in (share, low, high))
    slope = 2 * np.sqrt(share * (1 - share))
    step = np.divide(luck, slope, out=np.zeros_like(luck), where=slope > 0)
    down = np.hypot(np.maximum(angle - below, 0), step)
    up = np.hypot(np.maximum(above - angle, 0), step)
    return (
        np.asarray(np.sin(np.maximum(angle - down, 0)) ** 2),
        np.asarray(np.sin(np.minimum(angle + up, math.pi / 2)) ** 2),
    )
