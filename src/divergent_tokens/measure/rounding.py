"""The rounding floor: the base with the lowest bit of its first layer's weights flipped at random.

It lives in this lane though it changes a model for a while: it is a measuring instrument's zero,
not a compression.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from divergent_tokens.layers import decoder_layers
from divergent_tokens.models import Model
from divergent_tokens.offload import at_hand

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def lent_rounding(model: Model, *, seed: int = 0) -> Iterator[Model]:
    """The model with each weight of its first layer's matrices off by the last bit, or not.

    The flips are drawn by a CPU generator from the seed. Every bit comes back afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    first = decoder_layers(model.network)[1][0]
    with at_hand(first):
        floats = [p for p in first.parameters() if p.is_floating_point()]
        # A packed checkpoint has matrices of integers; what it keeps in floats must do.
        matrices = [p for p in floats if p.ndim >= 2] or floats
        lent: list[tuple[nn.Parameter, Tensor]] = []
        try:
            for parameter in matrices:
                lent.append((parameter, parameter.data))
                parameter.data = _with_lowest_bits_flipped(parameter.data, generator)
            yield dataclasses.replace(model, reference=f"{model.reference} (rounding)")
        finally:
            for parameter, data in lent:
                parameter.data = data


def _with_lowest_bits_flipped(weights: Tensor, generator: torch.Generator) -> Tensor:
    flips = torch.randint(0, 2, weights.shape, generator=generator, dtype=torch.uint8)
    bits = weights.view(_BITS[weights.element_size()])
    return (bits ^ flips.to(bits.device, bits.dtype)).view(weights.dtype)
