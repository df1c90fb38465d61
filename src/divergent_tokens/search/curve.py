"""The paper's figure: plans of a few sizes in one order or several, with what is expected of each.

Deiseroth et al., "Divergent Token Metrics" (2024), figure 5: the joint model is measured after each
so many components, in the order of each metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.measure.flips import FlipLaw
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.search import Offer, offers
from divergent_tokens.search.settings import RankBy, Settings

if TYPE_CHECKING:
    from divergent_tokens.sensitivities import Sensitivities


@dataclass(frozen=True)
class Point:
    """One order and count of the curve."""

    rank_by: RankBy
    offer: Offer

    @property
    def name(self) -> str:
        """What the plan is called among the candidates."""
        return f"{self.rank_by} {len(self.offer.components)}"

    def plan_file(self, base: Mapping[str, Any]) -> PlanFile:
        """Its plan."""
        offer = self.offer
        return PlanFile(base, offer.components, offer.size_bytes, offer.base_size_bytes)

    def to_json(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Plain values, beside the measurement."""
        offer = self.offer.to_json()
        return {"rank_by": str(self.rank_by), **offer, "measured": dict(measured)}


def curve(
    sensitivities: "Sensitivities",
    orders: Sequence[RankBy],
    counts: Sequence[int],
    settings: Settings,
    law: FlipLaw,
) -> tuple[Point, ...]:
    """Every order at every count, an order's counts together."""
    budgets = [Budget(Unit.components, count) for count in counts]
    return tuple(
        Point(order, offer)
        for order in orders
        for offer in offers(sensitivities, budgets, replace(settings, rank_by=order), law)
    )


def quarters(n_components: int) -> tuple[int, ...]:
    """A quarter, a half, three quarters and all of the components."""
    return tuple(dict.fromkeys(max(1, n_components * k // 4) for k in (1, 2, 3, 4)))
