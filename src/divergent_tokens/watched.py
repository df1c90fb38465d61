"""Linear modules whose inputs and output gradients are seen also from inside compiled code.

A hook put inside a compiled layer is not called. So the product is an operator of its own that the
compiler does not look into, and who watches is found by the weight that it multiplies.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Meeting = Callable[[Tensor, Tensor], None]
"""Called in a backward pass with inputs [..., in] and output gradients [..., out]."""

_meetings: dict[int, Meeting] = {}
"""By the address of the weight."""


class WatchedLinear(nn.Linear):
    """As nn.Linear; its weight takes no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out: Tensor = _product(x, self.weight, self.bias)
        return out


@contextmanager
def watched(modules: Mapping[nn.Linear, Meeting]) -> Iterator[None]:
    """Every product of these modules meets its gradients, as long as the context lasts."""
    try:
        for module, meeting in modules.items():
            _meetings[module.weight.data_ptr()] = meeting
            module.__class__ = WatchedLinear
        yield
    finally:
        for module in modules:
            module.__class__ = nn.Linear
            _meetings.pop(module.weight.data_ptr(), None)


@torch.library.custom_op("divergent_tokens::product", mutates_args=())
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


@_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("divergent_tokens::product_back", mutates_args=())
def _product_back(delta: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    _meetings[weight.data_ptr()](x, delta)
    return delta @ weight


@_product_back.register_fake
def _(delta: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return delta.new_empty((*delta.shape[:-1], weight.shape[1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _back(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
    x, weight = ctx.saved_tensors
    return _product_back(delta, x, weight), None, None


_product.register_autograd(_back, setup_context=_keep)
