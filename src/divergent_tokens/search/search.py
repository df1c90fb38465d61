"""A plan for a budget, what may be expected of it, and of budgets around it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.measure.flips import FlipLaw, Reading, fit
from divergent_tokens.search.budgets import Budget
from divergent_tokens.search.forecasts import Forecast, forecast, measured_readings, sureness
from divergent_tokens.search.knapsack import Floats, Integers
from divergent_tokens.search.options import Options, read_options
from divergent_tokens.search.selections import Selection, around, select
from divergent_tokens.search.settings import Settings

if TYPE_CHECKING:
    from divergent_tokens.sensitivities import Sensitivities


@dataclass(frozen=True)
class Offer:
    """What one budget buys."""

    budget: Budget
    components: Mapping[str, str]
    """Component name -> scheme."""
    size_bytes: int
    base_size_bytes: int
    n_parameters: int
    gap: float | None
    """Harm above what no plan of this size can go below; None where an order was followed."""
    forecast: Forecast

    def to_json(self) -> dict[str, Any]:
        """Plain values, the components as a count by scheme."""
        return {
            "budget": {"unit": str(self.budget.unit), "value": self.budget.value},
            "n_components": len(self.components),
            "schemes": dict(Counter(self.components.values())),
            "size_bytes": self.size_bytes,
            "share": self.size_bytes / self.base_size_bytes,
            "bits": 8 * self.size_bytes / self.n_parameters,
            "gap": self.gap,
            "predicted": self.forecast.to_json(),
        }


@dataclass(frozen=True)
class Search:
    """What `search` found."""

    base: Mapping[str, Any]
    """The base as the sweep names it."""
    sweep: Mapping[str, Any]
    """The sweep's file and prompts."""
    settings: Settings
    schemes: tuple[str, ...]
    """Those there were to choose from."""
    law: FlipLaw
    """The flip law's constants that the forecasts rest on."""
    offer: Offer
    around: tuple[Offer, ...]
    """Offers for smaller and larger budgets, this one among them."""
    picks: Mapping[str, float]
    """Component name -> share of resamples over prompts that decide the same about it."""
    n_below_rounding: int
    """KLs that were measured below three times the rounding floor, for want of probed ones."""

    def plan_file(self, *steps: Mapping[str, Any]) -> PlanFile:
        """The plan as a file, with further steps of its trail."""
        return PlanFile(
            base=self.base,
            components=self.offer.components,
            size_bytes=self.offer.size_bytes,
            base_size_bytes=self.offer.base_size_bytes,
            trail=(self.step(), *steps),
        )

    def step(self) -> dict[str, Any]:
        """The search as a step of a plan's trail."""
        offer = self.offer.to_json()
        return {
            "step": "search",
            "sweep": dict(self.sweep),
            **self.settings.to_json(),
            "schemes": list(self.schemes),
            "budget": offer["budget"],
            "gap": offer["gap"],
            "law": self.law.to_json(),
            "predicted": offer["predicted"],
            "picks": dict(self.picks),
            "n_below_rounding": self.n_below_rounding,
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values: the step, the base, and the offers around it."""
        return {
            "base": {name: self.base[name] for name in ("reference", "fingerprint")},
            **self.step(),
            "around": [offer.to_json() for offer in self.around],
        }


def search(
    sensitivities: "Sensitivities",
    budget: Budget,
    settings: Settings | None = None,
    *,
    readings: Sequence[Reading] = (),
) -> Search:
    """The plan that meets the budget with the least harm, and what may be expected of it.

    The flip law's constants are fitted on the components that the sweep measured, and on further
    `readings` of this base. Raises DivergentTokensError for a budget that cannot be met, and
    RecordError where the sweep lacks what the order asks for.
    """
    settings = settings or Settings()
    options = _options(sensitivities, settings)
    law = fit([*measured_readings(sensitivities), *readings])
    margins = sensitivities.margins
    selection = select(options, budget, prove=True)
    offer = _offer(options, budget, selection, margins, law, settings)
    others = [
        _offer(options, near, select(options, near), margins, law, settings)
        for near in around(options, budget)
        if near != budget
    ]
    return Search(
        base=sensitivities.run["base"],
        sweep=_sweep_json(sensitivities),
        settings=settings,
        schemes=options.schemes,
        law=law,
        offer=offer,
        around=tuple(sorted((offer, *others), key=lambda one: one.budget.value)),
        picks=sureness(
            options,
            selection.options,
            partial(_selected_again, options, budget),
            seed=settings.seed,
        ),
        n_below_rounding=options.n_below_rounding,
    )


def offers(
    sensitivities: "Sensitivities", budgets: Sequence[Budget], settings: Settings, law: FlipLaw
) -> tuple[Offer, ...]:
    """What several budgets buy in one order, with their forecasts."""
    options = _options(sensitivities, settings)
    return tuple(
        _offer(options, budget, select(options, budget), sensitivities.margins, law, settings)
        for budget in budgets
    )


def _options(sensitivities: "Sensitivities", settings: Settings) -> Options:
    return read_options(
        sensitivities,
        rank_by=settings.rank_by,
        schemes=settings.schemes,
        method=settings.method,
        coupling=settings.coupling,
    )


def _offer(
    options: Options,
    budget: Budget,
    selection: Selection,
    margins: Sequence[ArrayLike],
    law: FlipLaw,
    settings: Settings,
) -> Offer:
    return Offer(
        budget=budget,
        components=options.schemes_of(selection.options),
        size_bytes=selection.size_bytes,
        base_size_bytes=options.base_size_bytes,
        n_parameters=options.n_parameters,
        gap=selection.gap,
        forecast=forecast(
            options,
            selection.options,
            partial(_selected_again, options, budget),
            margins,
            law,
            seed=settings.seed,
            level=settings.level,
        ),
    )


def _selected_again(options: Options, budget: Budget, harm: Floats) -> Integers:
    """The options [group] that the same budget gets by another harm [group, option]."""
    return select(options, budget, harm).options


def _sweep_json(sensitivities: "Sensitivities") -> dict[str, Any]:
    prompts = sensitivities.run["prompts"]
    return {
        "file": str(sensitivities.path),
        "prompts": prompts["digest"],
        "n_prompts": len(sensitivities.prompts),
        "dtype": sensitivities.run["dtype"],
        "rounding_kl": sensitivities.rounding_kl,
        "sources": dict(sensitivities.run.get("sources", {})),
    }
