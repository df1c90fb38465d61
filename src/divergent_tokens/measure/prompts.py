"""Prompts: the beginnings of documents, as a model's tokenizer gives them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.documents import Document, read_documents
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.samples import sample_documents
from divergent_tokens.models import Model
from divergent_tokens.store import content_key, read_entry, writing_entry

MAX_TURN_TOKENS = 256
"""A drawn user's turn that is longer than this is cut here."""
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
    wanted: int | None = None
    """How many prompts were asked for, where the source has fewer."""

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
    cache: Path | None = None,
    progress: Progress = silent,
) -> PromptSet:
    """The first `n_prompts` prompts of a source, after `skip` that would have fitted.

    A prompt is the first `prefix` tokens of a document, special tokens included; with `chat` it is
    the whole document as a user's turn in the model's chat template. `self` draws documents from
    the model with `seed`, and keeps them in the cache. Fewer come back where the source has fewer;
    none at all is a PromptError.
    """
    if n_prompts < 1 or prefix < 1 or skip < 0:
        raise PromptError(
            f"n_prompts={n_prompts}, prefix={prefix}, skip={skip}; expected at least 1, 1 and 0"
        )
    key = content_key(
        kind="self/2",
        model=model.fingerprint,
        dtype=str(model.dtype),
        device=model.device.type,
        template=model.tokenizer.chat_template,
        settings=[n_prompts, prefix, skip, chat, seed],
    )
    limit = model.max_positions
    if not chat and limit is not None and prefix >= limit:
        raise PromptError(
            f"a prefix of {prefix} tokens leaves no room in the {limit} positions of "
            f"{model.reference}; use a smaller --prefix"
        )
    drawn = source == "self"
    found = _read_drawn(cache, key) if drawn else None
    if found is None:
        documents = (
            _draw(model, prefix, chat, seed, skip + n_prompts)
            if drawn
            else read_documents(source, text_field=text_field)
        )
        found = _choose(documents, model, source, n_prompts, prefix, skip, chat, progress)
        if drawn and cache is not None:
            _write_drawn(cache, key, found)
    return found


def _choose(
    documents: Iterable[Document],
    model: Model,
    source: str,
    n_prompts: int,
    prefix: int,
    skip: int,
    chat: bool,
    progress: Progress,
) -> PromptSet:
    encode = _turn_encoder(model) if chat else _text_encoder(model, prefix)
    fits = _fits(model, prefix, chat)
    kept: list[Prompt] = []
    left_out = 0
    for document in documents:
        prompt = _prompt(encode(document), model, document)
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
    wanted = n_prompts if len(kept) < skip + n_prompts else None
    return PromptSet(tuple(kept[skip:]), source, None if chat else prefix, left_out, skip, wanted)


def _draw(model: Model, prefix: int, chat: bool, seed: int, wanted: int) -> Iterator[Document]:
    # Tokens that are decoded and encoded again may become fewer.
    n_tokens = MAX_TURN_TOKENS if chat else prefix + prefix // 4 + 4
    return sample_documents(model, n_tokens=n_tokens, n_draws=SELF_ATTEMPTS * wanted, seed=seed)


def _read_drawn(cache: Path | None, key: str) -> PromptSet | None:
    entry = read_entry(cache, key)
    if entry is None:
        return None
    prompts = tuple(Prompt(tuple(p["ids"]), p["text"]) for p in entry.header["prompts"])
    rest = {name: entry.header[name] for name in ("prefix", "left_out", "skipped", "wanted")}
    return PromptSet(prompts, "self", **rest)


def _write_drawn(cache: Path, key: str, drawn: PromptSet) -> None:
    with writing_entry(cache, key) as writer:
        writer.header["prompts"] = [{"ids": p.ids, "text": p.text} for p in drawn.prompts]
        writer.header |= {
            "prefix": drawn.prefix,
            "left_out": drawn.left_out,
            "skipped": drawn.skipped,
            "wanted": drawn.wanted,
        }


def _prompt(ids: list[int], model: Model, document: Document) -> Prompt:
    text = str(model.tokenizer.decode(ids))
    return Prompt(tuple(ids), text, document.domain, document.language)


def _text_encoder(model: Model, prefix: int) -> Callable[[Document], list[int]]:
    return lambda document: list(
        model.tokenizer(document.text, verbose=False)["input_ids"][:prefix]
    )


def _turn_encoder(model: Model) -> Callable[[Document], list[int]]:
    tokenizer: Any = model.tokenizer
    if not tokenizer.chat_template:
        raise PromptError(f"{model.reference} has no chat template; leave out --chat")

    def encode(document: Document) -> list[int]:
        turns = list(document.messages) or [{"role": "user", "content": document.text}]
        try:
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError) as error:  # the template's own rules for roles and turns
            raise PromptError(
                f"the chat template of {model.reference} refuses the turns "
                f"{[turn.get('role') for turn in turns]}: {error}"
            ) from error
        # The template writes the special tokens itself.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode


def _fits(model: Model, prefix: int, chat: bool) -> Callable[[Prompt], bool]:
    limit = model.max_positions
    if chat:
        return lambda prompt: limit is None or len(prompt.ids) < limit
    return lambda prompt: len(prompt.ids) == prefix


def _none_long_enough(
    source: str, prefix: int, chat: bool, left_out: int, fitting: int, skip: int
) -> str:
    if fitting:
        return (
            f"{source} has {fitting} documents that fit, and {skip} are to be skipped; skip fewer"
        )
    wanted = "fits the model's positions" if chat else f"has {prefix} tokens or more"
    lines = "each line of it is one document; " if source.lower().endswith(".txt") else ""
    return f"no document of {source} {wanted} (left out: {left_out}); {lines}" + (
        "use shorter ones" if chat else "use a smaller --prefix or longer documents"
    )
