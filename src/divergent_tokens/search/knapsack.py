"""The least harm within a size: one option for each component (a multiple-choice knapsack).

Lagrange's way: put a price λ on a byte, let every component take the option that is cheapest at
that price, and find the lowest price at which the whole fits. That choice is the best of its own
size, and the price bounds the harm of every other choice within the limit from below; the distance
to that bound is the gap. What room is left is filled greedily. For a few hundred components HiGHS
then closes the gap, given only those options that could be in a better choice at all.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MAX_PROVEN = 500
"""Components up to which the optimum is proven."""
PROOF_SECONDS = 20.0
_STEPS = 200


@dataclass(frozen=True)
class Choice:
    """Which option each component takes."""

    options: Integers
    """[component]"""
    harm: float
    size_bytes: int
    lower_bound: float
    """No choice within the limit does less harm."""

    @property
    def gap(self) -> float:
        """Harm above the bound; 0 where the choice was proven to be the best."""
        return max(0.0, self.harm - self.lower_bound)


def least_harm(harm: Floats, size: Integers, limit: int, *, prove: bool | None = None) -> Choice:
    """The option for each component with the least sum of harm, sizes adding up to `limit` at most.

    `harm` and `size` are [component, option]; an option that a component does not have has infinite
    harm. Harm may be negative. With `prove` (by default for up to 500 components) the optimum is
    proven, unless that takes too long; `gap` says what is left open.

    Raises ValueError if even the smallest options are too large together.
    """
    there = np.isfinite(harm)
    smallest = np.where(there, size, np.iinfo(np.int64).max).min(1)  # [component]
    room = limit - int(smallest.sum())
    if room < 0:
        raise ValueError(f"the smallest options take {smallest.sum()} bytes, the limit is {limit}")
    # Counted from the smallest option, a high price leaves the harm of equal sizes exact.
    extra = np.where(there, size - smallest[:, np.newaxis], 0)
    fitting, price, bound = _priced(harm, extra, room)
    filled = _filled(harm, extra, fitting, room)
    if prove is None:
        prove = len(harm) <= MAX_PROVEN
    if prove:
        filled, bound = _proven(harm, extra, filled, room, price, bound)
    harm_sum = float(_taken(harm, filled).sum())
    return Choice(
        options=filled,
        harm=harm_sum,
        size_bytes=int(_taken(size, filled).sum()),
        lower_bound=min(bound, harm_sum),
    )


def _taken(values: NDArray[Any], options: Integers) -> NDArray[Any]:
    """What each component's option has, of [component, option]. [component]"""
    return np.take_along_axis(values, options[:, np.newaxis], 1)[:, 0]


# --- a price on a byte ---


@dataclass(frozen=True)
class _Line:
    """The cheapest choice at some price, and its cost harm + price · over at any other."""

    options: Integers
    harm: float
    over: int
    """Bytes above the room; it fits from 0 down."""


def _priced(harm: Floats, extra: Integers, room: int) -> tuple[Integers, float, float]:
    """A choice that fits, the price that bounds best, and the bound.

    No choice within the room costs less than the cheapest one at any price does. Between a price
    that is too low and one that is high enough, the next to try is where their two lines meet; it
    cuts the bracket much faster than its middle would, and ends at the best price exactly.
    """
    by_option = np.ascontiguousarray(harm.T), np.ascontiguousarray(extra.T, dtype=np.float64)

    def line(options: Integers) -> _Line:
        over = int(_taken(extra, options).sum()) - room
        return _Line(options, float(_taken(harm, options).sum()), over)

    loose = line(_cheapest(*by_option, 0.0))
    if loose.over <= 0:
        return loose.options, 0.0, loose.harm
    # However high the price is: the smallest option, and of those as small the least harmful.
    tight = line(np.where(extra == 0, harm, np.inf).argmin(1))
    best_price, bound = 0.0, loose.harm
    for _ in range(_STEPS):
        price = (tight.harm - loose.harm) / (loose.over - tight.over)
        found = line(_cheapest(*by_option, price))
        cost, meeting = found.harm + price * found.over, tight.harm + price * tight.over
        if cost > bound:
            best_price, bound = price, cost
        if cost >= meeting - 1e-12 * abs(meeting):
            break
        if found.over <= 0:
            tight = found
        else:
            loose = found
    return tight.options, best_price, bound


def _cheapest(harm: Floats, extra: Floats, price: float) -> Integers:
    """The option of least harm + price · extra for each component; both are [option, component]."""
    best = np.zeros(harm.shape[1], np.int64)
    least = harm[0] + price * extra[0]
    for option in range(1, len(harm)):
        cost = harm[option] + price * extra[option]
        best[cost < least] = option
        least = np.minimum(cost, least)
    return best


def _filled(harm: Floats, extra: Integers, options: Integers, room: int) -> Integers:
    """The same with what room is left spent on less harm, most per byte first."""
    left = room - int(_taken(extra, options).sum())
    gain = _taken(harm, options)[:, np.newaxis] - harm
    cost = extra - _taken(extra, options)[:, np.newaxis]
    components, better = np.nonzero((gain > 0) & (cost <= left))
    per_byte = gain[components, better] / np.maximum(cost[components, better], 0.5)
    filled = options.copy()
    for i in np.argsort(-per_byte, kind="stable"):
        component, option = components[i], better[i]
        now = filled[component]
        more = int(extra[component, option] - extra[component, now])
        if more <= left and harm[component, option] < harm[component, now]:
            filled[component] = option
            left -= more
    return filled


# --- the proof ---


def _proven(
    harm: Floats, extra: Integers, options: Integers, room: int, price: float, bound: float
) -> tuple[Integers, float]:
    """The best choice and its harm as the bound; or what is known when the time is over.

    An option that costs more than its component's cheapest by the gap or more cannot be part of a
    better choice, and so most are out before HiGHS begins. All that is left is counted in gaps,
    since HiGHS takes anything under 1e-6 for nothing and KLs can be smaller.
    """
    gap = float(_taken(harm, options).sum()) - bound
    if gap <= 1e-12 * np.abs(_taken(harm, options)).sum():
        return options, bound
    cost = harm + price * extra
    cost = (cost - cost.min(1, keepdims=True)) / gap  # [component, option]
    components, kept = np.nonzero(cost <= 1 + 1e-9)
    found = _milp(cost[components, kept], extra[components, kept], components, room, price / gap)
    if found is None:
        return options, bound
    chosen, lowest, finished = found
    best = options
    if chosen is not None:
        tried = np.empty_like(options)
        tried[components[chosen]] = kept[chosen]
        fits = int(_taken(extra, tried).sum()) <= room
        if fits and _taken(harm, tried).sum() < _taken(harm, options).sum():
            best = tried
    return best, float(_taken(harm, best).sum()) if finished else max(bound, bound + gap * lowest)


def _milp(
    cost: Floats, extra: Integers, components: Integers, room: int, price: float
) -> tuple[NDArray[np.bool_] | None, float, bool] | None:
    """Which variables are chosen, the lowest possible cost, and whether HiGHS came to an end.

    One variable for each option that is left, and one for the price of the room that stays empty.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n = len(cost)
    unit = math.gcd(room, *map(int, extra))
    row_of = np.unique(components, return_inverse=True)[1]
    one_each = csr_array((np.ones(n), (row_of, np.arange(n))), shape=(row_of.max() + 1, n + 1))
    size = np.append(extra / unit, 1.0)[np.newaxis]
    with _no_output():
        result = milp(
            np.append(cost, price * unit),
            integrality=np.append(np.ones(n), 0),
            bounds=Bounds(0, np.append(np.ones(n), 1 / (price * unit))),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(size, room / unit, room / unit),
            ],
            options={"time_limit": PROOF_SECONDS, "mip_rel_gap": 0.0},
        )
    if result.mip_dual_bound is None and result.x is None:
        return None
    chosen = None if result.x is None else result.x[:n] > 0.5
    return chosen, float(result.mip_dual_bound or 0.0), result.status == 0


@contextmanager
def _no_output() -> Iterator[None]:
    """Nothing on the standard output, where HiGHS prints a line that no option turns off."""
    try:
        own = os.dup(1)
    except OSError:  # closed by the shell
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)
