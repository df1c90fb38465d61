"""LLM.int8 (Dettmers et al. 2022) as bitsandbytes computes it: 8 bits but for outlying inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.straight_through import straight_through
from divergent_tokens.errors import SchemeError

THRESHOLD = 6.0
"""Input columns that reach it in any token of a call are left as they are, as transformers sets."""
_LARGEST_CODE = 127


@dataclass(frozen=True)
class LlmInt8:
    """`llm.int8`: weights of 8 bits by output channel, inputs of 8 bits by token but for outliers.

    Which columns of the inputs are outliers is decided over all tokens of a call, so that what
    comes out depends a little on what is run together.
    """

    def __str__(self) -> str:
        """The text."""
        return "llm.int8"

    def check(self, components: Sequence[Component]) -> None:
        """Refuse where bitsandbytes is not installed."""
        if find_spec("bitsandbytes") is None:
            raise SchemeError(
                "llm.int8 is computed by bitsandbytes, which is not installed; pip install "
                "bitsandbytes (or divergent-tokens[bnb]), or take w8a8"
            )

    @property
    def by_rows(self) -> bool:
        """True: a scale a row."""
        return True

    @property
    def activations(self) -> "OutlierInputs":
        """Integers per token, but for outliers."""
        return OutlierInputs()

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The matrix after coding and decoding; bitsandbytes reads it in float16."""
        codes, scales, _ = _quantized(weight, 0.0)
        return _decoded(codes, scales).to(weight.dtype)

    def size_bytes(self, component: Component, size_before: int) -> int:
        """A byte a weight, and a float32 scale an output channel."""
        return component.n_parameters + 4 * component.shape[0]


@dataclass(frozen=True)
class OutlierInputs:
    """Inputs rounded to 8 bits per token, except for columns that hold an outlier."""

    def quantize(self, x: Tensor) -> Tensor:
        """The inputs [..., in] as their codes stand for, in the same shape and dtype.

        Gradients pass as if nothing had been rounded.
        """
        return straight_through(x, _rounded)


def _rounded(tokens: Tensor) -> Tensor:
    """[token, in]"""
    codes, scales, outliers = _quantized(tokens, THRESHOLD)
    rounded = _decoded(codes, scales).to(tokens.dtype)
    if outliers is not None and outliers.numel():
        rounded[:, outliers] = tokens[:, outliers]
    return rounded


@torch.no_grad()
def _quantized(rows: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes [row, in], the largest weight of each row, and the columns with outliers."""
    from bitsandbytes.functional import int8_vectorwise_quant

    # It writes zeros over outliers in what it is given.
    found: tuple[Tensor, Tensor, Tensor | None] = int8_vectorwise_quant(
        rows.to(torch.float16, copy=True).contiguous(), threshold=threshold
    )
    return found


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [row, in]"""
    return codes.float() * (scales.float()[:, None] / _LARGEST_CODE)
