"""Layers and arithmetic compiled for a GPU, where enough work follows to pay for it.

torch.compile makes one kernel of what else are many passes over memory. It takes tens of seconds,
once for each shape; so it is asked for by whoever knows how much there is to do.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from divergent_tokens.layers import decoder_layers, with_forward

P = ParamSpec("P")
T = TypeVar("T")

LONG_WORK = 1e16
"""So many operations take a GPU the better part of a minute, which is what compiling takes."""

_log = logging.getLogger(__name__)
_on = [False]
"""For all threads: a backward pass calls its hooks from one of its own."""


def compiling_pays(network: PreTrainedModel, operations: float) -> bool:
    """Whether this network, for so many floating-point operations, should run compiled.

    On a CPU it does not: products take nearly all of the time there.
    """
    able = bool(getattr(network, "_can_compile_fullgraph", False))
    return able and network.device.type == "cuda" and operations > LONG_WORK


@contextmanager
def compiled_layers(network: PreTrainedModel, on: bool) -> Iterator[None]:
    """The decoder's layers run compiled, and what is `fused` does, as long as the context lasts.

    Layers of one class share what is compiled. No hook may be put on what is inside a layer.
    """
    with ExitStack() as stack:
        stack.enter_context(_fusing(on))
        for layer in decoder_layers(network)[1] if on else ():
            forward = partial(_compiled(type(layer).forward), layer)
            stack.enter_context(with_forward(layer, forward))
        yield


@contextmanager
def compiled_norms(network: PreTrainedModel, on: bool) -> Iterator[None]:
    """As `compiled_layers`, where layers hold hooks: only modules without a matrix are compiled."""
    with ExitStack() as stack:
        stack.enter_context(_fusing(on))
        for module in network.modules() if on else ():
            if _is_norm(module):
                forward = partial(_compiled(type(module).forward), module)
                stack.enter_context(with_forward(module, forward))
        yield


def fused(function: Callable[P, T]) -> Callable[P, T]:
    """The function, compiled where `compiled_layers` or `compiled_norms` says so."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        found: T = (_compiled(function) if _on[-1] else function)(*args, **kwargs)
        return found

    return run


def fusing() -> bool:
    """Whether numbers come from compiled kernels now, which round otherwise."""
    return _on[-1]


@contextmanager
def _fusing(on: bool) -> Iterator[None]:
    _on.append(on)
    try:
        yield
    finally:
        _on.pop()


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    alone = next(module.children(), None) is None
    return bool(own) and alone and all(p.ndim == 1 for p in own)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled; as it is from the first time on that the compiler fails."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    # Rounding to the model's dtype is part of what schemes do; a fused kernel would leave it out.
    ways = [torch.compile(function, options={"emulate_precision_casts": True}), function]

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return ways[0](*args, **kwargs)
        except (TorchDynamoException, InductorError) as error:
            if len(ways) == 1:
                raise
            del ways[0]
            _log.warning("%s runs uncompiled: %s", function.__qualname__, error)
            return function(*args, **kwargs)

    return run
