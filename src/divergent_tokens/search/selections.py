"""The options that meet a budget with the least harm."""

import math
from dataclasses import dataclass

import numpy as np

from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.knapsack import Floats, Integers, least_harm
from divergent_tokens.search.options import Options


@dataclass(frozen=True)
class Selection:
    """Which option each group takes."""

    options: Integers
    """[group]"""
    size_bytes: int
    gap: float | None
    """Harm above what no other selection can go below; None where an order was followed."""


def select(
    options: Options, budget: Budget, harm: Floats | None = None, *, prove: bool = False
) -> Selection:
    """The options that meet the budget, by their harm or by another one [group, option].

    A count takes so many components in ascending order of harm, each by the scheme that harms it
    least. A size with one scheme takes the paper's order too, until it is met; with several it is
    the least sum of harm. In an order, groups stand by their members' mean harm; of equals the
    first comes first.

    Raises DivergentTokensError, naming the nearest that can be met, if this one cannot.
    """
    harm = options.harm if harm is None else harm
    if budget.unit is Unit.components:
        return _by_count(options, budget, harm)
    limit = _limit(options, budget)
    if len(options.schemes) == 1:
        return _by_order(options, budget, harm, limit)
    smallest = int(np.where(np.isfinite(harm), options.size, options.size.max()).min(1).sum())
    if smallest > limit:
        raise _unmet(options, budget, smallest)
    found = least_harm(harm, options.size, limit, prove=None if prove else False)
    return Selection(found.options, found.size_bytes, found.gap)


def _limit(options: Options, budget: Budget) -> int:
    """Bytes."""
    whole = options.base_size_bytes
    limit = budget.value * (whole if budget.unit is Unit.share else options.n_parameters / 8)
    if limit >= whole:
        raise DivergentTokensError(
            f"{budget} is met without a change: the base takes "
            f"{8 * whole / options.n_parameters:.4g} bits a weight; give less"
        )
    return math.floor(limit + 1e-6)


def _by_count(options: Options, budget: Budget, harm: Floats) -> Selection:
    wanted, n_all = int(budget.value), len(options.names)
    if wanted > n_all:
        raise DivergentTokensError(
            f"{budget} cannot be met: the sweep has {n_all} components; give --count {n_all} or "
            "less"
        )
    best = harm[:, 1:].argmin(1) + 1  # [group]
    members = options.n_members
    mean = np.take_along_axis(harm, best[:, np.newaxis], 1)[:, 0] / members
    chosen, left = np.zeros(len(harm), np.int64), wanted
    for group in np.argsort(mean, kind="stable"):
        if members[group] <= left and np.isfinite(mean[group]):
            chosen[group] = best[group]
            left -= int(members[group])
    if left:
        above = min(int(n) for n in members[chosen == 0]) - left + wanted
        raise DivergentTokensError(
            f"{budget} cannot be met: components that share a scheme are converted together; the "
            f"nearest are --count {wanted - left} and --count {above}"
        )
    return _selection(options, chosen)


def _by_order(options: Options, budget: Budget, harm: Floats, limit: int) -> Selection:
    """One scheme: groups in ascending order of mean harm until the size is met."""
    saved = options.size[:, 0] - options.size[:, 1]  # [group]
    order = np.argsort(harm[:, 1] / options.n_members, kind="stable")
    order = order[saved[order] > 0]
    left = options.base_size_bytes - np.cumsum(saved[order])
    n = int(np.searchsorted(-left, -limit)) + 1
    if n > len(order):
        raise _unmet(options, budget, int(left[-1]) if len(left) else options.base_size_bytes)
    chosen = np.zeros(len(harm), np.int64)
    chosen[order[:n]] = 1
    return _selection(options, chosen)


def _selection(options: Options, chosen: Integers) -> Selection:
    size = np.take_along_axis(options.size, chosen[:, np.newaxis], 1)
    return Selection(chosen, int(size.sum()), None)


def _unmet(options: Options, budget: Budget, smallest: int) -> DivergentTokensError:
    if budget.unit is Unit.share:
        share = math.ceil(1e4 * smallest / options.base_size_bytes) / 1e4
        nearest = Budget(Unit.share, share)
    else:
        nearest = Budget(Unit.bits, math.ceil(800 * smallest / options.n_parameters) / 100)
    return DivergentTokensError(
        f"{budget} cannot be met: the smallest plan with {', '.join(options.schemes)} takes "
        f"{smallest} of {options.base_size_bytes} bytes; give {nearest} or more, or sweep smaller "
        "schemes"
    )


def around(options: Options, budget: Budget) -> list[Budget]:
    """The budget among two smaller and two larger ones, those that can be met."""
    values: list[float]
    if budget.unit is Unit.components:
        values = [round(budget.value * factor) for factor in (0.5, 0.75, 1, 1.25, 1.5)]
    else:
        step = 0.05 if budget.unit is Unit.share else 0.5
        values = [round(budget.value + step * k, 6) for k in (-2, -1, 1, 2)] + [budget.value]
    near = [Budget(budget.unit, value) for value in sorted(set(values)) if value > 0]
    return [one for one in near if one == budget or _can_be_met(options, one)]


def _can_be_met(options: Options, budget: Budget) -> bool:
    try:
        select(options, budget)
    except DivergentTokensError:
        return False
    return True
