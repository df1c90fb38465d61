"""Layers whose weights wait elsewhere, in CPU memory or on disk, until it is their turn.

accelerate places them and hangs a hook on every module that reads its weights for each call. Here
that is done once for as many calls as there are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import psutil
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.errors import ModelError
from divergent_tokens.layers import decoder_layers

SHARE_FOR_WEIGHTS = 0.7
"""Of an accelerator's free memory, where nobody said how much; what is computed needs the rest."""
SHARE_OF_CPU = 0.8


def is_offloaded(network: nn.Module) -> bool:
    """Whether weights of the network wait elsewhere."""
    return any(_offloading(module) is not None for module in network.modules())


def running_device(module: nn.Module) -> torch.device | None:
    """Where a module runs whose own weights wait elsewhere; None for any other."""
    hook = _offloading(module)
    return None if hook is None else torch.device(hook.execution_device)


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """All weights inside the module on the device where it runs, read once; then away again.

    What is at hand already stays so.
    """
    with ExitStack() as stack:
        for part in module.modules():
            hook = _offloading(part)
            if hook is None:
                continue
            hook.pre_forward(part)
            hook.offload = False
            stack.callback(_put_away, part, hook)
        yield


def _put_away(module: nn.Module, hook: AlignDevicesHook) -> None:
    hook.offload = True
    hook.post_forward(module, None)


@contextmanager
def lent_elsewhere(
    network: nn.Module, parameter: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """A parameter that waits elsewhere is changed each time that it is read, on its device."""
    before, hook, name = _weights_of(network, parameter)
    device = torch.device(hook.execution_device)
    hook.weights_map = _Changed(before, name, lambda weight: change(weight.to(device)))
    try:
        yield
    finally:
        hook.weights_map = before


def change_elsewhere(
    network: nn.Module, parameter: str, change: Callable[[Tensor], Tensor]
) -> None:
    """As `lent_elsewhere`, for good."""
    before, hook, name = _weights_of(network, parameter)
    device = torch.device(hook.execution_device)
    hook.weights_map = _Changed(before, name, lambda weight: change(weight.to(device)))


class StoredWeights(Mapping[str, Tensor]):
    """A network's state, tensors that wait elsewhere included, each read when it is asked for."""

    def __init__(self, network: nn.Module) -> None:
        """Of the network as it is now."""
        self._network, self._state = network, network.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        """As it lies there."""
        tensor: Tensor = self._state[name]
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return tensor
        weights, _, own = _weights_of(self._network, name)
        return weights[own]

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._state)

    def __len__(self) -> int:
        """How many."""
        return len(self._state)


def pin_weights(network: nn.Module) -> None:
    """Weights that wait in CPU memory wait in page-locked memory, from where copies are faster."""
    pinned: set[int] = set()
    room = SHARE_OF_CPU * psutil.virtual_memory().available
    for module in network.modules():
        hook = _offloading(module)
        weights = None if hook is None else hook.weights_map
        while isinstance(weights, PrefixedDataset):
            weights = weights.dataset
        held = getattr(weights, "state_dict", weights)
        if not isinstance(held, dict) or id(held) in pinned:
            continue
        pinned.add(id(held))
        for name, tensor in held.items():
            taken = 1 << (tensor.nbytes - 1).bit_length()  # torch's allocator rounds up
            if tensor.device.type == "cpu" and not tensor.is_pinned() and taken < room:
                held[name] = tensor.pin_memory()
                room -= taken - tensor.nbytes  # the other copy goes


def placement(
    outline: PreTrainedModel,
    devices: Sequence[torch.device],
    *,
    dtype: torch.dtype,
    max_memory: int | None,
) -> dict[str, Any] | None:
    """from_pretrained's device_map; None where the first device holds all.

    `outline` is the network on the meta device. Layers fill one device after the other, in their
    order, then CPU memory, then the disk; all else is on the first device. `max_memory`: bytes of
    weights on each device. Raises ModelError where not even the ends fit.
    """
    name, layers = decoder_layers(outline)
    sizes = [_n_bytes(layer, dtype) for layer in layers]
    ends = _n_bytes(outline, dtype) - sum(sizes)
    first = devices[0]
    if ends + sum(sizes) <= _room(first, max_memory):
        return None  # the others are not even asked
    widest = max(sizes)
    rooms = {device: _room(device, max_memory) for device in devices}
    if ends + widest > rooms[first]:
        raise ModelError(
            f"embeddings, head and one layer need {(ends + widest) / 2**20:.1f} MiB on {first}, "
            f"and {rooms[first] / 2**20:.1f} MiB are there for weights; give it more "
            "(--max-memory), or take another --device"
        )
    rooms[first] -= ends
    places = _filled(sizes, rooms)
    if "disk" in places:  # not all fit, and a layer that is read from elsewhere needs room too
        rooms[first] -= widest
        if first.type != "cpu":
            rooms[torch.device("cpu")] = _room(torch.device("cpu"), None)
        places = _filled(sizes, rooms)
    found: dict[str, Any] = {part: _named(first) for part, _ in _outside(outline, name)}
    return found | {f"{name}.{i}": _named(place) for i, place in enumerate(places)}


def _filled(sizes: Sequence[int], rooms: Mapping[torch.device, int]) -> list[torch.device | str]:
    """Where each layer goes: one place after the other is filled, and the rest is on disk."""
    found: list[torch.device | str] = []
    left = list(rooms.items())
    for size in sizes:
        while left and size > left[0][1]:
            del left[0]
        if not left:
            found.append("disk")
            continue
        place, room = left[0]
        left[0] = (place, room - size)
        found.append(place)
    return found


def _named(place: torch.device | str) -> str | int:
    """As accelerate wants it."""
    if isinstance(place, str):
        return place
    return str(place) if place.index is None else place.index


def _outside(network: nn.Module, layers: str) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that hold no decoder layer."""

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            name = f"{prefix}{child_name}"
            if name == layers:
                continue
            if layers.startswith(f"{name}."):
                yield from walk(f"{name}.", child)
            else:
                yield name, child

    return walk("", network)


def _n_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(
        p.numel() * (dtype.itemsize if p.is_floating_point() else p.element_size())
        for p in module.parameters()
    )


def _room(device: torch.device, max_memory: int | None) -> int:
    if max_memory is not None:
        return max_memory
    if device.type == "cuda":
        return int(SHARE_FOR_WEIGHTS * torch.cuda.mem_get_info(device)[0])
    return int(SHARE_OF_CPU * psutil.virtual_memory().available)


class _Changed(Mapping[str, Tensor]):
    """Weights that wait, one of them changed whenever it is read."""

    def __init__(
        self, weights: Mapping[str, Tensor], name: str, change: Callable[[Tensor], Tensor]
    ) -> None:
        self._weights, self._name, self._change = weights, name, change

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        return self._change(weight) if name == self._name else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _weights_of(
    network: nn.Module, parameter: str
) -> tuple[Mapping[str, Tensor], AlignDevicesHook, str]:
    """The mapping that a module reads this parameter from, its hook, and the name in there."""
    module_name, _, name = parameter.rpartition(".")
    hook = _hook(network.get_submodule(module_name))
    if hook is None or hook.weights_map is None:
        raise ModelError(
            f"{parameter} is not in memory, and no hook of accelerate's says where it waits; load "
            "the model whole"
        )
    return hook.weights_map, hook, name


def _offloading(module: nn.Module) -> AlignDevicesHook | None:
    hook = _hook(module)
    return hook if hook is not None and hook.offload else None


def _hook(module: nn.Module) -> AlignDevicesHook | None:
    """accelerate's hook that moves a module's weights, alone or among others."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((h for h in hooks if isinstance(h, AlignDevicesHook)), None)
