"""Greedy text from a static cache: on a GPU each step is one CUDA graph, captured once.

Nothing is compiled, so that it pays from some ten steps on; a step costs what its kernels cost.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from divergent_tokens.measure.generation import until_end

EAGER_STEPS = 2
"""Before the capture, so that libraries have made what they make at their first call."""
STEPS_BETWEEN_LOOKS = 16
"""Whether all sequences have ended is asked so often: a GPU waits for each answer."""


def can_decode(network: PreTrainedModel) -> bool:
    """Whether steps of a network can be replayed: all that changes from one to the next is tensors.

    Sliding windows and state-space layers count in Python; layers on several devices are moved by
    hooks.
    """
    able = bool(getattr(network, "_can_compile_fullgraph", False))
    if not able or len(set(getattr(network, "hf_device_map", {"": 0}).values())) > 1:
        return False
    layers = StaticCache(config=network.config, max_cache_len=2).layers
    return all(type(layer) is StaticLayer for layer in layers)


@torch.no_grad()
def decode(
    network: PreTrainedModel,
    prompt_ids: Tensor,
    *,
    new_tokens: int,
    eos_ids: Sequence[int] = (),
    replay: bool = True,
    on_step: Callable[[], None] | None = None,
    at_most: int | None = None,
) -> list[list[int]]:
    """As `generate`: greedy new ids of each prompt [prompt, token] (one length, no padding).

    `replay` is for a GPU; without it every step runs by itself, with the same numbers. `at_most`
    stops after so many tokens, with a cache that is large enough for all.
    """
    n = min(new_tokens, at_most or new_tokens)
    written = torch.zeros((len(prompt_ids), n), dtype=torch.long, device=prompt_ids.device)
    ends = torch.tensor(list(eos_ids), device=prompt_ids.device)
    steps = _Steps(network, prompt_ids, prompt_ids.shape[1] + new_tokens, replay=replay)
    for i in range(n):
        written[:, i] = steps.token[:, 0]
        if on_step is not None:
            on_step()
        if i + 1 == n or (_is_time(i) and _all_ended(written[:, : i + 1], ends)):
            break
        steps.take()
    found = written[:, : i + 1].tolist()
    return [until_end(row, set(eos_ids)) for row in found]


def _is_time(i: int) -> bool:
    return (i + 1) % STEPS_BETWEEN_LOOKS == 0


def _all_ended(written: Tensor, ends: Tensor) -> bool:
    return len(ends) > 0 and bool(torch.isin(written, ends).any(1).all())


def _captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """The graph of a step, which does not run.

    On its own device, since on another a graph stays empty; and within a stream, so that a capture
    that fails leaves none behind.
    """
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph),
    ):
        step()
    return graph


class _Steps:
    """The last token of each sequence, and what it takes to get the next."""

    def __init__(
        self, network: PreTrainedModel, prompt_ids: Tensor, length: int, *, replay: bool
    ) -> None:
        """The prompts' own tokens have been read."""
        names = inspect.signature(network.forward).parameters
        cache_name = "cache" if "cache" in names else "past_key_values"
        cache = StaticCache(config=network.config, max_cache_len=length)
        self._options: dict[str, Any] = {cache_name: cache, "use_cache": True, "logits_to_keep": 1}
        self._network, self._replay = network, replay
        self._graph: torch.cuda.CUDAGraph | None = None
        self._n_taken = 0
        self.token = self._next(prompt_ids)  # [prompt, 1], in the same place from now on

    def take(self) -> None:
        """One more token for each sequence."""
        if self._graph is None and self._replay and self._n_taken >= EAGER_STEPS:
            self._graph = _captured(self._advance, self.token.device)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._advance()
        self._n_taken += 1

    def _advance(self) -> None:
        self.token.copy_(self._next(self.token))

    def _next(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._network(input_ids=ids, **self._options).logits[:, -1]
        return logits.float().argmax(-1, keepdim=True)  # the lowest id of equals
