"""A network in training and its copies on other devices, which take part of every step."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.errors import DivergentTokensError

Backward = Callable[[Any, Any, Tensor], float]
"""The loss of a network, a teacher and ids [sequence, token], gradients added to the network's."""


@dataclass(frozen=True)
class _Pair:
    """What computes together on one device."""

    network: PreTrainedModel
    teacher: PreTrainedModel | None
    device: torch.device


class Replicas:
    """A network and its teacher, and copies of both; gradients end up in the network itself."""

    def __init__(
        self,
        network: PreTrainedModel,
        teacher: PreTrainedModel | None,
        devices: Sequence[torch.device | str] = (),
    ) -> None:
        """`devices`: the network's own first, then one for each copy; none: no copies.

        A copy takes the memory of the weights, their gradients and the teacher, where there is one.
        """
        own = network.device
        others = [torch.empty(0, device=device).device for device in devices]
        if others and others.pop(0) != own:
            raise DivergentTokensError(
                f"training on {', '.join(map(str, devices))} was asked for, but the network lies "
                f"on {own}; name its own device first"
            )
        self._own = _Pair(network, teacher, own)
        self._copies = [
            _Pair(_at(network, device), None if teacher is None else _at(teacher, device), device)
            for device in others
        ]

    def __len__(self) -> int:
        """On how many devices a step is computed."""
        return 1 + len(self._copies)

    @torch.no_grad()
    def send_weights(self) -> None:
        """Every copy computes with the network's weights of this moment."""
        for pair in self._copies:
            parameters = zip(pair.network.parameters(), self._own.network.parameters(), strict=True)
            for theirs, own in parameters:
                theirs.copy_(own, non_blocking=True)

    def backward(self, parts: Sequence[Tensor], work: Backward) -> list[float]:
        """The losses of the parts, dealt out in turn, and the sum of their gradients.

        The first error of a part, in their order of devices, is raised when all are at rest. Sums
        are made in a fixed order, so that a run is the same each time.
        """
        pairs = [self._own, *self._copies][: len(parts)]
        losses = [0.0] * len(parts)

        def run(first: int, pair: _Pair) -> None:
            with _current(pair.device):
                for i in range(first, len(parts), len(pairs)):
                    part = parts[i].to(pair.device)
                    losses[i] = work(pair.network, pair.teacher, part)

        if len(pairs) == 1:
            run(0, self._own)
            return losses
        # A loss is waited for after its backward pass: without threads the others would wait too.
        with ThreadPoolExecutor(len(pairs)) as pool:
            done = [pool.submit(run, i, pair) for i, pair in enumerate(pairs)]
            wait(done)
        for one in done:
            one.result()
        self._add_gradients()
        return losses

    @torch.no_grad()
    def _add_gradients(self) -> None:
        for pair in self._copies:
            parameters = zip(self._own.network.parameters(), pair.network.parameters(), strict=True)
            for own, theirs in parameters:
                if theirs.grad is None:  # an expert that no token of these was sent to
                    continue
                found = theirs.grad.to(own.device)
                theirs.grad = None
                own.grad = found if own.grad is None else own.grad.add_(found)

    def clear_gradients(self) -> None:
        """None is left on any device."""
        for pair in (self._own, *self._copies):
            pair.network.zero_grad(set_to_none=True)

    def train(self, again: bool) -> None:
        """Modules that make activations again are set to, which they do in training mode only.

        All others compute as ever: dropout would be noise against the base's own distribution.
        """
        for pair in (self._own, *self._copies):
            for module in pair.network.modules():
                module.training = again and getattr(module, "gradient_checkpointing", False)


def _at(network: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A copy on a device, without another one in between where the network lies."""
    copied: dict[int, Any] = {}
    for parameter in network.parameters():
        data = parameter.detach().to(device, copy=True)
        copied[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for buffer in network.buffers():
        copied[id(buffer)] = buffer.to(device, copy=True)
    return copy.deepcopy(network, copied)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """What a thread needs: kernels of some libraries run on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def training_devices(network: PreTrainedModel) -> tuple[torch.device, ...]:
    """Every GPU that there is, the network's own first; its own alone elsewhere.

    Also its own alone where it is spread over several already.
    """
    own = network.device
    if own.type != "cuda" or len({parameter.device for parameter in network.parameters()}) > 1:
        return (own,)
    every = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return (own, *(device for device in every if device != own))
