"""Formats that servers compute in, and inputs of 8 bits, by compressed-tensors' arithmetic.

What is measured here is what a checkpoint in that format gives when it is loaded again, so every
scale and rounding is made by that library's own functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    fake_quantize,
    preset_name_to_scheme,
)
from compressed_tensors.quantization import quantize as quantize_by
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from torch import Tensor

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.packed import Packed, pack_bytes, pack_fp4
from divergent_tokens.compress.quantize import dequantize, quantize, scale_dtype
from divergent_tokens.compress.straight_through import straight_through
from divergent_tokens.errors import SchemeError

_PRESETS = {"w8a8": "W8A8", "fp8": "FP8_DYNAMIC", "mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}
"""Our names, and those of compressed-tensors' settings for them."""


@dataclass(frozen=True)
class PerToken:
    """Inputs rounded to 8 bits each time, every token on a scale of its own."""

    format: Literal["w8a8", "fp8"]
    """`w8a8`: integers, scale absmax / 127.5; `fp8`: E4M3, scale absmax / 448."""

    def quantize(self, x: Tensor) -> Tensor:
        """The inputs [..., in] as their codes stand for, in the same shape and dtype.

        Gradients pass as if nothing had been rounded.
        """
        args = _settings(self.format, "input_activations")

        def rounded(tokens: Tensor) -> Tensor:
            tokens = tokens[None]  # their axes of a token are the first two
            scales, zero_points = compute_dynamic_scales_and_zp(tokens, args, torch.nn.Identity())
            found: Tensor = fake_quantize(tokens, scales, zero_points, args)
            return found

        return straight_through(x, rounded)


@dataclass(frozen=True)
class W8A8:
    """`w8a8`: AbsMax int8 weights per output channel, int8 inputs per token."""

    def __str__(self) -> str:
        """The text."""
        return "w8a8"

    def check(self, components: Sequence[Component]) -> None:
        """Fits every matrix."""

    @property
    def by_rows(self) -> bool:
        """True: a scale a row."""
        return True

    @property
    def activations(self) -> PerToken:
        """Integers per token."""
        return PerToken("w8a8")

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix after coding and decoding."""
        return dequantize(quantize(weight, bits=8))

    def packed(self, weight: Tensor, component: Component) -> Packed:
        """The codes as they are, and the scales."""
        quantized = quantize(weight, bits=8)
        args = (_settings("w8a8", "weights"), _settings("w8a8", "input_activations"))
        return pack_bytes(quantized.codes, quantized.scales, "int-quantized", *args)

    def size_bytes(self, component: Component, size_before: int) -> int:
        """A byte a weight, and a scale an output channel."""
        return _channel_bytes(component)


@dataclass(frozen=True)
class Fp8:
    """`fp8`: E4M3 weights with a scale for each output channel, E4M3 inputs per token."""

    def __str__(self) -> str:
        """The text."""
        return "fp8"

    def check(self, components: Sequence[Component]) -> None:
        """Fits every matrix."""

    @property
    def by_rows(self) -> bool:
        """True: a scale a row."""
        return True

    @property
    def activations(self) -> PerToken:
        """E4M3 per token."""
        return PerToken("fp8")

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix after coding and decoding."""
        return _scaled(weight, _settings("fp8", "weights")).decoded.to(weight.dtype)

    def packed(self, weight: Tensor, component: Component) -> Packed:
        """The codes as they are, and the scales."""
        scaled = _scaled(weight, _settings("fp8", "weights"))
        args = (scaled.args, _settings("fp8", "input_activations"))
        return pack_bytes(
            scaled.codes(torch.float8_e4m3fn), scaled.scales, "float-quantized", *args
        )

    def size_bytes(self, component: Component, size_before: int) -> int:
        """A byte a weight, and a scale an output channel."""
        return _channel_bytes(component)


@dataclass(frozen=True)
class Fp4:
    """`mxfp4` or `nvfp4`: E2M1 weights in small groups along `in`; inputs stay as they are."""

    format: Literal["mxfp4", "nvfp4"]
    """`mxfp4`: groups of 32, scales are powers of two; `nvfp4`: groups of 16, E4M3 scales under one
    scale for the whole matrix."""

    def __str__(self) -> str:
        """The text."""
        return self.format

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return 32 if self.format == "mxfp4" else 16

    def check(self, components: Sequence[Component]) -> None:
        """Refuse a component whose `in` the groups do not divide."""
        unfit = [c for c in components if c.shape[1] % self.group]
        if unfit:
            raise SchemeError(
                f"{self}: its groups of {self.group} do not divide the {unfit[0].shape[1]} input "
                f"columns of {unfit[0].name} ({len(unfit)} of {len(components)} components do not "
                "fit); exclude them, or take intB:gN with a group size that fits"
            )

    @property
    def by_rows(self) -> bool:
        """Whether the matrix has no scale of its own."""
        return self.format == "mxfp4"

    @property
    def activations(self) -> None:
        """Nothing is done to the inputs."""

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix after coding and decoding."""
        return _scaled(weight, _settings(self.format, "weights")).decoded.to(weight.dtype)

    def packed(self, weight: Tensor, component: Component) -> Packed:
        """Two codes a byte, and the scales: exponents, or E4M3 under one float32."""
        scaled = _scaled(weight, _settings(self.format, "weights"))
        tensors = {"weight_packed": pack_fp4_to_uint8(scaled.codes(None))}
        if scaled.whole is None:
            tensors["weight_scale"] = compress_mx_scale(scaled.scales, torch.uint8)
        else:
            tensors["weight_scale"] = scaled.scales.to(torch.float8_e4m3fn)
            tensors["weight_global_scale"] = scaled.whole
        return pack_fp4(tensors, f"{self.format}-pack-quantized", scaled.args)

    def size_bytes(self, component: Component, size_before: int) -> int:
        """Half a byte a weight, a byte a group, and nvfp4's float32 for the whole."""
        codes = component.n_parameters // 2
        whole = 4 if self.format == "nvfp4" else 0
        return codes + component.n_parameters // self.group + whole


def _channel_bytes(component: Component) -> int:
    return component.n_parameters + component.shape[0] * scale_dtype(component.dtype).itemsize


@cache
def _settings(name: str, part: Literal["weights", "input_activations"]) -> QuantizationArgs:
    settings: QuantizationArgs = getattr(preset_name_to_scheme(_PRESETS[name], []), part)
    return settings


@dataclass(frozen=True)
class _Scaled:
    """A matrix with the scales that compressed-tensors gives it by its largest weights."""

    values: Tensor
    """[out, in]"""
    scales: Tensor
    """[out, group]; one group a channel"""
    zero_points: Tensor
    whole: Tensor | None
    """nvfp4's scale of all scales."""
    args: QuantizationArgs

    @property
    def decoded(self) -> Tensor:
        """The values after quantizing. [out, in]"""
        found: Tensor = fake_quantize(
            self.values, self.scales, self.zero_points, self.args, global_scale=self.whole
        )
        return found

    def codes(self, dtype: torch.dtype | None) -> Tensor:
        """What stands for the values. [out, in]"""
        found: Tensor = quantize_by(
            self.values,
            self.scales,
            self.zero_points,
            self.args,
            dtype=dtype,
            global_scale=self.whole,
        )
        return found


@torch.no_grad()
def _scaled(weight: Tensor, args: QuantizationArgs) -> _Scaled:
    values = weight.to(scale_dtype(weight.dtype))
    size = args.group_size or weight.shape[1]
    groups = values.reshape(len(weight), -1, size)
    low, high = groups.amin(-1), groups.amax(-1)  # [out, group]; one group a channel
    whole = generate_gparam(low.amin(), high.amax()) if args.strategy == "tensor_group" else None
    scales, zero_points = calculate_qparams(low, high, args, global_scale=whole)
    return _Scaled(values, scales, zero_points, whole, args)
