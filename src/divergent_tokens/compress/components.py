"""The weight matrices of the decoder layers, one by one, always spoken of as [out, in]."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from divergent_tokens.compress.experts import ExpertSlice, expert_slices, is_expert_stack
from divergent_tokens.errors import ModelError


@dataclass(frozen=True)
class Component:
    """One weight matrix, and where the network keeps it."""

    name: str
    """The module's own name; for an expert the unfused one, `...experts.17.gate_proj`."""
    kind: str
    """q, k, v, o, gate, up, down, expert, or other (q, k and v fused in one matrix, say)."""
    layer: int
    """The decoder layer it belongs to, from 0."""
    shape: tuple[int, int]
    """[out, in], whatever the storage."""
    dtype: torch.dtype
    """Of the network's weight; a scheme stores its scales in it."""
    parameter: str
    """The network's parameter that holds it, alone or among others."""
    expert: int | None = None
    """Which expert of its layer; None where every token passes."""
    stack_index: int | None = None
    """Which slice of a fused 3-D parameter; None where the parameter is one matrix."""
    transposed: bool = False
    """Stored as [in, out]."""
    rows: tuple[int, int, int] | None = None
    """Start, stop, step of its output rows where gate and up share one storage."""

    @property
    def n_parameters(self) -> int:
        """Weights in the matrix; biases are not counted."""
        return self.shape[0] * self.shape[1]

    @property
    def base_size_bytes(self) -> int:
        """What the base spends on it: 16 bits a weight, or fewer if the network stores fewer.

        A float32 weight counts 16 bits too: hardly anybody serves float32, and measured against
        it every scheme would look twice as good.
        """
        return self.n_parameters * min(2, self.dtype.itemsize)


def find_components(
    network: PreTrainedModel, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[Component, ...]:
    """Every weight matrix of the decoder layers, in the network's order.

    These are nn.Linear, GPT-2's Conv1D, and single experts of fused tensors. Left out are
    embeddings, the head and whatever lies outside the layers (OPT's `project_in`), convolutions,
    and routers: sending a token to another expert is another kind of harm than a changed weight,
    and no server quantizes them. `shared_expert_gate` (1 x hidden, Qwen's mixtures) is a router of
    one expert. A matrix that two modules share is listed once, under the first name.

    `include` and `exclude` hold globs on the whole name (`*` passes dots too), or regular
    expressions after `re:`, searched anywhere in it. A component stays if it matches one of
    `include` (all do if there is none) and none of `exclude`.

    Raises ModelError if a pattern matches nothing, if nothing is left, and if what would stay
    holds a weight that cannot be read as [out, in]: it is named, never guessed, never skipped.
    """
    found = list(_weights(network))
    names = [weight.name for weight in found]
    if not found:
        raise ModelError(
            f"{type(network).__name__} has no linear layers; expected nn.Linear, Conv1D or "
            "experts in the layers of a decoder"
        )
    chosen = _matched("include", include, names) if include else set(names)
    chosen -= _matched("exclude", exclude, names)
    if not chosen:
        raise ModelError(
            f"include {list(include)} and exclude {list(exclude)} leave no component; exclude "
            f"fewer. There are: {_nearest('', names)}"
        )
    components = []
    for weight in found:
        if isinstance(weight, Component) and weight.name in chosen:
            components.append(weight)
        elif isinstance(weight, _Unreadable) and weight.name in chosen:
            raise ModelError(f"{weight.name}: {weight.why}; to go on without it, exclude it")
    return tuple(components)


def weight_of(network: PreTrainedModel, component: Component) -> Tensor:
    """The component's weight [out, in] as a view of the network's own storage.

    Writing to it changes the network. It belongs to the storage of this moment: take a new view
    once the parameter was given other data (as `lent_plan` does).
    """
    return component_view(network.get_parameter(component.parameter).detach(), component)


def component_view(storage: Tensor, component: Component) -> Tensor:
    """The component's [out, in] view of a tensor that is laid out as the component's parameter."""
    matrix = storage if component.stack_index is None else storage[component.stack_index]
    if component.transposed:
        matrix = matrix.t()  # [in, out] -> [out, in]
    if component.rows is not None:
        start, stop, step = component.rows
        matrix = matrix[start:stop:step]
    if matrix.shape != component.shape:
        raise ModelError(
            f"{component.parameter} holds {list(matrix.shape)} where {component.name} is "
            f"{list(component.shape)}; find the components of this very network"
        )
    return matrix


# --- what the layers hold ---


@dataclass(frozen=True)
class _Unreadable:
    """A weight that is there, and why it cannot be spoken of as [out, in]."""

    name: str
    why: str


def _weights(network: PreTrainedModel) -> Iterator[Component | _Unreadable]:
    prefix, layers = _decoder_layers(network)
    routers = tuple(name for name, module in layers.named_modules(prefix) if _routes(name, module, network))
    seen: set[tuple[int, int | None, tuple[int, int, int] | None]] = set()
    for name, module in layers.named_modules(prefix):
        if name in routers or name.startswith(tuple(router + "." for router in routers)):
            continue
        for weight in _weights_of(name, module, prefix):
            if isinstance(weight, Component):
                parameter = network.get_parameter(weight.parameter)
                place = (id(parameter), weight.stack_index, weight.rows)
                if place in seen:
                    continue
                seen.add(place)
            yield weight
