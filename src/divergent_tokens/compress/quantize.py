"""Round to nearest on a grid scaled by the largest weight (AbsMax); tensor in, codes out."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["tensor", "channel"] | int
"""Which weights share a scale: all, an output channel's, or so many neighbours along `in`."""


@dataclass(frozen=True)
class Quantized:
    """A matrix as codes on a grid: weight ≈ (code − zero point) · scale, groups along `in`."""

    codes: Tensor
    """int8 [out, in], from −(2^(B−1) − 1), or −2^(B−1) if asymmetric, to 2^(B−1) − 1."""
    scales: Tensor
    """[1, 1] per tensor, [out, 1] per channel, [out, group] per group; in their stored dtype."""
    zero_points: Tensor | None
    """int8, one a scale, the code of the weight 0; None if symmetric, where it is 0."""
    bits: int
    dtype: torch.dtype
    """Of the weight that was quantized, and of the one that comes back."""


def quantize(
    weight: Tensor, *, bits: int, granularity: Granularity = "channel", symmetric: bool = True
) -> Quantized:
    """The nearest codes of a [out, in] matrix of any floating dtype; computed in float32.

    Symmetric (the paper's AbsMax): scale = max|w| / (2^(B−1) − 1), so that zero and the largest
    weight are on the grid and pruned weights stay zero. Asymmetric: 2^B − 1 steps from min(w, 0)
    to max(w, 0), the zero point rounded to a code, so that zero is on the grid here too. The scale
    is rounded to the dtype that it is stored in before the codes are made: what is measured is
    what a file would hold. A group of zeros has scale 1.

    The caller sees to it that bits lie in 2..8, the weights are finite, and a group size divides
    `in`; `schemes` refuses anything else by name.
    """
    groups = _grouped(weight.float(), granularity)  # [row, group, in group]
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        scales = _stored(groups.abs().amax(-1) / largest, weight.dtype)
        codes = (groups / scales.float()[..., None]).round().clamp(-largest, largest)
        zero_points = None
    else:
        lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = _stored((high - low) / (highest - lowest), weight.dtype)
        zeros = (lowest - (low / scales.float()).round()).clamp(lowest, highest)
        codes = groups / scales.float()[..., None] + zeros[..., None]
        codes = codes.round().clamp(lowest, highest)
        zero_points = zeros.to(torch.int8)
    return Quantized(
        codes.to(torch.int8).reshape(weight.shape), scales, zero_points, bits, weight.dtype
    )


def dequantize(quantized: Quantized) -> Tensor:
    """The [out, in] matrix that the codes stand for, in the dtype of the original.

    Products are exact in float32 for scales of 16 bits, and rounded once to that dtype.
    """
    rows, n_groups = quantized.scales.shape
    codes = quantized.codes.reshape(rows, n_groups, -1).float()  # [row, group, in group]
    if quantized.zero_points is not None:
        codes = codes - quantized.zero_points.float()[..., None]
    weight = codes * quantized.scales.float()[..., None]
    return weight.to(quantized.dtype).reshape(quantized.codes.shape)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the scales of a weight of this dtype are stored in: its own, if that is made for it."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def _grouped(weight: Tensor, granularity: Granularity) -> Tensor:
    """[out, in] -> [row, group, in group], where each [row, group] has a scale."""
    n_out, n_in = weight.shape
    if granularity == "tensor":
        return weight.reshape(1, 1, -1)
    if granularity == "channel":
        return weight.reshape(n_out, 1, n_in)
    return weight.reshape(n_out, -1, granularity)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    scales = scales.to(scale_dtype(dtype))
    # Zero if all weights are, or too small for the dtype: their codes are then zero at any scale.
    return torch.where(scales == 0, torch.ones_like(scales), scales)
