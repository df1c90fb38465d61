"""What a plan may be expected to do, before anything is built."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from divergent_tokens.measure.flips import KL_LIMIT, FlipLaw, Prediction, Reading, predict, readings
from divergent_tokens.measure.intervals import pooled
from divergent_tokens.search.knapsack import Floats, Integers
from divergent_tokens.search.options import Options
from divergent_tokens.search.settings import RankBy

if TYPE_CHECKING:
    from divergent_tokens.sensitivities import Sensitivities

N_FOLDS = 8
"""Parts of the prompts, each judging the plan that the others choose. Two halves promise too much
harm, since half of the prompts choose worse: 18 % with 16 made-up prompts, where eight parts
promise 3 % and the choosing prompts themselves 26 % too little (tests/search/test_forecasts.py)."""
SUM_SPREAD = 0.065
"""sd of the logarithm of a joint KL around the sum of single ones, on 57 random plans below 0.1."""
N_RESAMPLES = 100

Select = Callable[[Floats], Integers]
"""From harm [group, option] to the option of each group."""


@dataclass(frozen=True)
class Forecast:
    """KL, SDT, FDT and survival of a plan; None, with the reason, where nothing is known."""

    kl: float | None
    """Sum of the components' KLs, in nats per token."""
    kl_se: float | None
    """Its standard error: over prompts, and of joint KLs around sums."""
    kl_joint: float | None
    """The same with interactions: the probe's draws added up before they are squared."""
    cross_fitted: bool
    """Whether the prompts that were summed over are others than those that chose."""
    optimistic_kl: float | None
    """The sum over the very prompts that chose the plan."""
    prediction: Prediction

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kl": self.kl,
            "kl_se": self.kl_se,
            "kl_joint": self.kl_joint,
            "cross_fitted": self.cross_fitted,
            "optimistic_kl": self.optimistic_kl,
            **self.prediction.to_json(),
        }


def forecast(
    options: Options,
    chosen: Integers,
    select: Select,
    margins: Sequence[ArrayLike],
    law: FlipLaw,
    *,
    seed: int,
    level: float = 0.95,
) -> Forecast:
    """What to expect of a choice [group] on other prompts.

    Where it was made by KL, on these prompts, their sum promises too little harm. So the choice is
    made again without an eighth of the prompts and summed over those, for every eighth. Other
    orders are not made by the KLs that are summed, and keep their choice.
    """
    n_prompts = len(options.lengths)
    cross_fitted = options.rank_by is RankBy.kl and n_prompts >= 4
    fits = [(chosen, np.ones(n_prompts, bool))]  # choices, and the prompts to sum them over
    if cross_fitted:
        left_out = _folds(n_prompts, seed)  # [prompt, fold]
        harms = options.kl_under((~left_out).astype(np.float64))  # [fold, group, option]
        fits = [(select(harm), fold) for harm, fold in zip(harms, left_out.T, strict=True)]
    kl, kl_se = pooled(_held_out(fits, partial(_nats, options.nats)), options.lengths)
    joint = None
    if options.draws is not None:
        joint, _ = pooled(_held_out(fits, partial(_joint_nats, options.draws)), options.lengths)
    optimistic, _ = pooled(_nats(options.nats, chosen), options.lengths)
    known = kl <= KL_LIMIT
    error = float(np.hypot(kl_se or 0.0, SUM_SPREAD * kl))
    return Forecast(
        kl=kl if known else None,
        kl_se=error if known and kl_se is not None else None,
        kl_joint=joint if known else None,
        cross_fitted=cross_fitted,
        optimistic_kl=optimistic if known else None,
        prediction=predict(margins, kl, law, kl_se=error, level=level),
    )


def _folds(n_prompts: int, seed: int) -> NDArray[np.bool_]:
    """Which prompts each fold leaves out; every prompt is left out by one. [prompt, fold]"""
    parts = np.arange(n_prompts) % min(N_FOLDS, n_prompts)
    parts = np.random.default_rng(seed).permutation(parts)
    return np.asarray(parts[:, np.newaxis] == np.unique(parts))


def _held_out(
    fits: Sequence[tuple[Integers, NDArray[np.bool_]]], nats_of: Callable[[Integers], Floats]
) -> Floats:
    """Each prompt's nats under the choice that is to be summed over it. [prompt]"""
    return np.asarray(sum(np.where(seen, nats_of(chosen), 0) for chosen, seen in fits))


def _taken(values: NDArray[np.float32], chosen: Integers) -> Floats:
    """Of [group, option, ...] what each group's option has. [group, ...]"""
    return values[np.arange(len(chosen)), chosen].astype(np.float64)


def _nats(nats: NDArray[np.float32], chosen: Integers) -> Floats:
    """KL of each completion, as the sum over the groups. [prompt]"""
    return np.asarray(_taken(nats, chosen).sum(0))


def _joint_nats(draws: NDArray[np.float32], chosen: Integers) -> Floats:
    """KL of each completion with interactions. [prompt]"""
    return np.asarray(np.square(_taken(draws, chosen).sum(0)).mean(1) / 2)


def picked(options: Options, select: Select, *, seed: int) -> Floats:
    """The share of resamples over prompts that give each group each option. [group, option]"""
    n = len(options.lengths)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), N_RESAMPLES).T.astype(np.float64)  # [prompt, k]
    counts = np.zeros(options.harm.shape)
    groups = np.arange(len(counts))
    for block in np.array_split(weights, max(1, N_RESAMPLES // 10), axis=1):
        for harm in options.kl_under(block):
            counts[groups, select(harm)] += 1
    return counts / N_RESAMPLES


def sureness(
    options: Options, chosen: Integers, select: Select, *, seed: int
) -> Mapping[str, float]:
    """Each component's share of resamples over prompts that give it the same scheme, or none.

    Empty where the order was not by KL: other numbers are not kept by prompt.
    """
    if options.rank_by is not RankBy.kl or len(options.lengths) < 2:
        return {}
    same = picked(options, select, seed=seed)[np.arange(len(chosen)), chosen]
    shares = {
        member: float(share)
        for group, share in zip(options.groups, same, strict=True)
        for member in group
    }
    return {options.names[i]: shares[i] for i in sorted(shares)}


def measured_readings(sensitivities: "Sensitivities") -> tuple[Reading, ...]:
    """The flip law's constants as each measured component of a sweep asks for them."""
    rows = [
        (row.kl, row.sdt, row.fdt)
        for row in sensitivities.rows
        if row.method == "measure"
        and row.sdt is not None
        and row.fdt is not None
        and not sensitivities.below_rounding(row)
    ]
    return readings(sensitivities.margins, rows) if rows else ()
