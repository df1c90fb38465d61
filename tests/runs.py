"""What the tests of the measuring lane share: tiny models, prompts of random ids, and noise."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import tiny
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.measure.batches import BatchSize
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head, find_head
from divergent_tokens.measure.prompts import Prompt, PromptSet
from divergent_tokens.measure.scores import TokenScores, score
from divergent_tokens.measure.states import base_states
from divergent_tokens.models import Model


@functools.cache
def model(architecture: str = "llama", seed: int = 0) -> Model:
    """One that tests share, so they must not change it; see `changed`."""
    return Model.of(tiny.network(architecture, seed), tiny.tokenizer(), reference=architecture)


def changed(base: Model, change: Callable[[PreTrainedModel], Any], reference: str = "m") -> Model:
    """A copy of a model after `change` has been done to its network."""
    network = copy.deepcopy(base.network)
    with torch.no_grad():
        change(network)
    return Model(network, base.tokenizer, reference, f"{base.fingerprint} {reference}")


def noisy(base: Model, size: float = 0.03, seed: int = 1) -> Model:
    """A copy with relative noise on every weight."""
    generator = torch.Generator().manual_seed(seed)

    def add_noise(network: PreTrainedModel) -> None:
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_((1 + size * noise).to(parameter.dtype))

    return changed(base, add_noise, f"noise {size} {seed}")


def with_ends(base: Model, ends: Sequence[int]) -> Model:
    """A copy whose generation config has these end-of-sequence ids."""

    def set_ends(network: PreTrainedModel) -> None:
        network.generation_config.eos_token_id = list(ends)

    return changed(base, set_ends, f"ends {list(ends)}")


def prompts(n: int = 6, length: int = 8, seed: int = 0, lengths: Sequence[int] = ()) -> PromptSet:
    """Random ids; of several lengths if these are given."""
    rng = np.random.default_rng(seed)
    rows = [tuple(rng.integers(4, 200, k).tolist()) for k in lengths or [length] * n]
    decode = tiny.tokenizer().decode
    return PromptSet(tuple(Prompt(row, decode(list(row))) for row in rows), "test", length, 0, 0)


def written(prompt_set: PromptSet, rows: Sequence[Sequence[int]]) -> Completions:
    """Completions with these ids."""
    width = max(map(len, rows))
    ids = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
    mask = np.array([[t < len(row) for t in range(width)] for row in rows])
    return Completions(prompt_set, ids, mask, width, False)


def scored(
    base: Model, candidate: Model, completions: Completions, n_batch: int = 4
) -> TokenScores:
    """The candidate's scores on the base's completions."""
    head = find_head(base.network)
    states = base_states(base, head, completions, batch_size=BatchSize(n_batch))
    own: Head = find_head(candidate.network)
    return score(candidate, own, completions, head, states)


def logits_of(network: PreTrainedModel, ids: Sequence[int]) -> np.ndarray:
    """The slow, obvious way: all logits of one sequence in one go, in float64. [token, vocab]"""
    with torch.no_grad():
        found = network(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found.double().numpy()


def greedy(network: PreTrainedModel, ids: Sequence[int], n: int, ends: Sequence[int]) -> list[int]:
    """The obvious loop without a cache: the argmax, again and again."""
    row = list(ids)
    for _ in range(n):
        row.append(int(logits_of(network, row)[-1].argmax()))
        if row[-1] in ends:
            break
    return row[len(ids) :]


def failing_above(n: int, error: Exception) -> Callable[[PreTrainedModel], None]:
    """A change for `changed`: more than n sequences at once do not fit."""

    def change(network: PreTrainedModel) -> None:
        forward = network.forward

        @functools.wraps(forward)
        def limited(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids")
            if ids is not None and len(ids) > n:
                raise error
            return forward(*args, **kwargs)

        network.forward = limited

    return change


def plan_for(base, scheme="int4:g16"):
    names = [component.name for component in find_components(base.network)]
    identity = {
        "reference": base.reference,
        "fingerprint": base.fingerprint,
        "model_type": base.network.config.model_type,
        "config": base.network.config.to_dict(),
    }
    return PlanFile(identity, dict.fromkeys(names, scheme), 1, 2)
