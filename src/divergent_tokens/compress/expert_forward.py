"""Fused experts run in the open: what goes into and comes out of each can be seen or changed.

transformers computes all experts of a layer in one go. Here gate, up and down are three products,
each over all tokens of all experts, in the places and with the gating that transformers declares on
the module (`use_experts_implementation`); nothing else of the network runs differently.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.experts import ExpertSlice, expert_slices
from divergent_tokens.errors import ModelError


@dataclass(frozen=True)
class ExpertInputs:
    """What goes into one part (gate, up or down) of all experts of a layer, expert after expert."""

    stack: str
    """The module that holds the experts."""
    part: str
    """gate_proj, up_proj or down_proj."""
    x: Tensor
    """[row, in]"""
    experts: Tensor
    """Which expert each row goes to, ascending. [row]"""
    tokens: Tensor
    """Which of the layer's tokens each row is. [row]"""
    counts: Tensor
    """How many rows each expert has. [expert]"""


Product = Callable[[ExpertInputs, Callable[[Tensor], Tensor]], Tensor]
"""What happens at one part: its inputs, and the product itself, [row, in] -> [row, out]."""


@contextmanager
def open_experts(
    network: PreTrainedModel, components: Sequence[Component], product: Product
) -> Iterator[None]:
    """The layers that hold these components' experts call `product` at gate, up and down.

    Weights take no gradient there, inputs do. Raises ModelError for a class that does not declare
    how it computes.
    """
    with ExitStack() as stack:
        keep_open(stack, network, components, product)
        yield


def check_experts(network: PreTrainedModel, components: Sequence[Component]) -> None:
    """Raise ModelError for experts that cannot be opened, before anything is read."""
    with open_experts(network, components, lambda inputs, times: times(inputs.x)):
        pass


def stack_members(components: Sequence[Component]) -> Mapping[tuple[str, str], dict[int, int]]:
    """Stack and part (gate_proj, ...) -> expert -> component; empty for what was not chosen."""
    found: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for i, component in enumerate(components):
        if component.stack_index is not None:
            found[component.part_of_stack][component.stack_index] = i
    return found


def keep_open(
    stack: ExitStack, network: PreTrainedModel, components: Sequence[Component], product: Product
) -> None:
    """As `open_experts`, until the stack is closed, which may be never.

    Where experts are open already, both products happen: the older one first.
    """
    names = {c.parameter.rpartition(".")[0] for c in components if c.stack_index is not None}
    for name in sorted(names):
        module = network.get_submodule(name)
        _check_declared(name, module)
        pieces = {piece.part: piece for piece in expert_slices(module) if piece.index == 0}
        before = module.__dict__.get("forward")
        both = _after(before, product)
        stack.callback(_restore, module, before)
        module.forward = partial(_forward, module, name, pieces, both)


def _after(before: Any, product: Product) -> Product:
    """The product, within that of a forward which was put there earlier."""
    if not (isinstance(before, partial) and before.func is _forward):
        return product
    first: Product = before.args[3]
    return lambda inputs, times: first(inputs, lambda x: product(replace(inputs, x=x), times))


def _restore(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = before


def _check_declared(name: str, module: nn.Module) -> None:
    flags = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
    if not all(isinstance(getattr(module, flag, None), bool) for flag in flags):
        raise ModelError(
            f"{name} ({type(module).__name__}) does not say how its experts are computed "
            f"(transformers declares {', '.join(flags)} on other classes), so nothing can be "
            "changed or seen inside it; exclude it"
        )


def _forward(
    module: Any,
    name: str,
    pieces: dict[str, ExpertSlice],
    product: Product,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """As transformers' own: [token, hidden], [token, k] twice -> [token, hidden]."""
    n_tokens, k = top_k_index.shape
    chosen, order = top_k_index.flatten().sort(stable=True)
    there = chosen < module.down_proj.shape[0]  # beyond are slots of another device, or identities
    chosen, order = chosen[there], order[there]
    counts = torch.bincount(chosen, minlength=module.down_proj.shape[0])
    tokens = order // k

    def at(part: str, x: Tensor) -> Tensor:
        inputs = ExpertInputs(name, part, x, chosen, tokens, counts)
        return product(inputs, lambda x: _product(module, pieces[part], x, chosen, counts))

    x = hidden_states[tokens]
    if module.has_gate:
        inner = module._apply_gate(_joined(module, at("gate_proj", x), at("up_proj", x)))
    else:
        inner = module.act_fn(at("up_proj", x))
    out = at("down_proj", inner)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    weighted = out * top_k_weights.flatten()[order, None]
    # In float32 and in a fixed order, as transformers adds up.
    whole = weighted.new_zeros((n_tokens * k, weighted.shape[1])).index_copy(0, order, weighted)
    return whole.view(n_tokens, k, -1).sum(1).to(hidden_states.dtype)


def _product(
    module: nn.Module, piece: ExpertSlice, x: Tensor, experts: Tensor, counts: Tensor
) -> Tensor:
    """x [row, in] -> [row, out] by every row's own expert, weights and biases as they are now."""
    weights: Tensor = module.get_parameter(piece.parameter)[: len(counts)].detach()
    if piece.transposed:
        weights = weights.transpose(1, 2)  # [expert, out, in]
    biases: Tensor | None = getattr(module, f"{piece.parameter}_bias", None)
    if piece.rows is not None:
        rows = slice(*piece.rows)
        weights, biases = weights[:, rows], None if biases is None else biases[:, rows]
    out = grouped_product(x, weights, counts)
    return out if biases is None else out + biases.detach()[experts]


def grouped_product(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """x [row, in] by weights [expert, out, in], the first counts[0] rows by the first, and so on.

    [row, out]; differentiable in x only.
    """
    out: Tensor = _Grouped.apply(x, weights, counts)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    """Without it the graph would hold a node for each expert, or a gradient for each weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        ctx.weights, ctx.counts = weights, counts
        return _grouped(x, weights.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _grouped(gradients[0], ctx.weights, ctx.counts), None, None


def _grouped(x: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """[row, a] by [expert, a, b] -> [row, b]."""
    if _fits_kernel(x, weights):
        ends = counts.cumsum(0).to(torch.int32)
        return torch.nn.functional.grouped_mm(x.contiguous(), weights, offs=ends)
    out = x.new_empty((len(x), weights.shape[2]))
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            torch.mm(x[start : start + count], weights[expert], out=out[start : start + count])
            start += count
    return out


def _fits_kernel(x: Tensor, weights: Tensor) -> bool:
    """Whether torch's grouped product takes them: rows and columns in steps of 16 bytes."""
    strides = (x.shape[1], weights.shape[2], *weights.stride()[1:])
    aligned = all(stride == 1 or stride * x.element_size() % 16 == 0 for stride in strides)
    return hasattr(torch.nn.functional, "grouped_mm") and aligned and 1 in weights.stride()[1:]


def _joined(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    """What the module's own gating expects: gate beside up, or the two interleaved."""
    if module.is_concatenated:
        return torch.cat([gate, up], -1)
    return torch.stack([gate, up], -1).flatten(-2)
