"""Plans measured as a whole, on prompts that did not choose them."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from divergent_tokens.candidates import lent_candidates
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan_file import PlanFile, read_plan
from divergent_tokens.errors import RecordError
from divergent_tokens.measure.comparison import Comparison, compare
from divergent_tokens.measure.flips import Reading, readings
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.models import Model
from divergent_tokens.sensitivities import ROUNDING_FACTOR


def measure_plans(
    base: Model,
    plans: Mapping[str, PlanFile],
    prompts: PromptSet,
    *,
    chosen_on: Collection[str],
    new_tokens: int,
    ignore_eos: bool = False,
    calibration: str = "builtin",
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> dict[str, dict[str, Any]]:
    """Each plan's measurement, by its name, as a step of its trail.

    `chosen_on` holds the digests of the prompts that the plans were chosen on; how many of the
    given ones are among them stands in each step as `overlap`.
    """
    components = find_components(base.network, include=["*"])
    lent = lent_candidates(
        base,
        {name: file.plan() for name, file in plans.items()},
        components,
        calibration=calibration,
        cache=cache,
    )
    comparison = compare(
        base,
        lent,
        prompts,
        new_tokens=new_tokens,
        ignore_eos=ignore_eos,
        level=level,
        seed=seed,
        batch_size=batch_size,
        cache=cache,
        progress=progress,
    )
    overlap = sum(prompt.digest in chosen_on for prompt in prompts.prompts)
    return {
        result.name: {
            "step": "measured",
            "components_digest": plans[result.name].digest,
            "dtype": base.dtype_name,
            "prompts": {
                "source": prompts.source,
                "digest": prompts.digest,
                "n_prompts": len(prompts),
                "skipped": prompts.skipped,
                "prefix": prompts.prefix,
                "new_tokens": new_tokens,
            },
            "overlap": overlap,
            "rounding_kl": _value(comparison.rounding.to_json(), "kl"),
            "metrics": result.metrics.to_json(),
            "reading": reading.to_json(),
        }
        for result, reading in zip(comparison.candidates, _readings(comparison), strict=True)
    }


def _readings(comparison: Comparison) -> tuple[Reading, ...]:
    """The flip law's constants as each candidate asks for them."""
    margins = [
        row[:length]
        for row, length in zip(comparison.margins, comparison.completions.lengths, strict=True)
    ]
    found = [candidate.metrics.to_json() for candidate in comparison.candidates]
    return readings(margins, [(_value(m, "kl"), _value(m, "sdt"), _value(m, "fdt")) for m in found])


def _value(metrics: Mapping[str, Any], name: str) -> float:
    """A metric that was measured, since it is a model that was scored."""
    return float(metrics[name]["value"])


def readings_of(path: Path, *, fingerprint: str) -> list[Reading]:
    """The flip law's constants from the measurements in a plan's trail.

    Raises RecordError for a plan of another base than the one with this fingerprint.
    """
    file = read_plan(path)
    if file.base["fingerprint"] != fingerprint:
        raise RecordError(
            f"{path} was made for {file.base['reference']}, another base than the sweep's; fit "
            "the flip law on plans of one base"
        )
    try:
        return readings_in(file.trail)
    except (KeyError, TypeError) as error:
        raise RecordError(
            f"{path}: a step 'measured' of its trail does not hold what `dtm search --prompts` "
            "writes; measure the plan again"
        ) from error


def readings_in(trail: Sequence[Mapping[str, Any]]) -> list[Reading]:
    """Those of the measured steps of a trail, but for KLs that are mere rounding."""
    return [
        Reading(**step["reading"])
        for step in trail
        if step["step"] == "measured"
        and step["metrics"]["kl"]["value"] >= ROUNDING_FACTOR * step["rounding_kl"]
    ]
