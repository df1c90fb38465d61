"""SparseGPT (Frantar and Alistarh 2023) by llm-compressor: zeros that what stays makes up for.

Each matrix is pruned by itself, on the inputs that the base gives it, so that one may be taken
without the others; the layers before it are not pruned meanwhile, as they are elsewhere.
"""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.gptq import check_llm_compressor
from divergent_tokens.compress.kept import Entry, Kept, Seen, check_own_inputs, read_made
from divergent_tokens.compress.prune import (
    Extent,
    check_pattern,
    extent_text,
    n_of_m_mask,
    parse_extent,
)

BLOCK = 128
"""Columns that are decided at once, and `DAMPING`: its modifier's defaults."""
DAMPING = 0.01
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Of as many bytes: numpy has no bfloat16."""


@dataclass(frozen=True)
class SparseGpt:
    """`sparsegpt:0.5`, `sparsegpt:2:4`: that share of each matrix zero, the others moved."""

    extent: Extent
    kept: Kept | None = field(default=None, compare=False, repr=False)
    """Where the matrices are, once they were made."""

    def __str__(self) -> str:
        """The canonical text."""
        return f"sparsegpt:{extent_text(self.extent)}"

    def check(self, components: Sequence[Component]) -> None:
        """Refuse what the pattern does not fit, and what has no inputs of its own."""
        if isinstance(self.extent, tuple):
            check_pattern(*self.extent, components)
        check_own_inputs(self, components, f"magnitude:{extent_text(self.extent)}")

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
        """The matrix that was made of the base's."""
        integers = read_made(self, component, "the weights").arrays["weight"]
        return integers.view(component.dtype).to(weight)

    def size_bytes(self, component: Component, size_before: int) -> int:
        """As before: zeros are stored like any other weight."""
        return size_before

    @property
    def made_from(self) -> Seen:
        """Second moments of the inputs."""
        return "moments"

    def bound(self, kept: Kept) -> "SparseGpt":
        """The same, its matrices at hand."""
        return replace(self, kept=kept)

    def check_installed(self) -> None:
        """Raise SchemeError without llm-compressor."""
        check_llm_compressor("sparsegpt:", "wanda:")

    def make(self, weight: Tensor, seen: Tensor) -> Entry:
        """The dense matrix, in its own dtype."""
        found = prune_by_sparsegpt(weight, seen, self.extent).contiguous()
        return Entry({"weight": found.view(_INTEGERS[found.itemsize])}, {})


def parse_sparsegpt(text: str) -> SparseGpt:
    """What a text such as `sparsegpt:0.5` says. Raises SchemeError for what is not known."""
    return SparseGpt(parse_extent(text))


@torch.no_grad()
def prune_by_sparsegpt(
    weight: Tensor, moment: Tensor, extent: Extent, *, keep_zeros: bool = False
) -> Tensor:
    """A pruned copy of a [out, in] matrix for inputs with the second moment Σ x xᵀ [in, in].

    Of every `BLOCK` columns ⌊share · n⌋ + 1 weights become zero. `keep_zeros`: what is zero already
    stays so and counts; a matrix that is as sparse as wanted is left as it is. A column without
    inputs is pruned first, not wholly zeroed, as by llm-compressor: text that was not calibrated
    on may use it.
    """
    with redirect_stdout(sys.stderr):  # where it logs to is settled when it is first imported
        from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight

    n, m = extent if isinstance(extent, tuple) else (0, 0)
    share = 1 - n / m if isinstance(extent, tuple) else extent
    gone = int((weight == 0).sum()) / weight.numel() if keep_zeros else 0.0
    if share <= gone + 1e-6:  # it would raise, or cut one weight of each block where none should go
        if not n:
            return weight.clone()
        # Enough zeros, which need not lie in the pattern.
        kept = n_of_m_mask(weight.float().abs().contiguous(), n, m)
        return torch.where(kept, weight, torch.zeros_like(weight))
    moment = moment.float().clone()
    moment.diagonal()[moment.diagonal() == 0] = 1.0
    matrix = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    matrix.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    _, found = sparsify_weight(
        matrix,
        {matrix: moment},
        share,
        m - n,  # it takes how many of m go
        m,
        BLOCK // m * m or m if m else BLOCK,  # whole groups
        DAMPING,
        keep_zeros,
    )
    pruned: Tensor = found
    return pruned
