"""One weight matrix as a compressed-tensors checkpoint holds it: codes, scales, how to read them.

The codes are those that were measured. The library's own compressors make them again from dense
weights, with other roundings in bfloat16; here they are only laid out as it lays them out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from divergent_tokens.compress.quantize import Quantized


@dataclass(frozen=True)
class Packed:
    """What the checkpoint has of one module instead of its weight."""

    tensors: Mapping[str, Tensor]
    """By the last part of their names: weight_packed, weight_scale, ..."""
    settings: QuantizationScheme
    """How they are read, its format included; the modules it is for are not named."""

    @property
    def format(self) -> str:
        """compressed-tensors' name for the layout."""
        return str(getattr(self.settings.format, "value", self.settings.format))

    @property
    def n_bytes(self) -> int:
        """Of all tensors together."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())


def pack_integers(quantized: Quantized) -> Packed:
    """Integer codes of 2 to 8 bits, packed without gaps; inputs stay as they are.

    One scale for the whole matrix is written as one a channel, all alike: servers fuse matrices
    and know no scale for a part of one.
    """
    n_out = len(quantized.codes)
    scales = quantized.scales.expand(n_out, -1).contiguous()
    n_groups = scales.shape[1]
    args = QuantizationArgs(
        num_bits=quantized.bits,
        type="int",
        symmetric=quantized.zero_points is None,
        strategy="channel" if n_groups == 1 else "group",
        group_size=None if n_groups == 1 else quantized.codes.shape[1] // n_groups,
    )
    tensors = {
        "weight_packed": pack_to_int32(quantized.codes, quantized.bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(quantized.codes.shape),
    }
    if quantized.zero_points is not None:
        zeros = quantized.zero_points.expand(n_out, -1).contiguous()
        packed = pack_to_int32(zeros, quantized.bits, packed_dim=0)
        tensors["weight_zero_point"] = packed.contiguous()
    return Packed(tensors, _settings("pack-quantized", args))


def pack_bytes(
    codes: Tensor, scales: Tensor, format: str, weights: QuantizationArgs, inputs: QuantizationArgs
) -> Packed:
    """Codes of a byte, int8 or E4M3, and a scale for each output channel."""
    tensors = {"weight": codes, "weight_scale": scales}
    return Packed(tensors, _settings(format, weights, inputs))


def pack_fp4(tensors: Mapping[str, Tensor], format: str, weights: QuantizationArgs) -> Packed:
    """Codes of E2M1, two a byte, and the scales that the format has."""
    return Packed(tensors, _settings(format, weights))


def _settings(
    format: str, weights: QuantizationArgs, inputs: QuantizationArgs | None = None
) -> QuantizationScheme:
    return QuantizationScheme(targets=[], weights=weights, input_activations=inputs, format=format)


def quantization_config(modules: Mapping[str, Packed], dense: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a config.json, for packed modules and those left dense.

    Modules of the same settings are one group. A group names its modules one by one, since the
    names of classes mean other modules in a server, which fuses them. Only the experts of a layer
    are one pattern: transformers looks for one that speaks of experts.
    """
    groups: dict[str, tuple[QuantizationScheme, list[str]]] = {}
    for name, packed in modules.items():
        key = packed.settings.model_dump_json()
        groups.setdefault(key, (packed.settings, []))[1].append(name)
    formats = {packed.format for packed in modules.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": _targets(dense),
        "config_groups": {
            f"group_{i}": {**settings.model_dump(mode="json"), "targets": _targets(names)}
            for i, (settings, names) in enumerate(groups.values())
        },
    }


def _targets(names: Iterable[str]) -> list[str]:
    """The names, those of experts as a pattern for each layer."""
    found: dict[str, None] = {}
    for name in names:
        stack, mark, _ = name.partition(".experts.")
        found[f"re:{re.escape(stack + mark)}.*" if mark else name] = None
    return list(found)
