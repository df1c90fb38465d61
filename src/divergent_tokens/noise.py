"""Which damage is ordinary noise: the flip law's prediction beside what a comparison measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from divergent_tokens.measure.flips import KL_LIMIT, FlipLaw, fit, predict, readings
from divergent_tokens.sensitivities import ROUNDING_FACTOR

LEAST_KL = 1e-6
"""Nats per token at which a table of the law begins; it ends at the limit of its range."""
N_KLS = 36
LEAST_PROMPTS = 5
"""Groups of fewer prompts are not judged: their intervals hold nearly everything."""
_GROUPS = ("by_domain", "by_language")


def noise(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What the flip law says of a comparison.json: its constants, its table, and each candidate.

    A candidate is judged by constants that the *other* candidates ask for (those of other bases
    where there is no other), so that none is its own measure. Its `sdt` and `fdt`, and those of
    its domains and languages, hold what was measured, what the law expects at that KL, and
    `ordinary`: whether the first lies in the interval of the second; None where it has no number.
    """
    margins = comparison["prompts"]["margins"]
    floor = ROUNDING_FACTOR * comparison["rounding"]["kl"]["value"]
    seen = {c["name"]: c for c in comparison["candidates"] if c["metrics"]["kl"]}
    triples = [_triple(candidate["metrics"]) for candidate in seen.values()]
    found = dict(zip(seen, readings(margins, triples), strict=True)) if seen else {}
    counted = {name: r for name, r in found.items() if _value(seen[name]["metrics"], "kl") > floor}
    law = fit(counted.values())
    judged = []
    for name, candidate in seen.items():
        others = fit(reading for other, reading in counted.items() if other != name)
        judged.append({"name": name, **_judged(candidate["metrics"], margins, others)})
        for kind in _GROUPS:
            judged[-1][kind] = _groups(candidate, kind, margins, others)
    return {"law": law.to_json(), "table": table(margins, law), "candidates": judged}


def table(margins: Sequence[ArrayLike], law: FlipLaw) -> list[list[float]]:
    """Rows of KL, SDT with its two bounds, FDT with its two bounds, from a KL of 1e-6 to 0.3."""
    rows = []
    for kl in np.geomspace(LEAST_KL, KL_LIMIT, N_KLS):
        found = predict(margins, min(float(kl), KL_LIMIT), law)
        bounds = [
            bound
            for one in (found.sdt, found.fdt)
            if one
            for bound in (one.value, one.low, one.high)
        ]
        rows.append([float(kl), *(float(bound or 0.0) for bound in bounds)])
    return rows


def _judged(
    metrics: Mapping[str, Any], margins: Sequence[ArrayLike], law: FlipLaw
) -> dict[str, Any]:
    kl = _value(metrics, "kl")
    found = predict(margins, kl, law)
    judged: dict[str, Any] = {"kl": kl, "reason": found.reason, "n_prompts": len(margins)}
    for name, expected in (("sdt", found.sdt), ("fdt", found.fdt)):
        measured = _value(metrics, name)
        ordinary = None
        if expected is not None and expected.low is not None and expected.high is not None:
            ordinary = expected.low <= measured <= expected.high
        judged[name] = {
            "measured": measured,
            "expected": None if expected is None else expected.to_json(),
            "ordinary": ordinary,
        }
    return judged


def _groups(
    candidate: Mapping[str, Any], kind: str, margins: Sequence[ArrayLike], law: FlipLaw
) -> dict[str, Any]:
    """Each domain's or language's judgement, of those with enough prompts."""
    column = kind.removeprefix("by_")
    groups = candidate["metrics"][kind]
    members = {
        group: [margins[row["prompt"]] for row in candidate["rows"] if row[column] == group]
        for group in groups
    }
    return {
        group: _judged(groups[group], own, law)
        for group, own in members.items()
        if len(own) >= LEAST_PROMPTS and groups[group]["kl"]
    }


def _triple(metrics: Mapping[str, Any]) -> tuple[float, float, float]:
    return _value(metrics, "kl"), _value(metrics, "sdt"), _value(metrics, "fdt")


def _value(metrics: Mapping[str, Any], name: str) -> float:
    return float(metrics[name]["value"])
