"""The weight matrices of the decoder layers, one by one, always spoken of as [out, in].

The embeddings and the head are named too, and left out unless asked for.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from divergent_tokens.compress.experts import ExpertSlice, expert_slices, is_expert_stack
from divergent_tokens.errors import ModelError
from divergent_tokens.layers import decoder_layers


@dataclass(frozen=True)
class Component:
    """One weight matrix, and where the network keeps it."""

    name: str
    """The module's own name; for an expert the unfused one, `...experts.17.gate_proj`."""
    kind: str
    """q, k, v, o, gate, up, down, expert, or other (q, k and v fused in one matrix, say);
    embedding or head outside the layers."""
    layer: int | None
    """The decoder layer it belongs to, from 0; None for embeddings and head."""
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
    model_type: str = ""
    """What its network's config calls the architecture; a donor must be of the same."""

    @property
    def is_end(self) -> bool:
        """Whether it is the embedding or the head."""
        return self.layer is None

    @property
    def part_of_stack(self) -> tuple[str, str]:
        """The module that holds the component's expert among others, and gate, up or down."""
        return self.parameter.rpartition(".")[0], self.name.rpartition(".")[2]

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
    whatever lies outside the layers (OPT's `project_in`), convolutions,
    and routers: sending a token to another expert is another kind of harm than a changed weight,
    and no server quantizes them. `shared_expert_gate` (1 x hidden, Qwen's mixtures) is a router of
    one expert. A matrix that two modules share is listed once, under the first name.

    The `ends`, embeddings and head, are there only if a pattern of `include` matches them. Where
    the two are tied they are one component, which the name of either brings in or leaves out.

    `include` and `exclude` hold globs on the whole name (`*` passes dots too), or regular
    expressions after `re:`, searched anywhere in it. A component stays if it matches one of
    `include` (all do if there is none) and none of `exclude`.

    Raises ModelError if a pattern matches nothing, if nothing is left, and if what would stay
    holds a weight that cannot be read as [out, in]: it is named, never guessed, never skipped.
    """
    in_layers = list(_weights(network))
    if not in_layers:
        raise ModelError(
            f"{type(network).__name__} has no linear layers; expected nn.Linear, Conv1D or "
            "experts in the layers of a decoder"
        )
    embedding, head, names = _ends(network)
    found = [*embedding, *in_layers, *head]
    names |= {weight.name: weight.name for weight in in_layers}
    inside = {weight.name for weight in in_layers}
    chosen = _matched("include", include, names) if include else inside
    chosen -= _matched("exclude", exclude, names)
    if not chosen:
        raise ModelError(
            f"include {list(include)} and exclude {list(exclude)} leave no component; exclude "
            f"fewer. There are: {_nearest('', list(names))}"
        )
    components = []
    for weight in found:
        if isinstance(weight, Component) and weight.name in chosen:
            components.append(weight)
        elif isinstance(weight, _Unreadable) and weight.name in chosen:
            raise ModelError(f"{weight.name}: {weight.why}; to go on without it, exclude it")
    return tuple(components)


def count_matrices(network: PreTrainedModel) -> int:
    """Weight matrices of the layers, routers apart; those that cannot be read are counted, too."""
    return sum(1 for _ in _weights(network))


def ends(network: PreTrainedModel) -> tuple[Component, ...]:
    """The embedding and the head, which `find_components` leaves out unless asked; one if tied.

    An end that is no dense matrix is not among them.
    """
    embedding, head, _ = _ends(network)
    return tuple(end for end in (*embedding, *head) if isinstance(end, Component))


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


_Weight = Component | _Unreadable


def _ends(network: PreTrainedModel) -> tuple[list[_Weight], list[_Weight], dict[str, str]]:
    """Embedding and head, none or one of each, and under which name either is listed."""
    transformer = cast(Any, network)  # transformers leaves these two methods untyped
    places = {id(module): name for name, module in network.named_modules()}
    found: dict[str, list[_Weight]] = {"embedding": [], "head": []}
    names: dict[str, str] = {}
    first: dict[int, str] = {}  # of each weight, the name under which it is listed
    for kind, module in (
        ("embedding", transformer.get_input_embeddings()),
        ("head", transformer.get_output_embeddings()),
    ):
        name = places.get(id(module))
        weight = getattr(module, "weight", None)
        if name is None or not isinstance(weight, nn.Parameter):
            continue
        names[name] = first.setdefault(id(weight), name)
        if names[name] == name:
            found[kind].append(_end(name, kind, weight, network.config.model_type))
    return found["embedding"], found["head"], names


def _end(name: str, kind: str, weight: nn.Parameter, model_type: str) -> _Weight:
    if not weight.is_floating_point() or weight.ndim != 2:
        return _Unreadable(name, _not_dense(weight))
    vocabulary, hidden = weight.shape
    return Component(
        name=name,
        kind=kind,
        layer=None,
        shape=(vocabulary, hidden),
        dtype=weight.dtype,
        parameter=f"{name}.weight",
        model_type=model_type,
    )


def _weights(network: PreTrainedModel) -> Iterator[_Weight]:
    prefix, layers = decoder_layers(network)
    modules = dict(layers.named_modules(prefix=prefix))
    routers = tuple(name for name in modules if _routes(name, modules))
    seen: set[tuple[int, int | None, tuple[int, int, int] | None]] = set()
    for name, module in modules.items():
        if name in routers or name.startswith(tuple(f"{router}." for router in routers)):
            continue
        for weight in _weights_of_module(name, module, prefix):
            if isinstance(weight, Component):
                weight = replace(weight, model_type=network.config.model_type)
                parameter = network.get_parameter(weight.parameter)
                place = (id(parameter), weight.stack_index, weight.rows)
                if place in seen:
                    continue
                seen.add(place)
            yield weight


def _routes(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module chooses experts: by its class, its name, or as the `gate` beside experts."""
    parent, _, last = name.rpartition(".")
    if "router" in type(modules[name]).__name__.lower() or last.startswith("router"):
        return True
    return last in {"gate", "gating", "shared_expert_gate"} and f"{parent}.experts" in modules


def _weights_of_module(name: str, module: nn.Module, prefix: str) -> Iterator[_Weight]:
    layer = int(name.removeprefix(f"{prefix}.").split(".")[0]) if name != prefix else -1
    if isinstance(module, nn.Linear | Conv1D):
        yield _matrix(name, module, layer)
    elif is_expert_stack(module):
        try:
            for piece in expert_slices(module):
                yield _expert(name, module, layer, piece)
        except ModelError as error:
            yield _Unreadable(name, str(error))


def _matrix(name: str, module: nn.Linear | Conv1D, layer: int) -> _Weight:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None or not weight.is_floating_point() or weight.ndim != 2:
        return _Unreadable(name, _not_dense(weight))
    transposed = isinstance(module, Conv1D)
    first, second = weight.shape
    expert = re.search(r"\.experts\.(\d+)\.", name)  # a mixture whose experts are not fused
    return Component(
        name=name,
        kind="expert" if expert else _kind(name),
        layer=layer,
        shape=(second, first) if transposed else (first, second),
        dtype=weight.dtype,
        parameter=f"{name}.weight",
        expert=int(expert[1]) if expert else None,
        transposed=transposed,
    )


def _not_dense(weight: Tensor | None) -> str:
    held = "no weight of its own" if weight is None else f"{weight.dtype} {list(weight.shape)}"
    return f"it holds {held}, expected a dense floating [out, in] weight"


def _expert(name: str, module: nn.Module, layer: int, piece: ExpertSlice) -> Component:
    full_name = f"{name}.{piece.index}.{piece.part}"
    shared = "shared" in name.rpartition(".")[2]  # Inkling stacks those that every token passes
    return Component(
        name=full_name,
        kind=_kind(full_name) if shared else "expert",
        layer=layer,
        shape=piece.shape,
        dtype=module.get_parameter(piece.parameter).dtype,
        parameter=f"{name}.{piece.parameter}",
        expert=None if shared else piece.index,
        stack_index=piece.index,
        transposed=piece.transposed,
        rows=piece.rows,
    )


_KINDS = {
    "q": {"q_proj", "q_a_proj", "q_b_proj", "wq", "query"},
    "k": {"k_proj", "wk", "key"},
    "v": {"v_proj", "wv", "value"},
    "o": {"o_proj", "wo"},
    "gate": {"gate_proj", "w1"},
    "up": {"up_proj", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h"},
    "down": {"down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h"},
}
_OUTPUT = {"out_proj", "c_proj", "dense"}
"""Names of an attention's o; under another parent they mean something else."""
_ATTENTION = {"attn", "attention", "self_attn", "self_attention"}


def _kind(name: str) -> str:
    *_, parent, last = name.split(".")
    if last in _OUTPUT and parent in _ATTENTION:
        return "o"
    if last == "c_proj" and parent == "mlp":  # GPT-2
        return "down"
    return next((kind for kind, names in _KINDS.items() if last in names), "other")


# --- patterns ---


def _matched(option: str, patterns: Sequence[str], names: Mapping[str, str]) -> set[str]:
    """What the names that match any of the patterns stand for; each pattern must match one."""
    matched: set[str] = set()
    for pattern in patterns:
        hits = {listed for name, listed in names.items() if _matches(pattern, name)}
        if not hits:
            raise ModelError(
                f"{option} {pattern!r} matches no component; a pattern is a glob on the whole name "
                f"or a regular expression after 're:'. Nearest: {_nearest(pattern, list(names))}"
            )
        matched |= hits
    return matched


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.search(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise ModelError(f"{pattern!r} is not a regular expression: {error}") from error


def _nearest(pattern: str, names: Sequence[str], count: int = 5) -> str:
    """A few of the names, nearest to the pattern first, all layers and experts of a name as one."""
    forms = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    wanted = pattern.removeprefix("re:").strip("*.^$")

    def likeness(form: str) -> float:
        # People write `qproj`; its likeness to a name of six parts is small for every name.
        ends = (form, form.rpartition(".")[2])
        return max(SequenceMatcher(None, wanted, end).ratio() for end in ends)

    nearest = sorted(forms, key=likeness, reverse=True)
    return ", ".join(nearest[:count]) + (", ..." if len(nearest) > count else "")
