"""What gets a sparsity of its own: a matrix, an attention head's part of one, or some rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from divergent_tokens.compress.components import Component
from divergent_tokens.errors import SchemeError

Granularity = Literal["component", "expert", "head", "rows"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
BLOCK_ROWS = 64
"""Of `rows`; the last block of a matrix may be smaller."""


@dataclass(frozen=True)
class Unit:
    """A rectangle of a component."""

    component: Component
    owner: int
    """Which of the components it is part of."""
    rows: tuple[int, int]
    """From, and up to, of the outputs."""
    columns: tuple[int, int]
    """From, and up to, of the inputs."""

    @property
    def n_parameters(self) -> int:
        """Weights in it."""
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])

    def of(self, matrix: Tensor) -> Tensor:
        """Its part of a matrix of the component's shape [out, in], as a view."""
        return matrix[slice(*self.rows), slice(*self.columns)]


def whole(components: Sequence[Component]) -> tuple[Unit, ...]:
    """Every component as one unit."""
    return tuple(
        Unit(component, owner, (0, component.shape[0]), (0, component.shape[1]))
        for owner, component in enumerate(components)
    )


def find_units(
    network: PreTrainedModel, components: Sequence[Component], granularity: Granularity
) -> tuple[Unit, ...]:
    """The units of all components, component by component.

    `component`, and `expert`, which says the same: an expert's matrices are components. `head`: the
    rows of q, k and v that make one attention head, and the columns of o that read it; other
    matrices stay whole. `rows`: blocks of `BLOCK_ROWS` outputs. Raises SchemeError for `head` where
    no component has heads.
    """
    if granularity in ("component", "expert"):
        return whole(components)
    if granularity == "rows":
        return tuple(
            Unit(unit.component, unit.owner, rows, unit.columns)
            for unit in whole(components)
            for rows in _blocks(unit.rows[1], BLOCK_ROWS)
        )
    size = _head_size(network)
    found = [unit for one in whole(components) for unit in _heads(one, size)]
    if len(found) == len(components):
        raise SchemeError(
            f"none of the {len(components)} components is q, k, v or o with attention heads of "
            f"{size}; expected some for --granularity head: include them, or take --granularity "
            "rows"
        )
    return tuple(found)


def _heads(unit: Unit, size: int) -> list[Unit]:
    kind, (n_out, n_in) = unit.component.kind, unit.component.shape
    if kind in ("q", "k", "v") and n_out % size == 0:
        blocks = _blocks(n_out, size)
        return [Unit(unit.component, unit.owner, rows, unit.columns) for rows in blocks]
    if kind == "o" and n_in % size == 0:
        blocks = _blocks(n_in, size)
        return [Unit(unit.component, unit.owner, unit.rows, columns) for columns in blocks]
    return [unit]


def _blocks(n: int, size: int) -> list[tuple[int, int]]:
    return [(a, min(a + size, n)) for a in range(0, n, size)]


def _head_size(network: PreTrainedModel) -> int:
    config: Any = network.config.get_text_config()
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)
