"""A sweep as plain values, for whoever shows it: every option, the law, what budgets buy."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from divergent_tokens.errors import RecordError
from divergent_tokens.measure.flips import FlipLaw, fit
from divergent_tokens.noise import table
from divergent_tokens.search.forecasts import measured_readings
from divergent_tokens.search.knapsack import Floats, Integers, least_harm

if TYPE_CHECKING:
    from divergent_tokens.sensitivities import Sensitivities, Sensitivity

N_BUDGETS = 41
_RUN = ("dtype", "device", "versions", "prompts", "new_tokens", "seed", "command", "n_draws")


def overview(sensitivities: "Sensitivities", law: FlipLaw | None = None) -> dict[str, Any]:
    """The sweep's components with the row that counts for each scheme, and what follows from them.

    The row that counts is the measured one, but the probe's where that lies under three times the
    rounding floor; a scheme that a component has no row for is left out of its options. `frontier`
    holds the least sum of KLs for 41 sizes: over the very prompts that chose, so that a plan on
    others shows more. Raises RecordError where there is no finished row.
    """
    counting = _counting(sensitivities)
    if not counting:
        raise RecordError(f"{sensitivities.path} holds no finished row; run `dtm sweep` again")
    law = law or fit(measured_readings(sensitivities))
    run = sensitivities.run
    schemes = list(dict.fromkeys(scheme for _, scheme in counting))
    components = [
        {
            "name": component.name,
            "kind": component.kind,
            "layer": component.layer,
            "n_parameters": component.n_parameters,
            "base_size_bytes": component.base_size_bytes,
            "options": {
                scheme: _option(sensitivities, counting[component.name, scheme])
                for scheme in schemes
                if (component.name, scheme) in counting
            },
        }
        for component in sensitivities.components
    ]
    return {
        "base": {name: run["base"][name] for name in ("reference", "fingerprint")},
        **{name: run.get(name) for name in _RUN},
        "rounding_kl": sensitivities.rounding_kl,
        "schemes": schemes,
        "components": components,
        "law": law.to_json(),
        "table": table(sensitivities.margins, law),
        "mean_length": float(sensitivities.lengths.mean()),
        "frontier": _frontier(components, schemes),
    }


def _counting(sensitivities: "Sensitivities") -> "dict[tuple[str, str], Sensitivity]":
    """(component, scheme) -> the row that counts."""
    found: dict[tuple[str, str], Sensitivity] = {}
    for row in sensitivities.rows:
        key = row.component, row.scheme
        before = found.get(key)
        better = row.method == "measure" and not sensitivities.below_rounding(row)
        instead = before is not None and sensitivities.below_rounding(before)
        if before is None or better or instead:
            found[key] = row
    return found


def _option(sensitivities: "Sensitivities", row: "Sensitivity") -> dict[str, Any]:
    return {
        "kl": row.kl,
        "kl_se": row.kl_se,
        "size_bytes": row.size_bytes,
        "method": row.method,
        "below_rounding": sensitivities.below_rounding(row),
    }


def _frontier(components: list[dict[str, Any]], schemes: list[str]) -> list[dict[str, float]]:
    """The least sum of KLs and its bytes for sizes from the smallest to the base's."""
    harm, size = _options(components, schemes)
    there = np.isfinite(harm)
    smallest = int(np.where(there, size, np.iinfo(np.int64).max).min(1).sum())
    largest = int(size[:, 0].sum())
    found = []
    for limit in np.unique(
        np.linspace(smallest, max(smallest, largest), N_BUDGETS, dtype=np.int64)
    ):
        choice = least_harm(harm, size, int(limit), prove=False)
        found.append({"size_bytes": choice.size_bytes, "kl": max(0.0, choice.harm)})
    return found


def _options(components: list[dict[str, Any]], schemes: list[str]) -> tuple[Floats, Integers]:
    """KL and bytes, infinite where there is no row; the first option is the base. Both
    [component, option]."""
    shape = len(components), len(schemes) + 1
    harm, size = np.full(shape, np.inf), np.zeros(shape, np.int64)
    for i, component in enumerate(components):
        harm[i, 0], size[i, 0] = 0.0, component["base_size_bytes"]
        options: Mapping[str, Mapping[str, Any]] = component["options"]
        for j, scheme in enumerate(schemes, 1):
            if scheme in options:
                harm[i, j] = options[scheme]["kl"]
                size[i, j] = options[scheme]["size_bytes"]
    return harm, size
