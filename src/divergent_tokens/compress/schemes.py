"""What can be done to a component, read from a line of text and printed as one.

A scheme is a chain of steps, `magnitude:0.5+int4:g64`. Each kind of step is a family that reads
its own text; no family knows another. To add one, write its step and put it in `_FAMILIES`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Protocol

import torch
from torch import Tensor

from divergent_tokens.compress.absmax import parse_absmax
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.donors import Donor
from divergent_tokens.compress.formats import W8A8, Fp4, Fp8
from divergent_tokens.compress.gptq import parse_gptq
from divergent_tokens.compress.kept import Kept, Made
from divergent_tokens.compress.llm_int8 import LlmInt8
from divergent_tokens.compress.masked import parse_masked
from divergent_tokens.compress.packed import Packed
from divergent_tokens.compress.prune import (
    check_pattern,
    n_of_m_mask,
    parse_extent,
    prune_magnitude,
)
from divergent_tokens.compress.sparsegpt import parse_sparsegpt
from divergent_tokens.errors import SchemeError


class Activations(Protocol):
    """What is done to a component's inputs each time that it runs; equal ones do the same."""

    def quantize(self, x: Tensor) -> Tensor:
        """The inputs [..., in] as the quantized ones stand for, in the same shape and dtype."""

    def __hash__(self) -> int:
        """Those that are equal are computed once."""


class Step(Protocol):
    """One thing that is done to a weight matrix. `str(step)` is the text it is read from."""

    @property
    def by_rows(self) -> bool:
        """Whether each output row comes out as if it were alone: rows may be handed in together."""

    @property
    def activations(self) -> Activations | None:
        """What is done to the component's inputs; None if nothing."""

    def check(self, components: Sequence[Component]) -> None:
        """Raise SchemeError, naming a component, if the step does not fit one of them."""

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """A new dense [out, in] matrix of the same dtype; `weight` is left alone."""

    def size_bytes(self, component: Component, size_before: int) -> int:
        """What the component takes on disk after this step, if it took `size_before`."""


@dataclass(frozen=True)
class Scheme:
    """Steps that are taken one after the other."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        """The text that `parse_scheme` reads."""
        return "+".join(str(step) for step in self.steps)

    def check(self, components: Sequence[Component]) -> None:
        """Raise SchemeError, naming a component, if the scheme does not fit one of them."""
        for step in self.steps:
            step.check(components)
        embeddings = [c.name for c in components if c.kind == "embedding"]
        if embeddings and self.activations is not None:
            raise SchemeError(
                f"{self} quantizes what goes into a product, and {embeddings[0]} looks rows up by "
                "token; exclude it, or take a scheme of weights only, such as int8"
            )

    @property
    def by_rows(self) -> bool:
        """Whether each output row comes out as if it were alone."""
        return all(step.by_rows for step in self.steps)

    @property
    def activations(self) -> Activations | None:
        """What is done to the component's inputs; `parse_scheme` sees to it that one step says."""
        found = [step.activations for step in self.steps if step.activations is not None]
        return found[0] if found else None

    @property
    def source(self) -> str | None:
        """A digest of what besides its text decides what comes out; None if nothing does.

        A step may have one as its `source`: the files that it reads, say.
        """
        found = [getattr(step, "source", None) for step in self.steps]
        return " ".join(filter(None, found)) or None

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The dense [out, in] matrix that comes out, in the same dtype; `weight` is left alone."""
        for step in self.steps:
            weight = step.compress(weight, component)
        return weight

    @property
    def made(self) -> tuple[Made, ...]:
        """The steps that must be made from what the base does on a text."""
        return tuple(step for step in self.steps if isinstance(step, Made))

    @property
    def is_calibrated(self) -> bool:
        """Whether a text decides what comes out."""
        return bool(self.made)

    @property
    def is_ready(self) -> bool:
        """Whether all that must be made is at hand."""
        return all(step.kept is not None for step in self.made)

    def bound(self, kept: Kept) -> "Scheme":
        """The same scheme with what it needs made at hand; itself if it needs nothing."""
        if not self.made:
            return self
        steps = (step.bound(kept) if isinstance(step, Made) else step for step in self.steps)
        return Scheme(tuple(steps))

    @property
    def is_packable(self) -> bool:
        """Whether a compressed-tensors checkpoint can hold what comes out in codes."""
        return hasattr(self.steps[-1], "packed")

    def packed(self, weight: Tensor, component: Component) -> Packed:
        """What comes out in codes: read from a checkpoint it is `compress` to the bit.

        Raises SchemeError, naming the component, if the last step leaves no codes.
        """
        *before, last = self.steps
        if not self.is_packable:
            raise SchemeError(
                f"{component.name}: {self} leaves no codes that a compressed-tensors checkpoint "
                "could hold; write it dense (--dense), or plan a scheme that does, such as int8 or "
                "int4:g64"
            )
        for step in before:
            weight = step.compress(weight, component)
        found: Packed = last.packed(weight, component)  # type: ignore[attr-defined]
        return found

    def size_bytes(self, component: Component) -> int:
        """What the component takes on disk: codes, scales and zero points, or dense weights."""
        size = component.base_size_bytes
        for step in self.steps:
            size = step.size_bytes(component, size)
        return size


@dataclass(frozen=True)
class Magnitude:
    """`magnitude:0.5`: that share of each matrix, its smallest weights, set to zero."""

    share: float

    def __str__(self) -> str:
        """The canonical text."""
        return f"magnitude:{self.share!r}"

    def check(self, components: Sequence[Component]) -> None:
        """Fits every matrix."""

    @property
    def by_rows(self) -> bool:
        """False: the smallest are those of the whole matrix."""
        return False

    @property
    def activations(self) -> Activations | None:
        """Nothing is done to the inputs."""
        return None

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix with zeros."""
        return prune_magnitude(weight, self.share)

    def size_bytes(self, component: Component, size_before: int) -> int:
        """As before: zeros are stored like any other weight."""
        return size_before


@dataclass(frozen=True)
class MagnitudePattern:
    """`magnitude:2:4`: the largest 2 of each 4 neighbours of a row stay, the others are zero."""

    n: int
    m: int

    def __str__(self) -> str:
        """The canonical text."""
        return f"magnitude:{self.n}:{self.m}"

    def check(self, components: Sequence[Component]) -> None:
        """Raise SchemeError where m does not divide a component's inputs."""
        check_pattern(self.n, self.m, components)

    @property
    def by_rows(self) -> bool:
        """True: neighbours lie in one row."""
        return True

    @property
    def activations(self) -> Activations | None:
        """Nothing is done to the inputs."""
        return None

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix with zeros."""
        kept = n_of_m_mask(weight.float().abs().contiguous(), self.n, self.m)
        return torch.where(kept, weight, torch.zeros_like(weight))

    def size_bytes(self, component: Component, size_before: int) -> int:
        """As before: zeros are stored like any other weight."""
        return size_before


# --- reading ---


def parse_scheme(text: str) -> Scheme:
    """The scheme that a line says; `str` of it gives the line back, in its canonical spelling.

    Raises SchemeError if a step is not known (names the nearest that is), says something out of
    range, says a thing twice, if the same family comes twice, two steps quantize the inputs, or
    `from:` does not stand alone. No file is touched.
    """
    read = [_parse_step(part, text) for part in _split(text)]
    families = [family for family, _ in read]
    for family in families:
        if families.count(family) > 1:
            raise SchemeError(
                f"scheme {text!r} has two steps of the kind {family!r}; a scheme takes one of each"
            )
    if len(read) == 1:
        return Scheme((read[0][1],))
    for alone in ("from", "gptq"):
        if alone in families:
            raise SchemeError(
                f"scheme {text!r} takes a step beside '{alone}:', which is made from the base's "
                f"own weights; let '{alone}:' stand alone"
            )
    for first in ("wanda", "fisher", "sparsegpt"):
        if first in families[1:]:
            raise SchemeError(
                f"scheme {text!r} takes a step before '{first}:', which is made from the base's "
                f"own weights; let '{first}:' stand first, and the only one of its kind"
            )
    active = [str(step) for _, step in read if step.activations is not None]
    if len(active) > 1:
        raise SchemeError(
            f"scheme {text!r} quantizes a component's inputs twice, by {active[0]} and by "
            f"{active[1]}; a scheme takes one step that does"
        )
    return Scheme(tuple(step for _, step in read))


def _split(text: str) -> list[str]:
    """The texts of the steps; all that follows `from:` is one path, which may hold a '+'."""
    text, parts = text.strip(), []
    while not text.startswith("from:") and (plus := text.find("+")) >= 0:
        parts.append(text[:plus].strip())
        text = text[plus + 1 :].strip()
    return [*parts, text]


def _parse_step(text: str, whole: str) -> tuple[str, Step]:
    for family in _FAMILIES:
        if family.owns.fullmatch(text.partition(":")[0]):
            return family.name, family.parse(text)
    raise SchemeError(_unknown(text, whole))


def _unknown(text: str, whole: str) -> str:
    known = [form for family in _FAMILIES for form in family.forms]
    nearest = max(known, key=lambda form: SequenceMatcher(None, text, form).ratio())
    within = "" if text == whole else f" in {whole!r}"
    return (
        f"unknown scheme {text!r}{within}; did you mean {nearest!r}? Known: {', '.join(known)}, "
        "and chains of them with '+'"
    )


def _parse_magnitude(text: str) -> Magnitude | MagnitudePattern:
    extent = parse_extent(text)
    return MagnitudePattern(*extent) if isinstance(extent, tuple) else Magnitude(extent)


def _parse_donor(text: str) -> Donor:
    path = text.partition(":")[2].strip()
    if not path:
        raise SchemeError(
            f"{text!r} names no checkpoint; expected the folder of one or a .gguf file, as in "
            "'from:model.gguf'"
        )
    return Donor(path)


def _only(text: str, step: Step) -> Callable[[str], Step]:
    """Reads a step that has nothing to choose."""

    def parse(found: str) -> Step:
        if found != text:
            raise SchemeError(f"{found!r} says too much; {text!r} has nothing to choose")
        return step

    return parse


@dataclass(frozen=True)
class _Family:
    """One kind of step: which text is its own, and how it reads it."""

    name: str
    owns: re.Pattern[str]
    """Matches the text up to the first colon."""
    parse: Callable[[str], Step]
    forms: tuple[str, ...]
    """Examples to show; every one parses."""


_FAMILIES = (
    _Family(
        "int",
        re.compile(r"int(0|[1-9]\d*)"),
        parse_absmax,
        (*(f"int{bits}" for bits in range(2, 9)), "int8:tensor", "int4:g64", "int4:g64:asym"),
    ),
    *(
        _Family(str(step), re.compile(re.escape(str(step))), _only(str(step), step), (str(step),))
        for step in (W8A8(), Fp8(), Fp4("mxfp4"), Fp4("nvfp4"), LlmInt8())
    ),
    _Family(
        "magnitude", re.compile("magnitude"), _parse_magnitude, ("magnitude:0.5", "magnitude:2:4")
    ),
    *(
        _Family(name, re.compile(name), parse, (f"{name}:0.5", f"{name}:2:4"))
        for name, parse in (
            ("wanda", parse_masked),
            ("fisher", parse_masked),
            ("sparsegpt", parse_sparsegpt),
        )
    ),
    _Family("gptq", re.compile("gptq"), parse_gptq, ("gptq:int4:g64", "gptq:int8")),
    _Family("from", re.compile("from"), _parse_donor, ("from:PATH",)),
)
