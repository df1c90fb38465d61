"""Sequences of one length, cut from documents: to train on, and to see what weights matter for."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.documents import Document, read_documents
from divergent_tokens.measure.samples import sample_documents
from divergent_tokens.models import Model
from divergent_tokens.store import content_key, read_entry, writing_entry

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
    sources: str | Sequence[str],
    model: Model,
    *,
    length: int,
    n_sequences: int,
    text_field: str = "text",
    seed: int = 0,
    cache: Path | None = None,
) -> Sequences:
    """The first sequences that the sources hold, up to `n_sequences`, as many of each source.

    Documents are those of `read_documents`, or the model's own (`self`, kept in the cache); an end
    of sequence stands between two. What is left at a source's end is not used. Raises PromptError
    where there are fewer than `FEWEST`.
    """
    if n_sequences < FEWEST:
        raise PromptError(
            f"{n_sequences} training sequences were asked for; expected {FEWEST} at least "
            "(--n-sequences)"
        )
    if model.max_positions and length > model.max_positions:
        raise PromptError(
            f"sequences of {length} tokens were asked for, and {model.reference} has "
            f"{model.max_positions} positions; give a smaller --length"
        )
    sources = [sources] if isinstance(sources, str) else list(sources)
    parts: list[NDArray[np.int64]] = []
    for done, source in enumerate(sources):
        # What a short source lacks, those after it give.
        room = (n_sequences - sum(map(len, parts))) // (len(sources) - done)
        if source == "self":
            parts.append(_drawn(model, length, room, seed, cache))
        else:
            parts.append(_cut(read_documents(source, text_field=text_field), model, length, room))
    ids = np.concatenate(parts)
    if len(ids) < FEWEST:
        raise PromptError(
            f"{', '.join(sources)}: {len(ids)} sequences of {length} tokens, and training needs "
            f"{FEWEST} at least: name a longer --data, or give a smaller --length"
        )
    return Sequences(ids, ", ".join(sources))


def _drawn(
    model: Model, length: int, n_sequences: int, seed: int, cache: Path | None
) -> NDArray[np.int64]:
    """The model's own, from the cache where they were drawn before. [sequence, token]"""
    key = content_key(
        sequences=1,
        base=model.fingerprint,
        dtype=model.dtype_name,
        device=model.device.type,
        shape=[n_sequences, length],
        seed=seed,
    )
    kept = read_entry(cache, key)
    if kept is not None:
        return np.array(kept.arrays["ids"])
    documents = sample_documents(model, n_tokens=length, n_draws=2 * n_sequences, seed=seed)
    ids = _cut(documents, model, length, n_sequences)
    if cache is not None:
        with writing_entry(cache, key) as writer:
            writer.array("ids", ids.shape, ids.dtype)[:] = ids
    return ids


def _cut(
    documents: Iterable[Document], model: Model, length: int, n_sequences: int
) -> NDArray[np.int64]:
    """[sequence, token]"""
    ids: list[int] = []
    for document in documents:
        if document.messages and not document.text:
            raise PromptError(
                "a document holds the turns of a chat and no text, and sequences are cut of text; "
                "name the field that holds it with --text-field, or give other --data"
            )
        ids += model.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += model.eos_ids[:1]
        if len(ids) >= n_sequences * length:
            break
    n = min(n_sequences, len(ids) // length)
    return np.array(ids[: n * length], np.int64).reshape(n, length)
