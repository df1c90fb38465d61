"""The earliest divergences of a candidate, written out for people to read."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.generation import generate
from divergent_tokens.measure.metrics import Divergence
from divergent_tokens.models import Model


@dataclass(frozen=True)
class Example:
    """A prompt, what both wrote alike after it, and how each went on."""

    prompt: int
    prompt_text: str
    shared_text: str
    """What base and candidate agree on."""
    base_text: str
    """How the base goes on from there."""
    candidate_text: str
    """How the candidate does; its one token where it could not be asked to write."""
    fdt: int
    margin: float
    """The base's margin where they part, in logits."""


def write_examples(
    divergence: Divergence,
    argmax_ids: NDArray[np.int32],
    margins: NDArray[np.float32],
    completions: Completions,
    base: Model,
    candidate: Model | None,
    *,
    n: int,
) -> tuple[Example, ...]:
    """The `n` earliest divergences; the candidate writes on from its own first different token."""
    parted = [i for i in np.argsort(divergence.fdt, kind="stable") if not divergence.censored[i]]
    return tuple(
        _example(int(i), divergence, argmax_ids, margins, completions, base, candidate)
        for i in parted[:n]
    )


def _example(
    i: int,
    divergence: Divergence,
    argmax_ids: NDArray[np.int32],
    margins: NDArray[np.float32],
    completions: Completions,
    base: Model,
    candidate: Model | None,
) -> Example:
    t, length = int(divergence.fdt[i]), int(completions.lengths[i])
    prompt = completions.prompts.prompts[i]
    shared = completions.ids[i, :t].tolist()
    own = [int(argmax_ids[i, t])]
    ended = not completions.ignore_eos and own[0] in base.eos_ids
    if candidate is not None and length > t + 1 and not ended:
        own += generate(
            candidate.network,
            torch.tensor([[*prompt.ids, *shared, *own]], device=candidate.device),
            new_tokens=length - t - 1,
            eos_ids=() if completions.ignore_eos else base.eos_ids,
        )[0]
    whole = shared + completions.ids[i, t:length].tolist()
    return Example(
        prompt=i,
        prompt_text=prompt.text,
        shared_text=_text(base, shared),
        base_text=_after(base, shared, whole),
        candidate_text=_after(base, shared, shared + own),
        fdt=t,
        margin=float(margins[i, t]),
    )


def _after(model: Model, shared: list[int], whole: list[int]) -> str:
    """What `whole` adds to `shared`, as text; a token may be half a character."""
    before, text = _text(model, shared), _text(model, whole)
    return text[len(before) :] if text.startswith(before) else _text(model, whole[len(shared) :])


def _text(model: Model, ids: list[int]) -> str:
    return str(model.tokenizer.decode(ids))
