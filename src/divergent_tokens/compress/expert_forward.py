"""Fused experts run one by one, so that the inputs and outputs of each can be seen or changed.

transformers computes all experts of a layer in a few grouped products. Here every expert's gate, up
and down is a product of its own, in the places and with the gating that transformers declares on
the module (`use_experts_implementation`); nothing else of the network runs differently.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.experts import ExpertSlice, expert_slices
from divergent_tokens.errors import ModelError

Product = Callable[[str, Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""What happens at one expert's matrix: its component's name, its inputs [token, in], the tokens'
rows among all tokens of the layer [token], and the product itself; returns outputs [token, out]."""


@contextmanager
def experts_one_by_one(
    network: PreTrainedModel, components: Sequence[Component], product: Product
) -> Iterator[None]:
    """The layers that hold these components' experts call `product` at each of their matrices.

    Every part of such a layer goes through it, also those that are not among `components`. Raises
    ModelError for a class that does not declare how it gates.
    """
    names = {c.parameter.rpartition(".")[0] for c in components if c.stack_index is not None}
    with ExitStack() as stack:
        for name in sorted(names):
            module = network.get_submodule(name)
            _check_declared(name, module)
            slices = {(piece.index, piece.part): piece for piece in expert_slices(module)}
            before = module.__dict__.get("forward")
            module.forward = partial(_forward, module, name, slices, product)
            stack.callback(_restore, module, before)
        yield


def _restore(module: nn.Module, before: Any) -> None:
    if before is None:
        del module.forward
    else:
        module.forward = before


def _check_declared(name: str, module: nn.Module) -> None:
    flags = ("is_transposed", "is_concatenated", "has_bias", "has_gate")
    if not all(isinstance(getattr(module, flag, None), bool) for flag in flags):
        raise ModelError(
            f"{name} ({type(module).__name__}) does not say how its experts are computed "
            f"(transformers declares {', '.join(flags)} on other classes), so they cannot be run "
            "one by one; exclude them"
        )


def _forward(
    module: Any,
    name: str,
    slices: dict[tuple[int, str], ExpertSlice],
    product: Product,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """As transformers' eager experts: [token, hidden], [token, k] twice -> [token, hidden]."""
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for index in torch.unique(top_k_index).tolist():
        if (index, "down_proj") not in slices:  # a slot of another device, or an identity
            continue
        rows, choice = torch.where(top_k_index == index)

        def at(part: str, x: Tensor, index: int = index, rows: Tensor = rows) -> Tensor:
            piece = slices[index, part]
            times = partial(_product, module, piece)
            return product(f"{name}.{index}.{part}", x, rows, times)

        x = hidden_states[rows]
        if module.has_gate:
            inner = module._apply_gate(_joined(module, at("gate_proj", x), at("up_proj", x)))
        else:
            inner = module.act_fn(at("up_proj", x))
        out = at("down_proj", inner)
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        weighted = out * top_k_weights[rows, choice, None]
        total = total.index_add(0, rows, weighted.float())
    return total.to(hidden_states.dtype)


def _product(module: nn.Module, piece: ExpertSlice, x: Tensor) -> Tensor:
    """x [token, in] -> [token, out] by one expert's weight and bias as they are now."""
    weight: Tensor = module.get_parameter(piece.parameter)[piece.index]
    if piece.transposed:
        weight = weight.t()
    biases = dict(module.named_parameters(recurse=False)).get(f"{piece.parameter}_bias")
    bias: Tensor | None = None if biases is None else biases[piece.index]
    if piece.rows is not None:
        rows = slice(*piece.rows)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return linear(x, weight, bias)


def _joined(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    """What the module's own gating expects: gate beside up, or the two interleaved."""
    if module.is_concatenated:
        return torch.cat([gate, up], -1)
    return torch.stack([gate, up], -1).flatten(-2)
