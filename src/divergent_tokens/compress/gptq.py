"""GPTQ (Frantar et al. 2022) by llm-compressor: codes that make up for each other's rounding.

Each matrix is rounded by itself, on the inputs that the base gives it, so that one may be taken
without the others; the layers before it are not compressed meanwhile, as they are elsewhere.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from divergent_tokens.compress.absmax import AbsMax, parse_absmax
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.kept import Entry, Kept, Seen, check_own_inputs, read_made
from divergent_tokens.compress.packed import Packed, pack_integers
from divergent_tokens.compress.quantize import Quantized, dequantize, scale_dtype
from divergent_tokens.errors import SchemeError


@dataclass(frozen=True)
class Gptq:
    """`gptq:int4:g64`: integer codes by channel or group, on llm-compressor's grid.

    Its symmetric grid has 2^B codes and the scale max|w| / (2^(B−1) − ½), one more than AbsMax.
    """

    grid: AbsMax
    """Bits, granularity and symmetry."""
    kept: Kept | None = field(default=None, compare=False, repr=False)
    """Where the codes are, once they were made."""

    def __str__(self) -> str:
        """The text."""
        return f"gptq:{self.grid}"

    def check(self, components: Sequence[Component]) -> None:
        """Refuse what the grid does not fit, and what has no inputs of its own."""
        self.grid.check(components)
        check_own_inputs(self, components, str(self.grid))

    @property
    def by_rows(self) -> bool:
        """False: which matrix it is decides what comes out."""
        return False

    @property
    def activations(self) -> None:
        """Nothing is done to the inputs."""

    @property
    def source(self) -> str | None:
        """What was calibrated on."""
        return None if self.kept is None else self.kept.calibration

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix that the codes stand for."""
        return dequantize(self._read(component)).to(weight)

    def packed(self, weight: Tensor, component: Component) -> Packed:
        """The codes, packed without gaps, and the scales."""
        return pack_integers(self._read(component))

    def size_bytes(self, component: Component, size_before: int) -> int:
        """As AbsMax of the same bits and groups."""
        return self.grid.size_bytes(component, size_before)

    @property
    def made_from(self) -> Seen:
        """Second moments of the inputs."""
        return "moments"

    def bound(self, kept: Kept) -> "Gptq":
        """The same, its codes at hand."""
        return replace(self, kept=kept)

    def check_installed(self) -> None:
        """Raise SchemeError without llm-compressor."""
        check_llm_compressor("gptq:", "intB")

    def make(self, weight: Tensor, seen: Tensor) -> Entry:
        """Codes, scales and zero points."""
        return entry_of(round_by_gptq(weight, seen, self.grid))

    def _read(self, component: Component) -> Quantized:
        entry = read_made(self, component, "the codes")
        return Quantized(
            codes=entry.arrays["codes"],
            scales=entry.arrays["scales"].to(scale_dtype(component.dtype)),
            zero_points=entry.arrays.get("zero_points"),
            bits=int(entry.header["bits"]),
            dtype=component.dtype,
        )


def parse_gptq(text: str) -> Gptq:
    """What a text such as `gptq:int4:g64` says. Raises SchemeError for what is not known."""
    rest = text.partition(":")[2]
    if not rest.startswith("int"):
        raise SchemeError(f"{text!r} says no grid; expected one as in 'gptq:int4:g64'")
    grid = parse_absmax(rest)
    if grid.granularity == "tensor":
        raise SchemeError(f"{text!r}: GPTQ rounds by channel or group; leave out ':tensor'")
    return Gptq(grid)


def entry_of(quantized: Quantized) -> Entry:
    """What is kept of codes: they, scales in float32 and zero points."""
    arrays = {"codes": quantized.codes, "scales": quantized.scales.float()}
    if quantized.zero_points is not None:
        arrays["zero_points"] = quantized.zero_points
    return Entry(arrays, {"bits": quantized.bits})


def check_llm_compressor(family: str, instead: str) -> None:
    """Raise SchemeError where llm-compressor is not installed."""
    if find_spec("llmcompressor") is None:
        raise SchemeError(
            f"{family} is computed by llm-compressor, which is not installed; pip install "
            "llmcompressor (or divergent-tokens[llmcompressor]) in an environment of its own, "
            f"since it holds transformers back, or take {instead}"
        )


@torch.no_grad()
def round_by_gptq(weight: Tensor, moment: Tensor, grid: AbsMax) -> Quantized:
    """Codes of a [out, in] matrix for inputs with the second moment Σ x xᵀ [in, in].

    A column without inputs is rounded to nearest, where llm-compressor would make it zero: text
    that was not calibrated on may use it. 1 % of the mean diagonal is added to all; where that is
    not enough to invert the moment, the whole matrix is rounded to nearest, as by llm-compressor.
    """
    with redirect_stdout(sys.stderr):  # where it logs to is settled when it is first imported
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    args = _arguments(grid)
    values = weight.float()
    groups = values.reshape(len(values), -1, args.group_size or values.shape[1])
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scales = scales.to(scale_dtype(weight.dtype)).float()
    moment = moment.float().clone()
    moment.diagonal()[moment.diagonal() == 0] = 1.0
    rounded = quantize_weight(
        values[None].clone(), moment[None], scales[None], zeros[None], None, args
    )[0][0]
    steps = rounded.reshape(groups.shape) / scales[..., None] + zeros[..., None].float()
    return Quantized(
        codes=steps.round().to(torch.int8).reshape(values.shape),
        scales=scales.to(scale_dtype(weight.dtype)),
        zero_points=None if grid.symmetric else zeros.to(torch.int8),
        bits=grid.bits,
        dtype=weight.dtype,
    )


def round_to_nearest(weight: Tensor, grid: AbsMax) -> Quantized:
    """The same grid without GPTQ: what the inputs' moment is worth."""
    n_in = weight.shape[1]
    none = torch.zeros(n_in, n_in, device=weight.device)
    return round_by_gptq(weight, none.fill_diagonal_(1.0), grid)


def _arguments(grid: AbsMax) -> QuantizationArgs:
    group = grid.granularity if isinstance(grid.granularity, int) else None
    return QuantizationArgs(
        num_bits=grid.bits,
        type="int",
        symmetric=grid.symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
        actorder="static",  # its modifier's default: columns with large inputs are rounded first
    )
