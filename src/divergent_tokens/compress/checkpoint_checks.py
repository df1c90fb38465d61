"""What the files of a checkpoint say, against the plan and the base that it was made from.

Nothing is loaded here: the config, the headers of the weights, and what lies beside them.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from transformers import AutoConfig

from divergent_tokens import model_files
from divergent_tokens.compress.absmax import AbsMax
from divergent_tokens.compress.checkpoint import left_dense
from divergent_tokens.compress.checkpoint_weights import CheckpointWeights
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.gptq import Gptq
from divergent_tokens.compress.packed import Packed, quantization_config
from divergent_tokens.compress.plan import Plan
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.quantize import scale_dtype
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.errors import DivergentTokensError, ModelError
from divergent_tokens.fingerprints import VOLATILE_CONFIG_KEYS
from divergent_tokens.quiet import one_line, quietly

if TYPE_CHECKING:
    from divergent_tokens.models import Model

SIZE_TOLERANCE = 0.02
"""Of the planned bytes."""
_SHAPE_BYTES = 16
"""Two integers beside packed codes."""
_WEIGHT_ENDINGS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"})
_INDEX = "model.safetensors.index.json"
_MODULES = {"config_groups", "ignore"}
"""What of a quantization_config names modules, in any order."""


@dataclass(frozen=True)
class Check:
    """One thing that must be true of a checkpoint."""

    name: str
    passed: bool
    found: str
    """What is wrong, or how much was looked at."""


def check_files(
    folder: Path, base: "Model", file: PlanFile, plan: Plan, components: Sequence[Component]
) -> Iterator[Check]:
    """The checks `config`, `files` and, where weights are in codes, `settings` and `sizes`.

    `plan` is the file's, its codes at hand; `components` are all of the base's, the ends too.
    """
    yield _config(folder, base)
    try:
        files = model_files.find_weights(
            folder, str(folder), read_config(folder), allow_pickle=False
        )
    except ModelError as error:
        yield Check("files", False, str(error))
        return
    yield _files(folder, files)
    try:
        weights = CheckpointWeights(folder, str(folder))
        if weights.is_dense:
            yield from _dense(plan)
            return
        planned = [c for c in components if c.name in plan.schemes]
        packable = [c for c in planned if plan.schemes[c.name].is_packable]
        yield _settings(folder, weights, base, plan, components, packable)
        yield _sizes(weights, file, plan, planned, packable)
    except DivergentTokensError as error:
        yield Check("settings", False, str(error).removeprefix("the donor "))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, empty if there is none to read."""
    try:
        return model_files.read_config(folder, str(folder))
    except ModelError:
        return {}


# --- config.json, and what lies beside it ---


def _config(folder: Path, base: "Model") -> Check:
    """Whether it says of the network what the base's does, and of the weights what they are."""
    try:
        said = model_files.read_config(folder, str(folder))
        with quietly():
            config = AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:  # of an edited file transformers believes anything
        return Check("config", False, one_line(error))
    own = base.network.config.to_dict()
    keys = sorted((config.keys() | own.keys()) - VOLATILE_CONFIG_KEYS - {"quantization_config"})
    for key in keys:
        if config.get(key) != own.get(key):
            return Check(
                "config", False, f"{key} is {config.get(key)!r}, in the base {own.get(key)!r}"
            )
    dtype = str(said.get("dtype") or said.get("torch_dtype"))
    stored = _stored_dtypes(folder)
    if stored and dtype not in stored:
        return Check(
            "config", False, f"dtype is {dtype}, and the weights are {' and '.join(stored)}"
        )
    return Check("config", True, f"{len(keys)} keys as in the base")


_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _stored_dtypes(folder: Path) -> list[str]:
    """Those of the weights that are not in codes, nor scales; empty if they cannot be read."""
    try:
        weights = CheckpointWeights(folder, str(folder))
    except DivergentTokensError:
        return []  # said by other checks
    plain = [name for name in weights.names if not name.rpartition(".")[2].startswith("weight_")]
    found = {weights.dtype(name) for name in plain} & _DTYPES.keys()
    return sorted(_DTYPES[name] for name in found)


def _files(folder: Path, files: Sequence[Path]) -> Check:
    """Whether there are weights that nobody should read, and the index tells where they lie."""
    kept = [file for file in sorted(folder.iterdir()) if file.suffix in _WEIGHT_ENDINGS]
    stray = [file.name for file in kept if file not in files]
    if stray:
        return Check(
            "files", False, f"{stray[0]} holds weights that are not the checkpoint's; remove it"
        )
    if not (folder / _INDEX).is_file():
        return Check("files", True, "1 file of weights, no other")
    held: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
    said = _index(folder)
    for name in sorted(held.keys() | said.keys()):
        if said.get(name) != held.get(name):
            return Check(
                "files",
                False,
                f"{_INDEX} has {name} in {said.get(name)}, and it lies in {held.get(name)}",
            )
    return Check("files", True, f"{len(files)} files of weights, no other, as their index says")


def _index(folder: Path) -> dict[str, Any]:
    """Tensor -> file, as the index has it; empty where it says nothing sound."""
    try:
        found = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


# --- how the codes are read ---


def _dense(plan: Plan) -> Iterator[Check]:
    """Nothing, but for a plan that dense weights cannot carry out."""
    for name, scheme in plan.schemes.items():
        if scheme.activations is not None:
            said = f"{name} is planned as {scheme}, and dense weights leave its inputs as they are"
            yield Check("settings", False, said)
            return


def _settings(
    folder: Path,
    weights: CheckpointWeights,
    base: "Model",
    plan: Plan,
    components: Sequence[Component],
    packable: Sequence[Component],
) -> Check:
    """Whether the config has the settings that each scheme's codes were made with, and no more."""
    wanted: dict[tuple[str, int], QuantizationScheme] = {}
    modules: dict[str, Packed] = {}
    for component in packable:
        scheme = plan.schemes[component.name]
        key = str(scheme), component.shape[1]  # a group as wide as the matrix is a channel
        if key not in wanted:
            some = torch.ones(component.shape, dtype=component.dtype)
            wanted[key] = scheme.packed(some, component).settings
        modules[component.name] = Packed({}, wanted[key])
        part = _other_part(weights.settings(component), wanted[key])
        if part is not None:
            said = f"quantization_config has other {part} for {component.name} than its plan"
            return Check("settings", False, f"{said}, {scheme}")
        there = weights.coded_shape(component)
        if there != component.shape:
            said = f"{component.name} is {list(there)} by its codes"
            return Check("settings", False, f"{said}, in the base {list(component.shape)}")
    dense = left_dense(base.network, components, modules)
    more = _more_said(
        read_config(folder)["quantization_config"], quantization_config(modules, dense)
    )
    if more is not None:
        return Check("settings", False, f"quantization_config {more}")
    n_schemes = len({scheme for scheme, _ in wanted})
    return Check("settings", True, f"of {n_schemes} schemes as planned")


def _other_part(found: QuantizationScheme, wanted: QuantizationScheme) -> str | None:
    """The first part that is not the same, as a file says it."""
    there, planned = found.model_dump(mode="json"), wanted.model_dump(mode="json")
    parts = ("weights", "input_activations", "output_activations", "format")
    return next((part for part in parts if there.get(part) != planned.get(part)), None)


def _more_said(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What servers read that is not as it was written: of all modules, or of which they are."""
    for key in sorted((found.keys() | wanted.keys()) - _MODULES):
        if found.get(key) != wanted.get(key):
            return f"has {key} {found.get(key)!r}; expected {wanted.get(key)!r}"
    for kind, there, planned in (
        ("ignore", set(found.get("ignore") or ()), set(wanted["ignore"])),
        ("targets", _targets(found), _targets(wanted)),
    ):
        for name in sorted(there ^ planned):
            return f"{'names' if name in there else 'does not name'} {name} under {kind}"
    return None


def _targets(config: Mapping[str, Any]) -> set[str]:
    groups = config["config_groups"].values()
    return {str(target) for group in groups for target in group["targets"]}


# --- how much room they take ---


def _sizes(
    weights: CheckpointWeights,
    file: PlanFile,
    plan: Plan,
    planned: Sequence[Component],
    packable: Sequence[Component],
) -> Check:
    """Whether the codes take the room that their schemes say, and plan.json says the same."""
    found = sum(map(weights.size_bytes, packable))
    wanted = _bytes(plan, packable)
    layout = sum(_layout_bytes(plan.schemes[component.name], component) for component in packable)
    by = (found - layout) / wanted - 1 if wanted else 0.0
    said = f"{found} bytes in codes, {wanted} planned and {layout} of the format's own ({by:+.2%})"
    if abs(by) > SIZE_TOLERANCE:
        return Check("sizes", False, said)
    left = file.base_size_bytes - sum(component.base_size_bytes for component in planned)
    # Scales have the dtype of the weights, and the plan may have been made in another.
    others = [[replace(c, dtype=d) for c in planned] for d in (torch.float32, torch.bfloat16)]
    promised = [left + _bytes(plan, some) for some in (planned, *others)]
    near = SIZE_TOLERANCE * file.size_bytes
    if left < 0 or all(abs(size - file.size_bytes) > near for size in promised):
        return Check(
            "sizes",
            False,
            f"plan.json promises {file.size_bytes} of {file.base_size_bytes} bytes, and its "
            f"schemes take {promised[0] if left >= 0 else 'more'}",
        )
    return Check("sizes", True, said)


def _bytes(plan: Plan, components: Sequence[Component]) -> int:
    return sum(plan.schemes[component.name].size_bytes(component) for component in components)


def _layout_bytes(scheme: Scheme, component: Component) -> int:
    """What the format adds to codes and scales: a shape, filled words, a scale by channel."""
    step = scheme.steps[-1]
    step = step.grid if isinstance(step, Gptq) else step
    if not isinstance(step, AbsMax):
        return 0
    n_out, n_in = component.shape
    row_bytes = 4 * math.ceil(n_in * step.bits / 32)  # whole words
    filled = n_out * row_bytes - math.ceil(n_out * n_in * step.bits / 8)
    repeated = n_out - 1 if step.granularity == "tensor" else 0
    return _SHAPE_BYTES + filled + repeated * scale_dtype(component.dtype).itemsize
