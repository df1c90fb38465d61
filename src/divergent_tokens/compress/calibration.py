"""What goes into components when the base reads text: second moments of their inputs."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.compress.components import Component
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

    The components are modules of their own. Those that are given the very same inputs, q, k and v
    say, share one moment. It is zero where nothing goes in: an expert that no token is sent to.

    Raises ModelError, naming the component, for inputs that are not finite.
    """
    for block in in_blocks(components, lambda c: 4 * c.shape[1] ** 2):
        moments = _collected(network, block, calibration)
        for component in block:
            moment = moments.pop(component.name, None)
            if moment is None:
                n_in = component.shape[1]
                moment = torch.zeros(n_in, n_in, device=network.device)
            if not bool(moment.isfinite().all()):
                raise ModelError(
                    f"what goes into {component.name} is not finite on {calibration.source}; run "
                    "the model in another --dtype (float16 overflows where bfloat16 does not)"
                )
            yield component, moment


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
    moments: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    """Component -> the one before it that is given the same inputs."""
    last: list[tuple[Any, str]] = []
    """The last inputs, and whose they were."""

    def add(name: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if last and last[0][0] is x:
            same_as[name] = last[0][1]
            return
        last[:] = [(x, name)]
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        moments[name] = moments[name] + rows.T @ rows if name in moments else rows.T @ rows

    with ExitStack() as stack:
        for component in components:
            module = network.get_submodule(component.parameter.removesuffix(".weight"))
            hook = module.register_forward_pre_hook(partial(add, component.name))
            stack.callback(hook.remove)
        for batch in _batches(calibration.rows):
            network.base_model(batch.to(network.device), use_cache=False)
            last.clear()
    owners = {c.name: same_as.get(c.name, c.name) for c in components}
    return {name: moments[owner] for name, owner in owners.items() if owner in moments}


def _batches(rows: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Ids [text, token] without padding."""
    for length, alike in groupby(rows, key=len):
        yield from torch.split(torch.tensor(list(alike)), max(1, TOKENS // length))
