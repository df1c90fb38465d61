"""Sequences of one length, cut from documents: to train on, and to see what weights matter for."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.documents import read_documents
from divergent_tokens.measure.samples import sample_documents
from divergent_tokens.models import Model

FEWEST = 8
"""Sequences without which nothing can be trained."""


@dataclass(frozen=True)
class Sequences:
    """Token ids, document after document, without padding."""

    ids: NDArray[np.int64]
    """[sequence, token]"""
    source: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of the ids and their shape."""
        found = hashlib.sha256(f"{self.ids.shape}".encode())
        found.update(np.ascontiguousarray(self.ids, dtype="<i8").tobytes())
        return found.hexdigest()


def read_sequences(
    source: str,
    model: Model,
    *,
    length: int,
    n_sequences: int,
    text_field: str = "text",
    seed: int = 0,
) -> Sequences:
    """The first `n_sequences` that a source holds, or as many as there are.

    Documents are those of `read_documents`, or the model's own (`self`); an end of sequence stands
    between two. What is left at the end is not used. Raises PromptError where there are fewer than
    `FEWEST`.
    """
    end = model.eos_ids[:1]
    ids: list[int] = []
    documents = (
        sample_documents(model, n_tokens=length, n_draws=2 * n_sequences, seed=seed)
        if source == "self"
        else read_documents(source, text_field=text_field)
    )
    for document in documents:
        ids += model.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += end
        if len(ids) >= n_sequences * length:
            break
    n = min(n_sequences, len(ids) // length)
    if n < FEWEST:
        raise PromptError(
            f"{source} holds {len(ids)} tokens, which is {n} sequences of {length}; training needs "
            f"{FEWEST} at least: name a longer --data, or give a smaller --length"
        )
    return Sequences(np.array(ids[: n * length], np.int64).reshape(n, length), source)
