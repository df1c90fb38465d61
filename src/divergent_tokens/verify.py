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
from transformers import AutoConfig

from divergent_tokens import model_files, reload
from divergent_tokens.calibrated import ready_plan
from divergent_tokens.candidates import lent_candidates, model_candidates
from divergent_tokens.compress.absmax import AbsMax
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.checkpoint import PLAN
from divergent_tokens.compress.checkpoint_weights import CheckpointWeights
from divergent_tokens.compress.components import Component, component_view, find_components
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.compress.gptq import Gptq
from divergent_tokens.compress.plan import Plan, check_plan
from divergent_tokens.compress.plan_file import PlanFile, check_base, read_plan
from divergent_tokens.compress.quantize import scale_dtype
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.compress.servers import problems
from divergent_tokens.errors import DivergentTokensError, ModelError
from divergent_tokens.fingerprints import VOLATILE_CONFIG_KEYS
from divergent_tokens.measure.comparison import Comparison, compare, versions
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.models import Model
from divergent_tokens.sensitivities import ROUNDING_FACTOR

SCHEMA = "divergent-tokens/verification/1"
SIZE_TOLERANCE = 0.02
"""Of the planned bytes of the packed components."""
MEMORY, RELOADED = "in memory", "reloaded"
_SHAPE_BYTES = 16
"""Two integers beside packed codes."""
_NEW_KEYS = {"quantization_config"}


@dataclass(frozen=True)
class Check:
    """One thing that must be true of a checkpoint."""

    name: str
    passed: bool
    found: str
    """What is wrong, or how much was looked at."""


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
                "dtype": str(self.base.dtype).removeprefix("torch."),
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
            "measured": None if self.comparison is None else _measured_json(self.comparison),
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
    loads = all(check.passed for check in checks[:1])
    checks.append(_config(folder, base))
    checks += _packing(folder, plan, components)
    comparison = None
    if loads:
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
    dense = not _read_config(folder).get("quantization_config")
    servers = {
        str(target): ()
        if dense
        else tuple(map(str, problems(plan, components, target, dtype=base.dtype)))
        for target in Coupling
    }
    return Verification(
        folder, base, file, tuple(checks), worst, comparison, servers, tuple(command)
    )


# --- reloaded ---


def _reload(folder: Path, place: Path) -> dict[str, Any]:
    """What a fresh process reports of the folder; its state lies in `place`."""
    command = [sys.executable, "-P", str(reload.__file__), str(folder.resolve()), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, Any] = json.loads((place / "report.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        last = " ".join(done.stderr.split())[-400:]
        return {"error": f"the process ended with {done.returncode}: {last}"}
    return found


def _loading(report: dict[str, Any]) -> Iterator[Check]:
    if report["error"] is not None:
        yield Check("loads", False, report["error"])
        return
    yield Check("loads", True, "by AutoModelForCausalLM.from_pretrained in a fresh process")
    wrong = {kind: report[kind] for kind in ("missing", "unexpected", "mismatched") if report[kind]}
    said = "; ".join(f"{len(keys)} {kind}: {keys[0]}" for kind, keys in wrong.items())
    yield Check("keys", not wrong, said or "none missing, unexpected or of another shape")


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
                found[name] = float("inf")
                continue
            loaded, wanted = file.get_tensor(name), wanted.cpu()
            if loaded.dtype == wanted.dtype and torch.equal(loaded, wanted):
                continue
            parts = held.get(name, [])
            if loaded.shape != wanted.shape or not parts:
                found[name] = _relative(loaded, wanted)
            for component in parts if loaded.shape == wanted.shape else ():
                one = component_view(loaded, component), component_view(wanted, component)
                if one[0].dtype != one[1].dtype or not torch.equal(*one):
                    found[component.name] = _relative(*one)
    return found


def _relative(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    size = float(wanted.double().norm())
    difference = float((found.double() - wanted.double()).norm())
    return difference / size if size else difference


def _weights(differences: dict[str, float], n_components: int) -> Check:
    if not differences:
        return Check("weights", True, f"{n_components} components and all else, bit for bit")
    name, by = max(differences.items(), key=lambda item: item[1])
    more = f" ({len(differences)} differ)" if len(differences) > 1 else ""
    return Check("weights", False, f"{name} differs most from its plan, by {by:.2g}{more}")


# --- files ---


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return model_files.read_config(folder, str(folder))
    except ModelError:
        return {}


def _config(folder: Path, base: Model) -> Check:
    """Whether config.json says of the network what the base's does."""
    try:
        model_files.read_config(folder, str(folder))
        config = AutoConfig.from_pretrained(folder).to_dict()
    except (ModelError, OSError, ValueError, TypeError, KeyError) as error:
        return Check("config", False, " ".join(str(error).split())[:400])
    own = base.network.config.to_dict()
    skipped = VOLATILE_CONFIG_KEYS | _NEW_KEYS
    keys = sorted((config.keys() | own.keys()) - skipped)
    for key in keys:
        if config.get(key) != own.get(key):
            return Check(
                "config", False, f"{key} is {config.get(key)!r}, in the base {own.get(key)!r}"
            )
    return Check("config", True, f"{len(keys)} keys as in the base")


def _packing(folder: Path, plan: Plan, components: Sequence[Component]) -> Iterator[Check]:
    """Whether the codes are read as the plan has them, and take the room that it promised."""
    try:
        weights = CheckpointWeights(folder, str(folder))
        if weights.is_dense:
            return
        planned = [c for c in components if c.name in plan.schemes]
        packable = [c for c in planned if plan.schemes[c.name].is_packable]
        yield _settings(weights, plan, packable)
        found = sum(map(weights.size_bytes, packable))
    except DivergentTokensError as error:
        yield Check("settings", False, str(error))
        return
    wanted = sum(plan.schemes[component.name].size_bytes(component) for component in packable)
    layout = sum(_layout_bytes(plan.schemes[component.name], component) for component in packable)
    by = (found - layout) / wanted - 1 if wanted else 0.0
    said = f"{found} bytes in codes, {wanted} planned and {layout} of the format's own ({by:+.2%})"
    yield Check("sizes", abs(by) <= SIZE_TOLERANCE, said)


def _layout_bytes(scheme: Scheme, component: Component) -> int:
    """What the format adds to codes and scales: a shape, and one scale repeated by channel."""
    step = scheme.steps[-1]
    step = step.grid if isinstance(step, Gptq) else step
    if not isinstance(step, AbsMax):
        return 0
    repeated = component.shape[0] - 1 if step.granularity == "tensor" else 0
    return _SHAPE_BYTES + repeated * scale_dtype(component.dtype).itemsize


def _settings(weights: CheckpointWeights, plan: Plan, packable: Sequence[Component]) -> Check:
    """Whether the config has the settings that each scheme's codes were made with."""
    wanted: dict[str, Any] = {}
    for component in packable:
        scheme = plan.schemes[component.name]
        if str(scheme) not in wanted:
            some = torch.ones(component.shape, dtype=component.dtype)
            wanted[str(scheme)] = scheme.packed(some, component).settings
        found = weights.settings(component)
        for part in ("weights", "input_activations", "format"):
            there, planned = (
                said.model_dump(mode="json").get(part) for said in (found, wanted[str(scheme)])
            )  # as a file says it: what follows from the rest is not in there
            if there != planned:
                return Check(
                    "settings",
                    False,
                    f"quantization_config has other {part} for {component.name} than its plan, "
                    f"{scheme}",
                )
    return Check("settings", True, f"of {len(wanted)} schemes as planned")


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
    except ModelError as error:
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
    most = worst[0] if worst else "no weight, so that inputs are quantized otherwise"
    return comparison, Check("divergence", False, f"{said}; what differs most: {most}")
