"""The base's final hidden states at every completion token, kept so that it runs only once."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.compiled import as_written
from divergent_tokens.errors import ModelError
from divergent_tokens.measure.batches import (
    SHARE_OF_MEMORY,
    BatchSize,
    free_bytes,
    in_batches,
    padded,
    run_batches,
)
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.segments import walk, walks
from divergent_tokens.models import Model
from divergent_tokens.store import content_key, read_entry, writing_entry


@dataclass(frozen=True)
class States:
    """Hidden states that predict the completions' tokens, prompt after prompt, without padding."""

    array: NDArray[Any]
    """[token, hidden]; bfloat16 is kept as the uint16 of the same bits."""
    offsets: NDArray[np.int64]
    """Where each prompt's tokens begin, and the end of the last. [prompt + 1]"""
    batch_size: int
    """With how many sequences at once they were made: candidates run in the same shapes."""
    compiled: bool = False
    """Whether compiled layers made them; candidates must run the same way."""
    _placed: dict[torch.device, Tensor] = field(default_factory=dict, init=False, compare=False)

    def of(self, prompt: int, device: torch.device) -> Tensor:
        """One prompt's hidden states [token, hidden]."""
        rows = torch.from_numpy(
            np.array(self.array[self.offsets[prompt] : self.offsets[prompt + 1]])
        )
        return _from_bits(rows).to(device)

    def of_batch(self, prompts: Sequence[int], device: torch.device) -> Tensor:
        """Several prompts' hidden states, one after the other. [token, hidden]"""
        rows = np.concatenate([np.arange(*self.offsets[i : i + 2]) for i in prompts])
        if device in self._placed or self._may_stay(device):
            return self._on(device)[torch.from_numpy(rows).to(device)]
        return _from_bits(torch.from_numpy(self.array[rows])).to(device)

    def _may_stay(self, device: torch.device) -> bool:
        """Whether an accelerator has room for them all: each candidate is held against them."""
        return device.type == "cuda" and self.array.nbytes < SHARE_OF_MEMORY * free_bytes(device)

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._placed:
            self._placed[device] = _from_bits(torch.from_numpy(np.array(self.array))).to(device)
        return self._placed[device]


@torch.no_grad()
def base_states(
    model: Model,
    head: Head,
    completions: Completions,
    *,
    batch_size: BatchSize,
    compiled: bool = False,
    cache: Path | None = None,
    progress: Progress = silent,
) -> States:
    """One teacher-forced pass of the base over prompts and completions, or what the cache kept.

    `compiled` says whether its layers are.
    """
    key = content_key(
        kind="states/1",
        model=model.fingerprint,
        dtype=str(model.dtype),
        device=device_name(model.device),
        attention=getattr(model.network.config, "_attn_implementation", None),
        batch_size=batch_size.value,
        versions=[torch.__version__, transformers.__version__, *(["compiled"] if compiled else [])],
        prompts=completions.prompts.digest,
        completions=content_key(ids=completions.ids.tolist(), lengths=completions.lengths.tolist()),
    )
    offsets = np.concatenate([[0], np.cumsum(completions.lengths)])
    entry = read_entry(cache, key)
    if entry is not None:
        batch_size.value = int(entry.header["batch_size"])
        return States(entry.arrays["hidden"], offsets, batch_size.value, compiled)
    with writing_entry(cache, key) if cache else nullcontext() as writer:
        array: NDArray[Any] | None = None
        for batch, rows in hidden_batches(model, head, completions, batch_size, "base", progress):
            for prompt, hidden in zip(batch, rows, strict=True):
                bits = _as_bits(hidden)
                if array is None:
                    shape = (int(offsets[-1]), hidden.shape[1])
                    array = (
                        writer.array("hidden", shape, bits.dtype)
                        if writer
                        else np.empty(shape, bits.dtype)
                    )
                array[offsets[prompt] : offsets[prompt + 1]] = bits
        if writer:
            writer.header["batch_size"] = batch_size.value
    assert array is not None  # there is a prompt, and a completion has a token
    return States(array, offsets, batch_size.value, compiled)


def device_name(device: torch.device) -> str:
    """Which processor computes: another one rounds differently."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def by_length(completions: Completions) -> list[int]:
    """The prompts in the order in which they run.

    The longest sequence comes first, so that memory runs out on the first batch if at all, and base
    and candidates run in the same shapes throughout.
    """
    lengths = completions.sequence_lengths.tolist()
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def hidden_batches(
    model: Model,
    head: Head,
    completions: Completions,
    batch_size: BatchSize,
    stage: str,
    progress: Progress,
) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
    """Batches of prompts, with the hidden states [token, hidden] that predict each completion.

    Where weights wait outside the device, all batches pass one layer after the other.
    """
    sequences = completions.sequences()
    order = by_length(completions)
    total = sum(map(len, sequences))
    done = 0

    def ids_of(batch: Sequence[int]) -> Tensor:
        return padded([sequences[i] for i in batch], model.device)

    def run(batch: Sequence[int]) -> list[Tensor]:
        ids = ids_of(batch)
        return completion_states(model, completions, batch, ids, head.hidden(ids))

    if walks(head, ids_of(order[:1])):
        batches = in_batches(order, batch_size)
        ids = [ids_of(batch) for batch in batches]
        walked = walk(head, ids, batch_size, partial(progress, stage))
        for prompts, own, hidden in zip(batches, ids, walked, strict=True):
            yield prompts, completion_states(model, completions, prompts, own, hidden)
        return
    for batch, rows in run_batches(order, batch_size, run):
        yield batch, rows
        done += sum(len(sequences[i]) for i in batch)
        progress(stage, done, total, "tokens")


def completion_states(
    model: Model, completions: Completions, batch: Sequence[int], ids: Tensor, hidden: Tensor
) -> list[Tensor]:
    """Of hidden states [prompt, token, hidden] those that predict each completion.

    Raises ModelError, naming the module, where they are not finite.
    """
    starts = [len(completions.prompts.prompts[i].ids) - 1 for i in batch]
    # Position t − 1 predicts token t.
    rows = [
        hidden[row, start : start + int(completions.lengths[i])]
        for row, (i, start) in enumerate(zip(batch, starts, strict=True))
    ]
    if not torch.isfinite(torch.cat(rows)).all():  # once a batch: an accelerator waits for it
        raise ModelError(not_finite(model, ids))
    return rows


def not_finite(model: Model, ids: Tensor) -> str:
    """What to say of a model whose outputs are not finite: which module was the first."""
    found: list[str] = []
    hooks = []
    for name, module in model.network.named_modules():

        def watch(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if (
                isinstance(first, Tensor)
                and first.is_floating_point()
                and not torch.isfinite(first).all()
            ):
                found.append(name)

        hooks.append(module.register_forward_hook(watch))
    try:
        with as_written(model.network):  # hooks do not reach into what is compiled
            model.network(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    where = f"first in {found[0]}" if found else "in its logits"
    return (
        f"{model.reference} computes NaN or infinite values, {where}; a model must give finite "
        "logits. Check its weights, or run it in another --dtype (float16 overflows where bfloat16 "
        "does not)"
    )


def _from_bits(rows: Tensor) -> Tensor:
    return rows.view(torch.bfloat16) if rows.dtype == torch.uint16 else rows


def _as_bits(hidden: Tensor) -> NDArray[Any]:
    hidden = hidden.cpu()
    return np.asarray(
        (hidden.view(torch.uint16) if hidden.dtype == torch.bfloat16 else hidden).numpy()
    )
