"""What is made once of a base's matrices and what it reads, and lies in the cache from then on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from divergent_tokens.compress.components import Component
from divergent_tokens.errors import SchemeError
from divergent_tokens.store import content_key, read_entry, writing_entry

_VERSION = 2
"""Of how things are made and kept."""

Seen = Literal["moments", "fisher"]
"""What is looked at: second moments of inputs (`calibration.py`), or Fisher saliencies."""


@dataclass(frozen=True)
class Entry:
    """What one step made of one component."""

    arrays: Mapping[str, Tensor]
    header: Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """Where what was made of one base, on one calibration, lies."""

    cache: Path
    base: str
    """The base's fingerprint."""
    calibration: str
    """The digest of what was calibrated on."""

    def has(self, step: str, component: Component) -> bool:
        """Whether a step's part for a component was made."""
        return read_entry(self.cache, self._key(step, component)) is not None

    def read(self, step: str, component: Component) -> Entry | None:
        """A step's part for a component; None if it was not made yet."""
        entry = read_entry(self.cache, self._key(step, component))
        if entry is None:
            return None
        arrays = {name: torch.from_numpy(np.array(a)) for name, a in entry.arrays.items()}
        return Entry(arrays, entry.header)

    def write(self, step: str, component: Component, entry: Entry) -> None:
        """Keep a step's part for a component; tensors of dtypes that numpy has."""
        with writing_entry(self.cache, self._key(step, component)) as writer:
            writer.header.update(entry.header)
            for name, tensor in entry.arrays.items():
                values = tensor.cpu().numpy()
                writer.array(name, values.shape, values.dtype)[:] = values

    def _key(self, step: str, component: Component) -> str:
        return content_key(
            kept=_VERSION,
            base=self.base,
            calibration=self.calibration,
            step=step,
            component=component.name,
            dtype=str(component.dtype),
        )


@runtime_checkable
class Made(Protocol):
    """A step of a scheme that must be made from what the base does on a text, before it is taken.

    `str(step)` tells it from others.
    """

    @property
    def kept(self) -> Kept | None:
        """Where it is, once it was made."""

    @property
    def made_from(self) -> Seen:
        """What it is made from."""

    def bound(self, kept: Kept) -> Self:
        """The same step, with what was made at hand."""

    def check(self, components: Sequence[Component]) -> None:
        """Raise SchemeError, naming a component, if the step does not fit one of them."""

    def check_installed(self) -> None:
        """Raise SchemeError where what it is made by is not installed."""

    def make(self, weight: Tensor, seen: Tensor) -> Entry:
        """What is kept of a matrix [out, in], and what was seen of it."""


def read_made(step: Made, component: Component, what: str) -> Entry:
    """What was made of a component. Raises SchemeError if it was not; `what` names it."""
    found = None if step.kept is None else step.kept.read(str(step), component)
    if found is None:
        raise SchemeError(
            f"{what} of {component.name} under {step} were not made; they are made from "
            "the base's inputs, by dtm sweep, say, with the same --calibration and --cache"
        )
    return found


def check_own_inputs(step: Made, components: Sequence[Component], instead: str) -> None:
    """Refuse what has no inputs of its own."""
    for component in components:
        if component.is_end:
            raise SchemeError(
                f"{step}: {component.name} is looked up or shared, and its inputs are not "
                f"collected here; exclude it, or take {instead}"
            )
