"""Prompts: the beginnings of documents, as a model's tokenizer gives them."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.documents import Document, read_documents
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.samples import sample_ids, sample_turns
from divergent_tokens.models import Model

SELF_ATTEMPTS = 8
"""Draws a wanted prompt at most, where a model ends most of its texts early."""


@dataclass(frozen=True)
class Prompt:
    """Token ids that a model is asked to continue, and where they come from."""

    ids: tuple[int, ...]
    text: str
    """The same, decoded for people."""
    domain: str | None = None
    language: str | None = None

    @property
    def digest(self) -> str:
        """sha256 (hex) of the ids: prompts are the same when their tokens are."""
        return hashlib.sha256(np.asarray(self.ids, dtype="<i4").tobytes()).hexdigest()


@dataclass(frozen=True)
class PromptSet:
    """The prompts that a comparison runs on."""

    prompts: tuple[Prompt, ...]
    source: str
    prefix: int | None
    """Tokens each prompt has; None for whole chat turns."""
    left_out: int
    """Documents read that were shorter than the prefix (or longer than the model's positions)."""
    skipped: int
    """Documents that would have fitted, skipped because the caller holds them apart."""

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the prompts' digests in order."""
        return hashlib.sha256("".join(p.digest for p in self.prompts).encode()).hexdigest()

    def __len__(self) -> int:
        """How many prompts there are."""
        return len(self.prompts)


def read_prompts(
    source: str,
    model: Model,
    *,
    n_prompts: int = 128,
    prefix: int = 64,
    skip: int = 0,
    chat: bool = False,
    text_field: str = "text",
    seed: int = 0,
    progress: Progress = silent,
) -> PromptSet:
    """The first `n_prompts` prompts of a source, after `skip` that would have fitted.

    A prompt is the first `prefix` tokens of a document, special tokens included; with `chat` it is
    the whole document as a user's turn in the model's chat template. `self` draws documents from the
    model. Fewer come back where the source has fewer; none at all is a PromptError.
    """
    if n_prompts < 1 or prefix < 1 or skip < 0:
        raise PromptError(
            f"n_prompts={n_prompts}, prefix={prefix}, skip={skip}; expected at least 1, 1 and 0"
        )
    fits = _fits(model, prefix, chat)
    kept: list[Prompt] = []
    left_out = 0
    for prompt in _candidates(source, model, prefix, chat, text_field, seed, skip + n_prompts):
        if not fits(prompt):
            left_out += 1
            continue
        kept.append(prompt)
        if source == "self":
            progress("prompts", len(kept), skip + n_prompts, "prompts")
        if len(kept) == skip + n_prompts:
            break
    if len(kept) <= skip:
        raise PromptError(_none_long_enough(source, prefix, chat, left_out, len(kept), skip))
    return PromptSet(tuple(kept[skip:]), source, None if chat else prefix, left_out, skip)


def _candidates(
    source: str, model: Model, prefix: int, chat: bool, text_field: str, seed: int, wanted: int
) -> Iterator[Prompt]:
    if source == "self" and not chat:
        draws = sample_ids(model, n_tokens=prefix, seed=seed)
        for ids in itertools.islice(draws, SELF_ATTEMPTS * wanted):
            yield _cut(ids, model, prefix, Document(""))
        return
    if source == "self":
        turns = itertools.islice(sample_turns(model, seed=seed), SELF_ATTEMPTS * wanted)
        documents: Iterator[Document] = (Document(turn) for turn in turns if turn)
    else:
        documents = read_documents(source, text_field=text_field)
    encode = _turn_encoder(model) if chat else _text_encoder(model)
    for document in documents:
        yield _cut(encode(document), model, None if chat else prefix, document)


def _cut(ids: list[int], model: Model, prefix: int | None, document: Document) -> Prompt:
    ids = ids[:prefix]
    text = str(model.tokenizer.decode(ids))
    return Prompt(tuple(ids), text, document.domain, document.language)


def _text_encoder(model: Model) -> Callable[[Document], list[int]]:
    return lambda document: list(model.tokenizer(document.text, verbose=False)["input_ids"])


def _turn_encoder(model: Model) -> Callable[[Document], list[int]]:
    tokenizer: Any = model.tokenizer
    if not tokenizer.chat_template:
        raise PromptError(f"{model.reference} has no chat template; leave out --chat")

    def encode(document: Document) -> list[int]:
        turns = list(document.messages) or [{"role": "user", "content": document.text}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode


def _fits(model: Model, prefix: int, chat: bool) -> Callable[[Prompt], bool]:
    limit = model.max_positions
    if chat:
        return lambda prompt: limit is None or len(prompt.ids) < limit
    return lambda prompt: len(prompt.ids) == prefix


def _none_long_enough(source: str, prefix: int, chat: bool, left_out: int, fitting: int, skip: int) -> str:
    if fitting:
        return f"{source} has {fitting} documents that fit, and {skip} are to be skipped; skip fewer"
    wanted = "short enough for the model's positions" if chat else f"with {prefix} tokens or more"
    return f"no document of {source} is {wanted} ({left_out} were left out); " + (
        "use shorter ones" if chat else "use a smaller --prefix or longer documents"
    )
