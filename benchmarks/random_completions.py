"""Prompts and completions of random tokens, where only time is measured."""

import numpy as np

from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.prompts import Prompt, PromptSet


def random_completions(
    n_prompts: int, *, vocabulary: int, prefix: int, new_tokens: int
) -> Completions:
    """All of one length."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, vocabulary, (n_prompts, prefix + new_tokens))
    prompts = tuple(Prompt(tuple(row[:prefix].tolist()), "") for row in rows)
    ids = rows[:, prefix:].astype(np.int32)
    kept = PromptSet(prompts, "random", prefix, 0, 0)
    return Completions(kept, ids, np.ones(ids.shape, bool), new_tokens, True)
