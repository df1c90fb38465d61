"""The rounding floor: the base with the lowest bit of its first layer's weights flipped at random.

It lives in this lane though it changes a model for a while: it is a measuring instrument's zero,
not a compression.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.errors import ModelError
from divergent_tokens.models import Model

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def lent_rounding(model: Model, *, seed: int = 0) -> Iterator[Model]:
    """The model with each weight of its first layer's matrices off by the last bit, or not.

    The flips are drawn by a CPU generator from the seed. Every bit comes back afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = first_layer(model.network).parameters()
    matrices = [p for p in parameters if p.ndim >= 2 and p.is_floating_point()]
    lent: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter in matrices:
            lent.append((parameter, parameter.data))
            parameter.data = _with_lowest_bits_flipped(parameter.data, generator)
        yield dataclasses.replace(model, reference=f"{model.reference} (rounding)")
    finally:
        for parameter, data in lent:
            parameter.data = data


def first_layer(network: PreTrainedModel) -> nn.Module:
    """The first decoder layer: that of the outermost list with as many modules as the config says.

    A layer may hold a longer list of its own (experts), and the model another one (vision).
    """
    outer: dict[str, nn.ModuleList] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{o}.") for o in outer):
            outer[name] = module
    n_layers = network.config.get_text_config(decoder=True).num_hidden_layers
    fitting = [layers for layers in outer.values() if len(layers) == n_layers]
    if not fitting:
        raise ModelError(
            f"{type(network).__name__} keeps its {n_layers} layers in no list of modules; "
            "expected one, to find the first layer"
        )
    return fitting[0][0]


def _with_lowest_bits_flipped(weights: Tensor, generator: torch.Generator) -> Tensor:
    flips = torch.randint(0, 2, weights.shape, generator=generator, dtype=torch.uint8)
    bits = weights.view(_BITS[weights.element_size()])
    return (bits ^ flips.to(bits.device, bits.dtype)).view(weights.dtype)
