"""The base's greedy continuations: what every candidate is compared with."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.batches import BatchSize, first_batch_size, run_batches
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.measure.vllm import generate_by_vllm
from divergent_tokens.measure.ways import WAYS, fastest_way
from divergent_tokens.models import Model
from divergent_tokens.store import content_key, read_entry, writing_entry


@dataclass(frozen=True)
class Completions:
    """What the base wrote after each prompt."""

    prompts: PromptSet
    ids: NDArray[np.int32]
    """Token ids, zero where there is none. [prompt, token]"""
    mask: NDArray[np.bool_]
    """Which tokens exist, True from the left. [prompt, token]"""
    new_tokens: int
    """N, the most tokens a completion may have."""
    ignore_eos: bool
    decoding: str = "dynamic"
    """Which way of `ways.py` was used most: in bfloat16 another way writes another text."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """L of each completion. [prompt]"""
        return np.asarray(self.mask.sum(1), dtype=np.int64)

    @property
    def sequence_lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt and its completion together. [prompt]"""
        return np.array([len(prompt.ids) for prompt in self.prompts.prompts]) + self.lengths

    def sequences(self) -> list[list[int]]:
        """Prompt and completion of each prompt in one list."""
        return [
            [*prompt.ids, *row[:length].tolist()]
            for prompt, row, length in zip(
                self.prompts.prompts, self.ids, self.lengths, strict=True
            )
        ]

    def subset(self, rows: Sequence[int]) -> "Completions":
        """The same for some of the prompts."""
        prompts = dataclasses.replace(
            self.prompts, prompts=tuple(self.prompts.prompts[i] for i in rows)
        )
        chosen = list(rows)
        return dataclasses.replace(
            self, prompts=prompts, ids=self.ids[chosen], mask=self.mask[chosen]
        )


def complete(
    model: Model,
    prompts: PromptSet,
    *,
    new_tokens: int = 128,
    ignore_eos: bool = False,
    batch_size: int | None = None,
    by_vllm: bool = False,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Completions:
    """The model's greedy continuation of each prompt, from the cache where it is known already.

    Greedy is the argmax of raw logits in float32, whatever the checkpoint's generation config says;
    only its end-of-sequence ids are used. Such a token ends a completion and is its last one; with
    `ignore_eos` every completion has `new_tokens` tokens. transformers writes, in the fastest of
    its ways, or vLLM (`by_vllm`). Raises PromptError where prompt and completion do not fit the
    model's positions.
    """
    check_positions(model, prompts, new_tokens)
    key = content_key(
        kind="completions/1",
        model=model.fingerprint,
        dtype=str(model.dtype),
        device=model.device.type,
        prompts=prompts.digest,
        new_tokens=new_tokens,
        eos_ids=[] if ignore_eos else list(model.eos_ids),
        **({"by": "vllm"} if by_vllm else {}),
    )
    entry = read_entry(cache, key)
    if entry is None:
        if by_vllm:
            ends = () if ignore_eos else model.eos_ids
            given = [prompt.ids for prompt in prompts.prompts]
            rows = generate_by_vllm(model, given, new_tokens=new_tokens, eos_ids=ends)
            way = "vllm"
        else:
            rows, way = _generate_all(
                model, prompts, new_tokens, ignore_eos, batch_size, cache, progress
            )
        ids, lengths = _padded(rows)
        if cache is not None:
            with writing_entry(cache, key) as writer:
                writer.header["decoding"] = way
                writer.array("ids", ids.shape, ids.dtype)[:] = ids
                writer.array("lengths", lengths.shape, lengths.dtype)[:] = lengths
    else:
        ids, lengths = np.array(entry.arrays["ids"]), np.array(entry.arrays["lengths"])
        way = entry.header.get("decoding", "dynamic")
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    return Completions(prompts, ids, mask, new_tokens, ignore_eos, way)


def check_positions(model: Model, prompts: PromptSet, new_tokens: int) -> None:
    """Raise PromptError where a prompt and its completion would not fit the model's positions."""
    if new_tokens < 1:
        raise PromptError(f"new_tokens is {new_tokens}; expected at least 1")
    longest = max(len(prompt.ids) for prompt in prompts.prompts)
    limit = model.max_positions
    if limit is not None and longest + new_tokens > limit:
        raise PromptError(
            f"a prompt of {longest} tokens and {new_tokens} new ones need {longest + new_tokens} "
            f"positions; {model.reference} has {limit}. Use a smaller --prefix or --new-tokens"
        )


def _generate_all(
    model: Model,
    prompts: PromptSet,
    new_tokens: int,
    ignore_eos: bool,
    batch_size: int | None,
    cache: Path | None,
    progress: Progress,
) -> tuple[list[list[int]], str]:
    """What was written after each prompt, and the way in which most of it was."""
    size = BatchSize(batch_size) if batch_size else first_batch_size(model.device)
    ends = () if ignore_eos else model.eos_ids
    rows: list[list[int]] = [[] for _ in prompts.prompts]
    total = len(prompts) * new_tokens
    done = 0
    ways: Counter[str] = Counter()

    def run(batch: Sequence[int]) -> list[list[int]]:
        steps = 0

        def on_step() -> None:
            nonlocal steps
            steps += 1
            progress("completions", done + steps * len(batch), total, "tokens")

        ids = torch.tensor([prompts.prompts[i].ids for i in batch], device=model.device)
        # The last, smaller batch has another shape.
        n_steps = new_tokens * (n_batches if len(batch) == size.value else 1)
        way = fastest_way(model, ids, new_tokens=new_tokens, n_steps=n_steps, cache=cache)
        ways[way] += len(batch)
        return WAYS[way](model.network, ids, new_tokens=new_tokens, eos_ids=ends, on_step=on_step)

    for group in _by_length(prompts):
        n_batches = len(group) // size.value
        for batch, written in run_batches(group, size, run):
            for i, row in zip(batch, written, strict=True):
                rows[i] = row
            done += len(batch) * new_tokens
            progress("completions", done, total, "tokens")
    return rows, ways.most_common(1)[0][0]


def _by_length(prompts: PromptSet) -> Iterator[list[int]]:
    """Prompts of one length together: nothing is ever padded on the left."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts.prompts):
        groups[len(prompt.ids)].append(i)
    yield from (groups[length] for length in sorted(groups))


def _padded(rows: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, np.array([len(row) for row in rows], dtype=np.int32)
