"""Rounding that gradients pass as if nothing had been rounded (the straight-through estimator)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def straight_through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding` of the tokens [token, in] of x [..., in], in the shape of x.

    What holds no token comes back as it is.
    """
    rounded: Tensor = _StraightThrough.apply(x, rounding)  # type: ignore[no-untyped-call]
    return rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        if not x.numel():
            return x.clone()
        return rounding(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
