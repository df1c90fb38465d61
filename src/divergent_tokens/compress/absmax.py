"""AbsMax: round to nearest on a grid that the largest weight sets."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.packed import Packed, pack_integers
from divergent_tokens.compress.quantize import (
    Granularity,
    Quantized,
    dequantize,
    quantize,
    scale_dtype,
)
from divergent_tokens.errors import SchemeError


@dataclass(frozen=True)
class AbsMax:
    """`int4:g64:asym`: integer codes and a scale for each tensor, output channel or group."""

    bits: int
    granularity: Granularity = "channel"
    symmetric: bool = True

    def __str__(self) -> str:
        """The canonical text: granularity before symmetry, defaults left out."""
        words = [f"int{self.bits}"]
        if self.granularity == "tensor":
            words.append("tensor")
        elif self.granularity != "channel":
            words.append(f"g{self.granularity}")
        return ":".join(words if self.symmetric else [*words, "asym"])

    def check(self, components: Sequence[Component]) -> None:
        """Refuse a group size that does not divide the `in` of every component."""
        if not isinstance(self.granularity, int):
            return
        unfit = [c for c in components if c.shape[1] % self.granularity]
        if unfit:
            fitting = _fitting_groups(self.granularity, components)
            raise SchemeError(
                f"{self}: groups of {self.granularity} do not divide the {unfit[0].shape[1]} input "
                f"columns of {unfit[0].name} ({len(unfit)} of {len(components)} components do not "
                f"fit). Group sizes that fit all: {fitting or 'none from 8 up'}; or exclude "
                "components"
            )

    @property
    def by_rows(self) -> bool:
        """True unless all rows share a scale."""
        return self.granularity != "tensor"

    @property
    def activations(self) -> None:
        """Nothing is done to the inputs."""

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix after coding and decoding."""
        return dequantize(self._quantized(weight))

    def packed(self, weight: Tensor, component: Component) -> Packed:
        """The codes, packed without gaps, and the scales."""
        return pack_integers(self._quantized(weight))

    def _quantized(self, weight: Tensor) -> Quantized:
        return quantize(
            weight, bits=self.bits, granularity=self.granularity, symmetric=self.symmetric
        )

    def size_bytes(self, component: Component, size_before: int) -> int:
        """B bits a code and a zero point, packed without gaps, and the scales in their dtype."""
        n_out, n_in = component.shape
        if self.granularity == "tensor":
            n_scales = 1
        elif self.granularity == "channel":
            n_scales = n_out
        else:
            n_scales = n_out * (n_in // self.granularity)
        n_zero_points = 0 if self.symmetric else n_scales
        return (
            math.ceil(n_out * n_in * self.bits / 8)
            + math.ceil(n_zero_points * self.bits / 8)
            + n_scales * scale_dtype(component.dtype).itemsize
        )


def _fitting_groups(wanted: int, components: Sequence[Component]) -> str:
    """Up to eight group sizes that divide every `in`, those nearest to the one that was wanted."""
    common = math.gcd(*(component.shape[1] for component in components))
    sizes = [size for size in range(8, common + 1) if common % size == 0]
    nearest = sorted(sizes, key=lambda size: abs(math.log(size / wanted)))[:8]
    return ", ".join(str(size) for size in sorted(nearest))


def parse_absmax(text: str) -> AbsMax:
    """What a text such as `int4:g64:asym` says. Raises SchemeError for what is not known."""
    head, *words = text.split(":")
    bits = int(head.removeprefix("int"))
    if not 2 <= bits <= 8:
        raise SchemeError(f"{text!r} asks for {bits} bits; AbsMax takes 2 to 8, as int2 ... int8")
    granularity: Granularity | None = None
    symmetric = True
    for word in words:
        group = re.fullmatch(r"g([1-9]\d*)", word)
        if word == "asym" and symmetric:
            symmetric = False
        elif (word == "tensor" or group) and granularity is None:
            granularity = int(group[1]) if group else "tensor"
        else:
            raise SchemeError(
                f"{text!r}: {word!r} is not known here, or says something a second time; after "
                f"{head!r} may come ':tensor' or a group size such as ':g64', then ':asym'"
            )
    return AbsMax(bits, "channel" if granularity is None else granularity, symmetric)
