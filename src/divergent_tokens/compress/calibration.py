"""What goes into components when the base reads text: second moments of their inputs."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.expert_forward import (
    ExpertInputs,
    check_experts,
    open_experts,
    stack_members,
)
from divergent_tokens.errors import ModelError

ROOM_BYTES = 2 * 2**30
"""Of what is collected in one reading of the text; more takes several readings."""
TOKENS = 4096
"""Read at once, at most: texts of one length that follow each other."""


@dataclass(frozen=True)
class Calibration:
    """Texts that a base reads, as token ids."""

    rows: tuple[tuple[int, ...], ...]
    source: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of the ids: texts are the same when their tokens are."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(np.asarray([len(row), *row], dtype="<i4").tobytes())
        return found.hexdigest()


def second_moments(
    network: PreTrainedModel, components: Sequence[Component], calibration: Calibration
) -> Iterator[tuple[Component, Tensor]]:
    """Each component with Σ x xᵀ [in, in] over all tokens that go into it, float32.

    Those that are given the very same inputs, q, k and v say, share one moment. It is zero where
    nothing goes in: an expert that no token is sent to.

    Raises ModelError, naming the component, for inputs that are not finite, and for experts of a
    class that does not declare how it computes.
    """
    check_experts(network, components)
    for block in in_blocks(components, moment_bytes):
        moments = _collected(network, block, calibration)
        for component in block:
            moment = moments.pop(component.name, None)
            if moment is None:
                n_in, place = component.shape[1], weight_of(network, component).device
                moment = torch.zeros(
                    n_in, n_in, device=network.device if place.type == "meta" else place
                )
            if not bool(moment.isfinite().all()):
                raise ModelError(
                    f"what goes into {component.name} is not finite on {calibration.source}; run "
                    "the model in another --dtype (float16 overflows where bfloat16 does not)"
                )
            yield component, moment


def moment_bytes(component: Component) -> int:
    """Of what is collected of one component."""
    return 4 * component.shape[1] ** 2


def in_blocks(
    components: Sequence[Component], n_bytes: Callable[[Component], int]
) -> Iterator[list[Component]]:
    """Runs of components that have room together, in `ROOM_BYTES`."""
    block: list[Component] = []
    total = 0
    for component in components:
        size = n_bytes(component)
        if block and total + size > ROOM_BYTES:
            yield block
            block, total = [], 0
        block.append(component)
        total += size
    if block:
        yield block


@torch.no_grad()
def _collected(
    network: PreTrainedModel, components: Sequence[Component], calibration: Calibration
) -> dict[str, Tensor]:
    sums = _Sums(components)
    with ExitStack() as stack:
        for component in components:
            if component.stack_index is None:
                module = network.get_submodule(component.parameter.removesuffix(".weight"))
                hook = module.register_forward_pre_hook(partial(sums.at_module, component.name))
                stack.callback(hook.remove)
        stack.enter_context(open_experts(network, components, sums.at_experts))
        for batch in _batches(calibration.rows):
            network.base_model(batch.to(network.device), use_cache=False)
            sums.forget()
    return sums.by_name()


class _Sums:
    """Σ x xᵀ of what goes in, once for all that are given the very same inputs."""

    def __init__(self, components: Sequence[Component]) -> None:
        self._components = components
        self._members = stack_members(components)
        self._moments: dict[str, Tensor] = {}
        self._same_as: dict[str, str] = {}
        """Component -> the one before it that is given the same inputs."""
        self._last: tuple[Any, dict[int | None, str]] = (None, {})
        """The last inputs, and whose they were, by expert."""

    def at_module(self, name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """What goes into a module of its own."""
        self._add(inputs[0], {None: (name, inputs[0])})

    def at_experts(self, inputs: ExpertInputs, times: Callable[[Tensor], Tensor]) -> Tensor:
        """What goes into one part of all experts of a layer."""
        rows = torch.split(inputs.x, inputs.counts.tolist())
        members = self._members.get((inputs.stack, inputs.part), {})
        self._add(inputs.x, {e: (self._components[i].name, rows[e]) for e, i in members.items()})
        return times(inputs.x)

    def _add(self, whole: Any, parts: Mapping[int | None, tuple[str, Tensor]]) -> None:
        """The parts of one input, by expert, with the component that each goes into."""
        before = self._last[1] if self._last[0] is whole else {}
        for expert, (name, part) in parts.items():
            if expert in before:
                self._same_as[name] = before[expert]
            elif part.numel():
                rows = part.detach().reshape(-1, part.shape[-1]).float()
                own = rows.T @ rows
                self._moments[name] = self._moments[name] + own if name in self._moments else own
        owners = {expert: name for expert, (name, _) in parts.items()}
        self._last = (whole, owners | before)

    def forget(self) -> None:
        """What went in last: it would take memory until the next batch."""
        self._last = (None, {})

    def by_name(self) -> dict[str, Tensor]:
        """Of every component that anything went into."""
        owners = {c.name: self._same_as.get(c.name, c.name) for c in self._components}
        return {n: self._moments[owner] for n, owner in owners.items() if owner in self._moments}


def _batches(rows: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Ids [text, token] without padding."""
    for length, alike in groupby(rows, key=len):
        yield from torch.split(torch.tensor(list(alike)), max(1, TOKENS // max(1, length)))
