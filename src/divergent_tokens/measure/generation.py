"""Text written by a model, greedy or drawn; nothing of its generation config is used."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Not cuDNN's: it plans anew for each length of the cache, a tenth of a second a token."""


@torch.no_grad()
def generate(
    network: PreTrainedModel,
    prompt_ids: Tensor,
    *,
    new_tokens: int,
    eos_ids: Sequence[int] = (),
    sample: bool = False,
    seed: int = 0,
    on_step: Callable[[], None] | None = None,
) -> list[list[int]]:
    """New token ids of each prompt [prompt, token] (one length, no padding).

    Greedy is the argmax of the raw logits in float32, ties to the lowest id. A sequence ends with
    its first end-of-sequence token, which is kept, or after `new_tokens`. Drawn text depends
    on the seed, the batch and the device.
    """
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens,
        do_sample=sample,
        num_beams=1,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=eos_ids[0] if eos_ids else 0,
        **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}),
    )
    devices = [prompt_ids.device] if prompt_ids.is_cuda else []
    with (
        _bare_generation_config(network),
        torch.random.fork_rng(devices, enabled=sample),
        sdpa_kernel(ATTENTION),
    ):
        if sample:
            torch.manual_seed(seed)
        output: Any = network.generate(  # type: ignore[operator]
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            generation_config=config,
            streamer=_Steps(on_step) if on_step else None,
        )
    rows = output[:, prompt_ids.shape[1] :].tolist()
    return [until_end(row, set(eos_ids)) for row in rows]


class _Steps(BaseStreamer):
    """Tells of each step of a generation; transformers hands over the prompt first."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self._on_step = on_step
        self._prompt_seen = False

    def put(self, _value: Tensor) -> None:
        if self._prompt_seen:
            self._on_step()
        self._prompt_seen = True

    def end(self) -> None:
        pass


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """Ids up to the first of the ends, which is kept."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1]
    return ids


@contextmanager
def _bare_generation_config(network: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's generation config: generate() fills every unset field from it.

    A repetition penalty or suppressed tokens there would make the base diverge from its own argmax.
    """
    own = network.generation_config
    network.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        network.generation_config = own
