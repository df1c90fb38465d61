"""GPTQ (Frantar et al. 2022) by llm-compressor: codes that make up for each other's rounding.

Each matrix is rounded by itself, on the inputs that the base gives it, so that one may be taken
without the others; the layers before it are not compressed meanwhile, as they are elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from divergent_tokens.compress.absmax import AbsMax, parse_absmax
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.packed import Packed, pack_integers
from divergent_tokens.compress.quantize import Quantized, dequantize, scale_dtype
from divergent_tokens.errors import SchemeError
from divergent_tokens.store import content_key, read_entry, writing_entry

_VERSION = 1
"""Of how codes are made and kept."""


@dataclass(frozen=True)
class Codes:
    """Where the codes of one base, rounded on one calibration, lie."""

    cache: Path
    base: str
    """The base's fingerprint."""
    calibration: str
    """The digest of what was calibrated on."""

    def has(self, scheme: str, component: Component) -> bool:
        """Whether a component's codes were made."""
        return read_entry(self.cache, self._key(scheme, component)) is not None

    def read(self, scheme: str, component: Component) -> Quantized | None:
        """A component's codes; None if they were not made yet."""
        entry = read_entry(self.cache, self._key(scheme, component))
        if entry is None:
            return None
        arrays = {name: torch.from_numpy(np.array(a)) for name, a in entry.arrays.items()}
        return Quantized(
            codes=arrays["codes"],
            scales=arrays["scales"].to(scale_dtype(component.dtype)),
            zero_points=arrays.get("zero_points"),
            bits=int(entry.header["bits"]),
            dtype=component.dtype,
        )

    def write(self, scheme: str, component: Component, quantized: Quantized) -> None:
        """Keep a component's codes."""
        arrays = {"codes": quantized.codes, "scales": quantized.scales.float()}
        if quantized.zero_points is not None:
            arrays["zero_points"] = quantized.zero_points
        with writing_entry(self.cache, self._key(scheme, component)) as writer:
            writer.header["bits"] = quantized.bits
            for name, tensor in arrays.items():
                values = tensor.cpu().numpy()
                writer.array(name, values.shape, values.dtype)[:] = values

    def _key(self, scheme: str, component: Component) -> str:
        return content_key(
            gptq=_VERSION,
            base=self.base,
            calibration=self.calibration,
            scheme=scheme,
            component=component.name,
            dtype=str(component.dtype),
        )


@dataclass(frozen=True)
class Gptq:
    """`gptq:int4:g64`: integer codes by channel or group, on llm-compressor's grid.

    Its symmetric grid has 2^B codes and the scale max|w| / (2^(B−1) − ½), one more than AbsMax.
    """

    grid: AbsMax
    """Bits, granularity and symmetry."""
    codes: Codes | None = field(default=None, compare=False, repr=False)
    """Where they are, once they were made."""

    def __str__(self) -> str:
        """The text."""
        return f"gptq:{self.grid}"

    def check(self, components: Sequence[Component]) -> None:
        """Refuse what the grid does not fit, and what has no inputs of its own."""
        self.grid.check(components)
        for component in components:
            if component.is_end or component.stack_index is not None:
                what = "looked up or shared" if component.is_end else "an expert of a fused stack"
                raise SchemeError(
                    f"{self}: {component.name} is {what}, and its inputs are not collected here; "
                    f"exclude it, or take {self.grid}"
                )

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
        return None if self.codes is None else self.codes.calibration

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix that the codes stand for."""
        return dequantize(self._read(component)).to(weight)

    def packed(self, weight: Tensor, component: Component) -> Packed:
        """The codes, packed without gaps, and the scales."""
        return pack_integers(self._read(component))

    def size_bytes(self, component: Component, size_before: int) -> int:
        """As AbsMax of the same bits and groups."""
        return self.grid.size_bytes(component, size_before)

    def _read(self, component: Component) -> Quantized:
        found = None if self.codes is None else self.codes.read(str(self), component)
        if found is None:
            raise SchemeError(
                f"the codes of {component.name} under {self} were not made; they are made from "
                "the base's inputs, by dtm sweep, say, with the same --calibration and --cache"
            )
        return found


def parse_gptq(text: str) -> Gptq:
    """What a text such as `gptq:int4:g64` says. Raises SchemeError for what is not known."""
    rest = text.partition(":")[2]
    if not rest.startswith("int"):
        raise SchemeError(f"{text!r} says no grid; expected one as in 'gptq:int4:g64'")
    grid = parse_absmax(rest)
    if grid.granularity == "tensor":
        raise SchemeError(f"{text!r}: GPTQ rounds by channel or group; leave out ':tensor'")
    return Gptq(grid)


def check_installed() -> None:
    """Raise SchemeError where llm-compressor is not installed."""
    if find_spec("llmcompressor") is None:
        raise SchemeError(
            "gptq: is computed by llm-compressor, which is not installed; pip install "
            "llmcompressor (or divergent-tokens[llmcompressor]) in an environment of its own, "
            "since it holds transformers back, or take intB"
        )


@torch.no_grad()
def round_by_gptq(weight: Tensor, moment: Tensor, grid: AbsMax) -> Quantized:
    """Codes of a [out, in] matrix for inputs with the second moment Σ x xᵀ [in, in].

    A column without inputs is rounded to nearest, where llm-compressor would make it zero: text
    that was not calibrated on may use it. 1 % of the mean diagonal is added to all; where that is
    not enough to invert the moment, the whole matrix is rounded to nearest, as by llm-compressor.
    """
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
