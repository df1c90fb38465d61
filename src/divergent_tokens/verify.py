"""A written checkpoint against its plan: what plain transformers makes of it, bit for bit."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from divergent_tokens import reload
from divergent_tokens.calibrated import ready_plan
from divergent_tokens.candidates import lent_candidates, model_candidates
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.checkpoint import PLAN
from divergent_tokens.compress.checkpoint_checks import Check, check_files, read_config
from divergent_tokens.compress.components import Component, component_view, find_components
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.compress.plan import Plan, check_plan
from divergent_tokens.compress.plan_file import PlanFile, check_base, read_plan
from divergent_tokens.compress.servers import problems
from divergent_tokens.errors import DivergentTokensError, ModelError, PromptError
from divergent_tokens.measure.comparison import Comparison, compare, versions
from divergent_tokens.measure.completions import check_positions
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.models import Model
from divergent_tokens.offload import is_offloaded
from divergent_tokens.sensitivities import ROUNDING_FACTOR, read_sensitivities

SCHEMA = "divergent-tokens/verification/1"
MEMORY, RELOADED = "in memory", "reloaded"


@dataclass(frozen=True)
class Verification:
    """All that was checked; `to_json` is the content of verification.json."""

    folder: Path
    base: Model
    plan: PlanFile
    checks: tuple[Check, ...]
    worst: tuple[str, float] | None
    """The component that differs most from its plan, and by how much: ‖difference‖ / ‖planned‖."""
    comparison: Comparison | None
    """The base against the plan in memory and the reloaded checkpoint; None if none was loaded."""
    overlap: int | None
    """Of the prompts of the comparison, how many chose the plan; None if that is not known."""
    servers: dict[str, tuple[str, ...]]
    """What each of them would not load rightly, by rule."""
    command: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all is as planned."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain values in the form of the JSON Schema that comes with the package."""
        return {
            "schema": SCHEMA,
            "versions": versions(),
            "command": list(self.command),
            "folder": str(self.folder),
            "base": {
                "reference": self.base.reference,
                "fingerprint": self.base.fingerprint,
                "dtype": self.base.dtype_name,
                "device": str(self.base.device),
            },
            "plan": {
                "digest": self.plan.plan().digest,
                "n_components": len(self.plan.components),
                "size_bytes": self.plan.size_bytes,
                "base_size_bytes": self.plan.base_size_bytes,
            },
            "passed": self.passed,
            "checks": [vars(check) for check in self.checks],
            "worst": None
            if self.worst is None
            else {
                "component": self.worst[0],
                "difference": self.worst[1] if math.isfinite(self.worst[1]) else None,
            },
            "measured": None
            if self.comparison is None
            else _measured_json(self.comparison) | {"overlap": self.overlap},
            "servers": {name: list(found) for name, found in self.servers.items()},
        }


def _measured_json(comparison: Comparison) -> dict[str, Any]:
    record = comparison.to_json()
    prompts = ("source", "digest", "n_prompts", "skipped", "prefix", "new_tokens")
    return {
        "prompts": {name: record["prompts"][name] for name in prompts},
        "rounding": record["rounding"],
        "candidates": {c["name"]: c["metrics"] for c in record["candidates"]},
    }


def verify(
    folder: Path,
    base: Model,
    prompts: PromptSet,
    *,
    new_tokens: int = 128,
    ignore_eos: bool = False,
    calibration: str = "builtin",
    seed: int = 0,
    batch_size: int | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
    command: Sequence[str] = (),
) -> Verification:
    """What is in a folder that `dtm compress` wrote, against its plan on the base.

    `base` is loaded in the dtype of the checkpoint's config. Whatever is wrong with the checkpoint
    is a check that failed. Raises RecordError for a folder without a plan, and for a plan of
    another base.
    """
    if is_offloaded(base.network):
        raise ModelError(
            f"{base.reference} does not fit {base.device} whole, which comparing weight by weight "
            "needs; give --device cpu"
        )
    file = read_plan(folder / PLAN)
    check_base(file, base, folder / PLAN)
    components = find_components(base.network, include=["*"])
    plan = file.plan()
    check_plan(plan, components)
    plan = ready_plan(base, components, plan, source=calibration, cache=cache, progress=progress)
    checks: list[Check] = []
    worst = None
    with tempfile.TemporaryDirectory() as place:
        progress("reload", 0, 1, "models")
        report = _reload(folder, Path(place))
        progress("reload", 1, 1, "models")
        checks += _loading(report)
        if report["error"] is None:
            differences = _differences(base, plan, components, Path(place) / "state.safetensors")
            checks.append(_weights(differences, len(components)))
            worst = max(differences.items(), key=lambda item: item[1], default=None)
    checks += _surroundings(report, base)
    checks += check_files(folder, base, file, plan, components)
    comparison = None
    if report["error"] is None:
        comparison, check = _divergence(
            folder,
            base,
            plan,
            components,
            prompts,
            new_tokens=new_tokens,
            ignore_eos=ignore_eos,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
            worst=worst,
        )
        checks.append(check)
    dense = not read_config(folder).get("quantization_config")
    servers = {
        str(target): ()
        if dense
        else tuple(map(str, problems(plan, components, target, dtype=base.dtype)))
        for target in Coupling
    }
    return Verification(
        folder,
        base,
        file,
        tuple(checks),
        worst,
        comparison,
        _overlap(file, prompts),
        servers,
        tuple(command),
    )


def _overlap(file: PlanFile, prompts: PromptSet) -> int | None:
    """How many of the prompts the plan was chosen on; None if its sweep is not at hand."""
    try:
        sweep = next(s["sweep"] for s in reversed(file.trail) if s["step"] == "search")
        chosen_on = read_sensitivities(Path(sweep["file"]))
        if chosen_on.run["prompts"]["digest"] != sweep["prompts"]:
            return None  # another sweep lies there now
    except (StopIteration, KeyError, TypeError, DivergentTokensError):
        return None
    digests = {prompt.digest for prompt in chosen_on.prompts}
    return sum(prompt.digest in digests for prompt in prompts.prompts)


# --- reloaded ---


def _reload(folder: Path, place: Path) -> dict[str, Any]:
    """What a fresh process reports of the folder; its state lies in `place`."""
    command = [sys.executable, "-P", str(reload.__file__), str(folder.resolve()), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads((place / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        last = " ".join(done.stderr.split())[-400:]
        raise ModelError(
            f"the process that reloads {folder} ended with {done.returncode} before it could say "
            f"what it found ({last or 'nothing was said'}); expected memory for the whole model in "
            f"{place.parent}, on disk, and as much again to run it: free some room (TMPDIR names "
            "another place)"
        ) from error
    return found


def _loading(report: dict[str, Any]) -> Iterator[Check]:
    if report["error"] is not None:
        yield Check("loads", False, report["error"])
        return
    yield Check("loads", True, "by AutoModelForCausalLM.from_pretrained in a fresh process")
    wrong = {kind: report[kind] for kind in ("missing", "unexpected", "mismatched") if report[kind]}
    said = "; ".join(f"{len(keys)} {kind}: {keys[0]}" for kind, keys in wrong.items())
    yield Check("keys", not wrong, said or "none missing, unexpected or of another shape")


def _surroundings(report: dict[str, Any], base: Model) -> Iterator[Check]:
    """Whether text becomes tokens as with the base, and whether `generate` goes on alike."""
    said, own = report["tokenizer"], reload.tokenizer_parts(base.tokenizer)
    if isinstance(said, str):
        yield Check("tokenizer", False, said)
    else:
        wrong = [part for part in own if said[part] != own[part]]
        found = f"other {' and '.join(wrong)} than the base's" if wrong else "as the base's"
        yield Check("tokenizer", not wrong, found)
    if report["error"] is not None:
        return
    there, wanted = report["generation"], reload.generation_settings(base.network)
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            found = f"{name} is {there.get(name)!r}, in the base {wanted.get(name)!r}"
            yield Check("generation", False, found)
            return
    yield Check("generation", True, f"{len(wanted)} settings as in the base")


# --- weights ---


@torch.no_grad()
def _differences(
    base: Model, plan: Plan, components: Sequence[Component], state: Path
) -> dict[str, float]:
    """Component or tensor -> ‖difference‖ / ‖planned‖, of those that differ in any bit."""
    held: dict[str, list[Component]] = {}
    for component in components:
        held.setdefault(component.parameter, []).append(component)
    found: dict[str, float] = {}
    with lent_plan(base, plan, components=components) as planned, safe_open(state, "pt") as file:
        there = set(file.keys())
        for name, wanted in planned.network.state_dict().items():
            if name not in there:
                found[name] = math.inf
                continue
            loaded, wanted = file.get_tensor(name), wanted.cpu()
            if _same_bits(loaded, wanted):
                continue
            parts = held.get(name, [])
            if loaded.shape != wanted.shape or not parts:
                found[name] = _relative(loaded, wanted)
            for component in parts if loaded.shape == wanted.shape else ():
                one = component_view(loaded, component), component_view(wanted, component)
                if not _same_bits(*one):
                    found[component.name] = _relative(*one)
    return found


def _same_bits(found: Tensor, wanted: Tensor) -> bool:
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    first, second = (one.contiguous().reshape(-1).view(torch.uint8) for one in (found, wanted))
    return torch.equal(first, second)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """‖difference‖ / ‖planned‖; infinite where that is no number."""
    if found.shape != wanted.shape:
        return math.inf
    size = float(wanted.double().norm())
    difference = float((found.double() - wanted.double()).norm())
    by = difference / size if size else difference
    return by if math.isfinite(by) else math.inf


def _weights(differences: dict[str, float], n_components: int) -> Check:
    if not differences:
        return Check("weights", True, f"{n_components} components and all else, bit for bit")
    name, by = max(differences.items(), key=lambda item: item[1])
    more = f" ({len(differences)} differ)" if len(differences) > 1 else ""
    return Check("weights", False, f"{name} differs most from its plan, by {by:.2g}{more}")


# --- what it writes ---


def _divergence(
    folder: Path,
    base: Model,
    plan: Plan,
    components: Sequence[Component],
    prompts: PromptSet,
    *,
    worst: tuple[str, float] | None,
    **options: Any,
) -> tuple[Comparison | None, Check]:
    """The base against the plan in memory and the checkpoint: both must move alike."""
    try:
        loaded = model_candidates(
            str(folder), dtype=base.dtype, device=base.device, cache=options["cache"]
        )
        lent = lent_candidates(base, {MEMORY: plan}, components)
        candidates = {MEMORY: lent[MEMORY], RELOADED: loaded[str(folder)]}
        comparison = compare(base, candidates, prompts, **options)
    except (ModelError, PromptError) as error:
        if isinstance(error, PromptError):  # the base's own fault, unless it has room for them
            check_positions(base, prompts, options["new_tokens"])
        return None, Check("divergence", False, str(error))
    pairs = zip(*(candidate.rows for candidate in comparison.candidates), strict=True)
    nats = [(abs((a.kl or 0.0) - (b.kl or 0.0)), a.n_tokens) for a, b in pairs]
    difference = sum(nat for nat, _ in nats) / sum(n for _, n in nats)
    floor = ROUNDING_FACTOR * comparison.rounding.to_json()["kl"]["value"]
    said = (
        f"KL of the two differs by {difference:.2g} nats per token, and three times the rounding "
        f"floor is {floor:.2g}"
    )
    if difference <= floor:
        return comparison, Check("divergence", True, said)
    most = (
        worst[0] if worst else "no weight, so that inputs are quantized or computed with otherwise"
    )
    return comparison, Check("divergence", False, f"{said}; what differs most: {most}")
