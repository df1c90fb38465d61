"""The decoder layers of a network, whatever its architecture calls them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from divergent_tokens.errors import ModelError


def decoder_layers(network: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of the decoder's layers, with its name in the network.

    It is the outermost list with the most weights: names differ (`layers`, `h`, `blocks`), and
    some decoders keep small lists of other things beside it. A layer may hold longer lists of its
    own (experts), and the model another one (vision).
    """
    in_decoder = set(cast(Any, network).get_decoder().modules())
    lists: dict[str, nn.ModuleList] = {}
    for name, module in network.named_modules():
        nested = name.startswith(tuple(f"{outer}." for outer in lists))
        if isinstance(module, nn.ModuleList) and module in in_decoder and not nested:
            lists[name] = module
    if not lists:
        raise ModelError(
            f"{type(network).__name__} has no list of decoder layers; expected a decoder-only "
            "language model"
        )
    return max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def operations_a_token(network: PreTrainedModel) -> float:
    """Floating-point operations of all layers' products: two for each weight that a token meets.

    An estimate: experts that are modules of their own count as if all were used.
    """
    return sum(
        2.0 * parameter.numel() * (used_experts(network) / len(parameter) if is_stack else 1.0)
        for parameter, is_stack in layer_matrices(network)
    )


def layer_matrices(network: PreTrainedModel) -> Iterator[tuple[nn.Parameter, bool]]:
    """The layers' matrices, and stacks [expert, ...] of them, which are marked."""
    for parameter in decoder_layers(network)[1].parameters():
        if parameter.ndim in (2, 3):
            yield parameter, parameter.ndim == 3


def used_experts(network: PreTrainedModel) -> int:
    """How many routed experts of a layer each token passes; 1 where the config does not say."""
    config = network.config.get_text_config()
    names = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
    return next((found for name in names if (found := getattr(config, name, None))), 1)


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward for a while."""
    before = module.__dict__.get("forward")  # accelerate puts its own here
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
