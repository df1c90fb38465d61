"""The matrices of a safetensors checkpoint by our names, dense or decompressed one at a time."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.utils.match import match_targets
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens import model_files
from divergent_tokens.compress.components import Component, component_view, weight_of
from divergent_tokens.compress.formats import PerToken
from divergent_tokens.errors import ModelError, SchemeError
from divergent_tokens.models import load_model
from divergent_tokens.quiet import one_line

_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""What mixtures of its kind call the parts of an expert in their files."""


class CheckpointWeights:
    """An open checkpoint. Its methods raise SchemeError for what it does not hold.

    Tensors are looked for under the names of the network, and those that files are known to have;
    what has other names is left to transformers, which then loads the whole checkpoint.
    """

    def __init__(self, folder: Path, reference: str) -> None:
        """Read the headers. Raises ModelError for a checkpoint that is not whole."""
        self._reference = reference
        self._config = model_files.read_config(folder, reference)
        self._packing = self._read_packing()
        files = model_files.find_weights(folder, reference, self._config, allow_pickle=False)
        opened: list[Any] = [safe_open(file, "pt") for file in files]  # maps them, reads headers
        self._files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        self._parts: dict[str, list[str]] = defaultdict(list)
        """Of each module, the tensors that its weight is made of: codes, scales, ..."""
        for name in self._files:
            module, _, last = name.rpartition(".")
            if last.startswith("weight"):
                self._parts[module].append(name)

    @property
    def activations(self) -> PerToken | None:
        """What the checkpoint does to the inputs of all that it has quantized."""
        if self._packing is None:
            return None
        ways = {_inputs(group.input_activations) for group in self._packing.config_groups.values()}
        if len(ways) != 1 or "other" in ways:
            raise self._error(
                "quantizes inputs in several ways, or otherwise than with a dynamic scale for each "
                "token; expected 8 bits per token wherever weights are quantized, or weights alone"
            )
        (way,) = ways
        return PerToken(way) if way == "w8a8" or way == "fp8" else None

    def shape(self, component: Component) -> tuple[int, ...]:
        """Of the component in the checkpoint, [out, in]."""
        self._check_architecture(component)
        activations = self.activations  # raises if they are none of ours
        module = self._module(component)
        if module is not None and self._is_packed(module):
            self._compressor(module, component)
            return self._packed_shape(module)
        if activations is not None:
            raise self._error(
                f"quantizes inputs, but has left {component.name} as it was; exclude it"
            )
        if module is not None:
            self._check_floats(f"{module}.weight")
            sizes = self._sizes(f"{module}.weight")
            return sizes[::-1] if _is_turned(component) else sizes
        if component.parameter in self._files:
            self._check_floats(component.parameter)
            self._check_stack(component)
            return component.shape
        return tuple(self._in_network(component).shape)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, in the files' order."""
        return tuple(self._files)

    @property
    def is_dense(self) -> bool:
        """Whether its weights are ordinary ones."""
        return self._packing is None

    def tensor(self, name: str) -> Tensor:
        """One tensor as the file has it."""
        return self._tensor(name)

    def dtype(self, name: str) -> str:
        """Of one tensor, as safetensors calls it: BF16, F8_E4M3, I32."""
        return str(self._files[name].get_slice(name).get_dtype())

    def place(self, component: Component) -> tuple[str, Component] | None:
        """The tensor of a dense checkpoint that holds it, and the component as it lies in there.

        None where only transformers knows how it is made of the file's tensors.
        """
        module = self._module(component)
        if module is not None:
            own = component if component.stack_index is None else _unstacked(component)
            return f"{module}.weight", own
        return (component.parameter, component) if component.parameter in self._files else None

    def settings(self, component: Component) -> QuantizationScheme:
        """How the config says that the component's codes are read, its format included."""
        module = self._module(component)
        if module is None or not self._is_packed(module):
            raise self._error(f"does not hold {component.name} in codes")
        scheme = self._compressor(module, component)[1]
        packing = self._packing
        if scheme.format is None and packing is not None:
            scheme = scheme.model_copy(update={"format": packing.format})
        return scheme

    def coded_shape(self, component: Component) -> tuple[int, ...]:
        """The component's by its codes, whatever is done to its inputs. [out, in]"""
        module = self._module(component)
        if module is None or not self._is_packed(module):
            raise self._error(f"does not hold {component.name} in codes")
        return self._packed_shape(module)

    def size_bytes(self, component: Component) -> int:
        """Codes, scales and zero points; dense weights count 16 bits at most."""
        module = self._module(component)
        if module is not None and self._is_packed(module):
            return sum(map(self._n_bytes, self._parts[module]))
        name = component.parameter if module is None else f"{module}.weight"
        return component.n_parameters * min(2, self._item_bytes(name))

    def read(self, component: Component) -> Tensor:
        """The component as floats. [out, in]"""
        module = self._module(component)
        if module is not None and self._is_packed(module):
            compressor, scheme = self._compressor(module, component)
            parts = {name.rpartition(".")[2]: self._tensor(name) for name in self._parts[module]}
            weight: Tensor = compressor.decompress(parts, scheme)["weight"]
            return weight
        if module is not None:
            matrix = self._tensor(f"{module}.weight")
            return matrix.t() if _is_turned(component) else matrix
        if component.parameter in self._files:
            stack = self._files[component.parameter].get_slice(component.parameter)
            return component_view(stack[component.stack_index], _alone(component))
        return self._in_network(component)

    # --- where it lies ---

    def _module(self, component: Component) -> str | None:
        """The name under which the matrix lies on its own; None if it does not."""
        for name in _names(component):
            if {f"{name}.weight", f"{name}.weight_packed"} & self._files.keys():
                return name
        return None

    def _is_packed(self, module: str) -> bool:
        return bool({f"{module}.weight_packed", f"{module}.weight_scale"} & self._files.keys())

    def _check_stack(self, component: Component) -> None:
        """All experts of a part, and gate and up together, must have the base's shapes."""
        sizes = self._sizes(component.parameter)
        try:
            component_view(torch.empty(sizes, device="meta"), component)
        except (ModelError, IndexError) as error:
            raise self._error(f"does not have {component.name} ({one_line(error)})") from error
        rows = sizes[2 if component.transposed else 1]
        if component.rows is not None and rows != 2 * component.shape[0]:
            raise self._error(
                f"has {rows} rows of gate and up in {component.parameter}; expected the base's "
                f"{2 * component.shape[0]}"
            )

    def _in_network(self, component: Component) -> Tensor:
        """The matrix in the network that transformers makes of the checkpoint."""
        if self._packing is not None:
            raise self._error(f"has no {component.name}; exclude it")
        network = _network(self, self._reference)
        try:
            return weight_of(network, component)
        except (ModelError, AttributeError, IndexError) as error:
            raise self._error(f"has no {component.name} ({one_line(error)}); exclude it") from error

    def _sizes(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def _check_floats(self, name: str) -> None:
        if not self.dtype(name).startswith(("F", "BF")):
            raise self._error(
                f"holds {name} as {self.dtype(name)}, without a scale; expected floating numbers"
            )

    def _item_bytes(self, name: str) -> int:
        if name not in self._files:  # transformers makes it of several
            return 2
        bits = re.search(r"\d+", self.dtype(name))
        return int(bits[0]) // 8 if bits else 2

    def _n_bytes(self, name: str) -> int:
        return prod(self._sizes(name)) * self._item_bytes(name)

    def _tensor(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def _check_architecture(self, component: Component) -> None:
        inner = self._config.get("text_config") or {}
        kinds = [self._config.get("model_type"), inner.get("model_type")]
        if component.model_type not in kinds:
            raise self._error(
                f"is of the architecture {kinds[0]!r}, and the base is {component.model_type!r}; "
                "only a version of the base can be a donor"
            )

    # --- compressed-tensors ---

    def _read_packing(self) -> QuantizationConfig | None:
        """How the weights are packed; None if they are dense."""
        found = self._config.get("quantization_config") or {}
        if not found:
            return None
        method = found.get("quant_method") if isinstance(found, dict) else found
        if method != "compressed-tensors":
            raise self._error(
                f"keeps its weights in the format {method!r}, which is not read here; expected "
                "dense or compressed-tensors weights, or a GGUF: save a dense copy (transformers: "
                "`model.dequantize()`, then `save_pretrained`)"
            )
        if found.get("transform_config"):
            raise self._error(
                "rotates its weights (transform_config), so that one of them alone means nothing; "
                "expected weights in the base's own coordinates"
            )
        try:
            return QuantizationConfig.model_validate(found)
        except (ValidationError, KeyError, ValueError) as error:
            raise self._error(
                f"has a quantization_config that the installed compressed-tensors cannot read "
                f"({one_line(error)}); upgrade it, or write the checkpoint again"
            ) from error

    def _compressor(
        self, module: str, component: Component
    ) -> tuple[type[BaseCompressor], QuantizationScheme]:
        """What can decode a packed module, and the settings it was packed with."""
        groups = {} if self._packing is None else self._packing.config_groups
        targets = {target: group for group in groups.values() for target in group.targets}
        kind = nn.Embedding if component.kind == "embedding" else nn.Linear
        matches = match_targets(module, kind(1, 1, device="meta"), targets)
        if self._packing is None or not matches:
            raise self._error(
                f"holds {component.name} in codes, and no group of a quantization_config in its "
                "config.json says how; write the checkpoint again"
            )
        scheme = targets[matches[0]]
        named = (scheme.format, self._packing.format)
        layouts = [str(getattr(name, "value", name)) for name in named if name is not None]
        layouts = [name for name in layouts if name not in ("mixed-precision", "fakequant")]
        layout = layouts[0] if layouts else infer_module_format(nn.Linear, scheme).value
        if layout == "dense":
            raise self._error(
                f"holds {component.name} before it was quantized (format 'dense'); expected its "
                "codes: save the checkpoint compressed"
            )
        try:
            return BaseCompressor.get_value_from_registry(layout), scheme
        except KeyError as error:
            raise self._error(
                f"holds {component.name} in the format {layout!r}, which the installed "
                "compressed-tensors does not read; write the checkpoint again"
            ) from error

    def _packed_shape(self, module: str) -> tuple[int, ...]:
        if f"{module}.weight_shape" in self._files:
            return tuple(self._tensor(f"{module}.weight_shape").tolist())
        if f"{module}.weight_packed" in self._files:
            n_out, n_bytes = self._sizes(f"{module}.weight_packed")
            return n_out, 2 * n_bytes  # 4-bit floats
        return self._sizes(f"{module}.weight")

    def _error(self, problem: str) -> SchemeError:
        return SchemeError(f"the donor {self._reference} {problem}")


def _names(component: Component) -> Iterator[str]:
    """What checkpoints call a module: as the network does, without its prefix, as Mixtral does."""
    yield component.name
    yield component.name.partition(".")[2]
    start, mark, rest = component.name.partition(".mlp.experts.")
    expert, _, part = rest.partition(".")
    if mark and part in _MIXTRAL:
        yield f"{start}.block_sparse_moe.experts.{expert}.{_MIXTRAL[part]}"


def _is_turned(component: Component) -> bool:
    """Whether a file has the component as [in, out]; single experts are always [out, in] there."""
    return component.transposed and component.stack_index is None


def _unstacked(component: Component) -> Component:
    """An expert in a file of its own: [out, in], whatever the stack has."""
    return replace(component, stack_index=None, transposed=False, rows=None)


def _alone(component: Component) -> Component:
    return replace(component, stack_index=None)


def _inputs(args: QuantizationArgs | None) -> Literal["w8a8", "fp8", "other"] | None:
    """The name of our scheme that does the same to the inputs; None if nothing is done."""
    if args is None:
        return None
    settings = (args.num_bits, args.strategy, args.dynamic, args.symmetric)
    if settings != (8, "token", True, True):
        return "other"
    return "w8a8" if args.type == "int" else "fp8"


@lru_cache(maxsize=1)
def _network(_owner: CheckpointWeights, reference: str) -> PreTrainedModel:
    """A donor's network on the CPU; only that of the last owner is kept, for it may be large."""
    try:
        return load_model(reference, device="cpu").network
    except ModelError as error:
        raise SchemeError(f"the donor cannot be loaded: {error}") from error
