"""A sweep that measures only what a plan hangs on: probe everything, then settle the doubts."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.models import Model
from divergent_tokens.search.budgets import Budget
from divergent_tokens.search.doubts import doubts
from divergent_tokens.search.settings import Settings
from divergent_tokens.sensitivities import (
    ROUNDING_FACTOR,
    Pair,
    Sensitivities,
    keep,
    read_sensitivities,
)
from divergent_tokens.sweep import sweep

MAX_LOOKS = 10


@dataclass(frozen=True)
class Look:
    """The plan as it stands once, and what is then measured."""

    chosen: dict[str, str]
    """Component name -> scheme."""
    n_unsure: int
    """Components that resamples over prompts give more than one scheme."""
    sureness: float
    """Share of decisions, over components and resamples, that are as the plan has them."""
    n_changed: int | None
    """Decisions that are others than at the look before; None at the first."""
    pairs: tuple[Pair, ...]
    """To be measured now; none at the last look."""


def settle(
    base: Model,
    components: Sequence[Component],
    schemes: Sequence[Scheme],
    prompts: PromptSet,
    out: Path,
    budget: Budget,
    settings: Settings,
    *,
    n_draws: int = 1,
    text: str | None = None,
    **options: Any,
) -> Sensitivities:
    """A sweep whose plan for this budget is not changed any more by what is measured.

    Everything is probed. Then, as long as it changes the plan, components are measured: those
    about which resamples over prompts disagree, under every scheme that they may get, and those
    whose change is too large for a second-order estimate; but none below three times the rounding
    floor, where the probe sees more. How it went stands in the file as `settled`, so that a run
    that was stopped goes on where it was.

    `options` are those of `sweep`. Raises as `sweep` does, and DivergentTokensError for a budget
    that cannot be met, once all is probed.
    """
    settings = replace(settings, schemes=tuple(map(str, schemes)))

    def measure(pairs: tuple[Pair, ...]) -> Sensitivities:
        return sweep(
            base,
            components,
            schemes,
            prompts,
            out,
            method="measure",
            only=pairs,
            text=text,
            **options,
        )

    found = sweep(
        base, components, schemes, prompts, out, method="probe", n_draws=n_draws, **options
    )
    asked = {"budget": str(budget), "schemes": list(settings.schemes), **settings.to_json()}
    looks = _kept(found, asked)
    if not looks:
        doubts(found, budget, settings)  # whether it can be met at all
        found = measure(())  # the rounding floor
    while not looks or looks[-1].pairs:
        if looks:
            found = measure(looks[-1].pairs)
        looks.append(_look(found, budget, settings, looks))
        passes = {
            "probe": 1 + n_draws * (1 + len(schemes)),
            "measure": 2 + _measured_passes(found, looks),
        }
        n_tokens = sum(len(p.ids) for p in prompts.prompts) + int(found.lengths.sum())
        keep(
            out,
            settled={
                **asked,
                "looks": [asdict(look) for look in looks],
                "passes": passes,
                "forward_tokens": round(sum(passes.values()) * n_tokens),
            },
        )
    return read_sensitivities(out)


def _kept(found: Sensitivities, asked: dict[str, Any]) -> list[Look]:
    """The looks of a run that asked for the same and was stopped, or is done."""
    settled = found.run.get("settled", {})
    if any(settled.get(name) != value for name, value in asked.items()):
        return []
    return [
        Look(**{**look, "pairs": tuple((name, scheme) for name, scheme in look["pairs"])})
        for look in settled["looks"]
    ]


def _look(found: Sensitivities, budget: Budget, settings: Settings, before: Sequence[Look]) -> Look:
    now = doubts(found, budget, settings)
    n_changed = None
    if before:
        last = before[-1].chosen
        n_changed = sum(last.get(name) != now.chosen.get(name) for name in last | now.chosen)
    done = n_changed == 0 or len(before) + 1 == MAX_LOOKS
    return Look(
        chosen=now.chosen,
        n_unsure=now.n_unsure,
        sureness=now.sureness,
        n_changed=n_changed,
        pairs=() if done else tuple(_above_rounding(found, now.pairs)),
    )


def _above_rounding(found: Sensitivities, pairs: Iterable[Pair]) -> Iterable[Pair]:
    floor = ROUNDING_FACTOR * (found.rounding_kl or 0.0)
    kls = {(row.component, row.scheme): row.kl for row in found.rows if row.method == "probe"}
    return (pair for pair in pairs if kls[pair] >= floor)


def _measured_passes(found: Sensitivities, looks: Sequence[Look]) -> float:
    """What measuring took: of each row the layers from its own on."""
    layers = {component.name: component.layer or 0 for component in found.components}
    n_layers = max(layers.values()) + 1
    return sum((n_layers - layers[name]) / n_layers for look in looks for name, _ in look.pairs)
