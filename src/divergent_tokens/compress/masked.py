"""Weights set to zero that matter least by what the base does on a text: Wanda's, and Fisher's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.kept import Entry, Kept, Seen, check_own_inputs, read_made
from divergent_tokens.compress.prune import (
    Extent,
    check_pattern,
    extent_text,
    n_of_m_mask,
    parse_extent,
    rows_mask,
    share_mask,
)
from divergent_tokens.errors import SchemeError


@dataclass(frozen=True)
class Masked:
    """`wanda:0.5`, `fisher:2:4`: that share of each matrix set to zero, the others untouched.

    `wanda` (Sun et al. 2024): the least |w| · ‖x‖ of each row, x the weight's input. `fisher`: the
    least ½ w² F of the whole matrix, as `saliencies.py` has it.
    """

    criterion: Literal["wanda", "fisher"]
    extent: Extent
    kept: Kept | None = field(default=None, compare=False, repr=False)
    """Where the masks are, once they were made."""

    def __str__(self) -> str:
        """The canonical text."""
        return f"{self.criterion}:{extent_text(self.extent)}"

    def check(self, components: Sequence[Component]) -> None:
        """Refuse what the pattern does not fit, and what the base's text does not show whole."""
        instead = f"magnitude:{extent_text(self.extent)}"
        if isinstance(self.extent, tuple):
            check_pattern(*self.extent, components)
        check_own_inputs(self, components, instead)
        experts = [c.name for c in components if c.expert is not None]
        if experts and self.criterion == "fisher":
            raise SchemeError(
                f"{self}: {experts[0]} is an expert, which sees some tokens only; exclude it, or "
                f"take {instead}"
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
        return None if self.kept is None else self.kept.calibration

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix with zeros."""
        packed = read_made(self, component, "the zeros").arrays["mask"]
        bits = np.unpackbits(packed.numpy(), count=weight.numel()).astype(bool)
        mask = torch.from_numpy(bits).view(weight.shape).to(weight.device)
        return torch.where(mask, weight, torch.zeros_like(weight))

    def size_bytes(self, component: Component, size_before: int) -> int:
        """As before: zeros are stored like any other weight."""
        return size_before

    @property
    def made_from(self) -> Seen:
        """Second moments of the inputs, or Fisher saliencies."""
        return "moments" if self.criterion == "wanda" else "fisher"

    def bound(self, kept: Kept) -> "Masked":
        """The same, its masks at hand."""
        return replace(self, kept=kept)

    def check_installed(self) -> None:
        """Nothing else is needed."""

    def make(self, weight: Tensor, seen: Tensor) -> Entry:
        """Which weights stay, eight a byte."""
        saliency = seen
        if self.criterion == "wanda":
            saliency = weight.float().abs()
            if seen.diagonal().any():  # an expert that no token was sent to: by magnitude
                saliency = saliency * seen.diagonal().sqrt()
        mask = self._mask(saliency).cpu().numpy()
        return Entry({"mask": torch.from_numpy(np.packbits(mask))}, {})

    def _mask(self, saliency: Tensor) -> Tensor:
        if isinstance(self.extent, tuple):
            return n_of_m_mask(saliency, *self.extent)
        if self.criterion == "wanda":
            return rows_mask(saliency, self.extent)
        return share_mask(saliency, self.extent)


def parse_masked(text: str) -> Masked:
    """What a text such as `wanda:0.5` says. Raises SchemeError for what is not known."""
    criterion: Literal["wanda", "fisher"] = "wanda" if text.startswith("wanda") else "fisher"
    return Masked(criterion, parse_extent(text))
