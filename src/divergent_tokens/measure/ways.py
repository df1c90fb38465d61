"""Ways to write greedy text, and which of them is the fastest here, by a short trial."""

import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from torch import Tensor

from divergent_tokens.measure.decoding import EAGER_STEPS, can_decode, decode
from divergent_tokens.measure.generation import generate
from divergent_tokens.models import Model
from divergent_tokens.store import content_key, read_entry, writing_entry

WAYS: dict[str, Callable[..., list[list[int]]]] = {"dynamic": generate, "graph": decode}
"""transformers' own with its dynamic cache; and a static cache, each step a CUDA graph."""
TRIAL_TOKENS = EAGER_STEPS + 8
"""Of each way; shorter texts are not tried."""
FEWEST_STEPS = 50
"""Below, a trial costs more than it can win."""

_log = logging.getLogger(__name__)
_remembered: dict[str, str] = {}


def fastest_way(
    model: Model, ids: Tensor, *, new_tokens: int, n_steps: int, cache: Path | None
) -> str:
    """The way for prompts [prompt, token]; remembered for this shape, here and in the cache.

    "dynamic" on a CPU, for fewer than `FEWEST_STEPS` steps in all, and where steps cannot be
    replayed or do not come out the same.
    """
    able = model.device.type == "cuda" and new_tokens >= TRIAL_TOKENS
    if not (able and can_decode(model.network)):
        return "dynamic"
    key = content_key(
        kind="way/1",
        model=model.fingerprint,
        dtype=str(model.dtype),
        device=torch.cuda.get_device_name(model.device),
        shape=[*ids.shape, new_tokens],
        versions=[torch.__version__, transformers.__version__],
    )
    if key not in _remembered:
        entry = read_entry(cache, key)
        if entry is None and n_steps < FEWEST_STEPS:
            return "dynamic"
        _remembered[key] = entry.header["way"] if entry else _by_trial(model, ids, new_tokens)
        if entry is None and cache is not None:
            with writing_entry(cache, key) as writer:
                writer.header["way"] = _remembered[key]
    return _remembered[key]


def _by_trial(model: Model, ids: Tensor, new_tokens: int) -> str:
    """Time some steps of each way; those of a graph must give what they give without it."""
    by_steps = partial(decode, new_tokens=new_tokens, at_most=TRIAL_TOKENS)
    try:
        expected = by_steps(model.network, ids, replay=False)  # and libraries choose their kernels
        graph, written = _seconds_a_step(by_steps, model, ids)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever cannot be captured
        _log.info("steps of %s cannot be replayed: %s", model.reference, error)
        return "dynamic"
    if not _mostly_equal(written, expected):
        _log.info("replayed steps of %s give other tokens", model.reference)
        return "dynamic"
    dynamic, _ = _seconds_a_step(partial(generate, new_tokens=TRIAL_TOKENS), model, ids)
    return "graph" if graph < dynamic else "dynamic"


def _mostly_equal(written: list[list[int]], expected: list[list[int]]) -> bool:
    """At the first two replayed tokens, the second of those whose first is equal.

    Later ones follow from them, and rounding may part a few.
    """
    first = EAGER_STEPS + 1
    same = [(a, b) for a, b in zip(written, expected, strict=True) if a[first] == b[first]]
    second = sum(a[first + 1] == b[first + 1] for a, b in same)
    return len(same) > 0.9 * len(written) and second > 0.9 * len(same)


def _seconds_a_step(
    way: Callable[..., list[list[int]]], model: Model, ids: Tensor
) -> tuple[float, list[list[int]]]:
    """The median of the later steps, and what was written."""
    moments: list[float] = []

    def on_step() -> None:
        torch.cuda.synchronize(model.device)
        moments.append(time.perf_counter())

    written = way(model.network, ids, on_step=on_step)
    later = moments[EAGER_STEPS + 2 :]  # behind the capture
    return statistics.median(b - a for a, b in pairwise(later)), written
