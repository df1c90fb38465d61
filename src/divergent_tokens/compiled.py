"""Layers and arithmetic compiled for a GPU, where enough work follows to pay for it.

torch.compile makes one kernel of what else are many passes over memory. That takes some ten seconds
for each kind of layer, so whoever knows how much there is to do says whether to.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from transformers import PreTrainedModel

from divergent_tokens.layers import decoder_layers, with_forward

P = ParamSpec("P")
T = TypeVar("T")

LONG_WORK = {2: 1e16, 4: 1e15}
"""So many operations take a GPU the better part of a minute, which is what compiling takes.

By bytes of a number: tensor cores do those of two."""

_log = logging.getLogger(__name__)


def compiling_pays(network: PreTrainedModel, operations: float) -> bool:
    """Whether this network, for so many floating-point operations, should run compiled.

    On a CPU it should not: products take nearly all of the time there.
    """
    able = bool(getattr(network, "_can_compile_fullgraph", False)) and can_compile(network)
    long = operations > LONG_WORK.get(network.dtype.itemsize, LONG_WORK[2])
    return able and network.device.type == "cuda" and long and compiler_works(network.device)


def can_compile(network: PreTrainedModel) -> bool:
    """Whether the layers run the forwards of their classes.

    Those that others put there (accelerate moves weights and inputs in its own) are not compiled.
    """
    layers = decoder_layers(network)[1]
    return not any("forward" in vars(m) for layer in layers for m in layer.modules())


@contextmanager
def several_passes_back(on: bool) -> Iterator[None]:
    """What is compiled meanwhile can be gone back through more than once.

    Else its backward pass overwrites what it was given, and a second one finds other numbers there,
    without a word. It is a matter of when things are compiled, so it holds for single passes too;
    and what was compiled the other way and kept on disk has to have another key.
    """
    with ExitStack() as stack:
        if on:
            stack.enter_context(functorch_config.patch(donated_buffer=False))
            config: Any = torch.compiler.config
            stack.enter_context(config.patch(cache_key_tag="several passes back"))
        yield


@contextmanager
def compiled_layers(network: PreTrainedModel, on: bool) -> Iterator[None]:
    """The decoder's layers run compiled as long as the context lasts, if it is on.

    Layers of one class share what is compiled, for batches of any shape. A hook that is put on what
    lies inside a layer meanwhile is not called, see `as_written`.
    """
    with ExitStack() as stack:
        if on:
            _ignore_gradients(stack)
        for layer in decoder_layers(network)[1] if on else ():
            _compile(stack, layer)
        yield


@contextmanager
def compiled_norms(network: PreTrainedModel, on: bool) -> Iterator[None]:
    """As `compiled_layers`, where layers hold hooks: only modules without a matrix are compiled."""
    with ExitStack() as stack:
        if on:
            _ignore_gradients(stack)
        for module in network.modules() if on else ():
            if _is_norm(module):
                _compile(stack, module)
        yield


@contextmanager
def as_written(network: PreTrainedModel) -> Iterator[None]:
    """The network's own forwards for a while, whatever is compiled."""
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(vars(module).get("forward"), _Compiled):
                forward = partial(type(module).forward, module)
                stack.enter_context(with_forward(module, forward))
        yield


@cache
def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function compiled, for tensors of any shape.

    Rounding to a tensor's dtype is part of what schemes do: it is kept, where a fused kernel would
    go on with more digits.
    """
    return torch.compile(function, dynamic=True, options={"emulate_precision_casts": True})


@cache
def compiler_works(device: torch.device) -> bool:
    """Whether a small function can be compiled and differentiated; a warning says why not."""
    x = torch.ones(8, device=device, requires_grad=True)
    try:
        with torch.enable_grad():
            compiled(_small)(x).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that is missing, or one that does not know the device
        _log.warning("torch.compile does not work here, so nothing is compiled: %s", error)
        return False
    return True


class _Compiled(partial[T]):
    """A module's forward, known as one of ours."""


def _compile(stack: ExitStack, module: nn.Module) -> None:
    if "forward" in vars(module):
        return  # somebody's own, which moves weights, say
    forward = _Compiled(compiled(type(module).forward), module)
    stack.enter_context(with_forward(module, forward))


def _ignore_gradients(stack: ExitStack) -> None:
    """The compiler looks at every .grad, of which torch warns."""
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor")


def _small(x: Tensor) -> Tensor:
    return (x.exp() * x).sum()


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    alone = next(module.children(), None) is None
    return bool(own) and alone and all(p.ndim == 1 for p in own)
