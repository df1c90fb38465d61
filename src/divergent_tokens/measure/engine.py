"""Completions out to another engine, and its scores of them back in; one JSON object a prompt."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from divergent_tokens.errors import RecordError
from divergent_tokens.measure.completions import Completions
from divergent_tokens.store import replacing_file


@dataclass(frozen=True)
class EngineScores:
    """What another engine says of the base's completions; arrays are [prompt, token]."""

    argmax_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32] | None
    """log q of the completion's token, where the engine gives it."""
    argmax_logprobs: NDArray[np.float32] | None
    """log q of the engine's own choice, from its top_logprobs; NaN where it is not among them."""


def write_completions(target: Path, completions: Completions) -> None:
    """Write `{"prompt", "prompt_ids", "completion_ids"}` lines for any engine to score."""
    with replacing_file(target) as path, path.open("w", encoding="utf-8") as file:
        for number, (prompt, row, length) in enumerate(
            zip(completions.prompts.prompts, completions.ids, completions.lengths, strict=True)
        ):
            line = {
                "prompt": number,
                "prompt_ids": list(prompt.ids),
                "completion_ids": row[:length].tolist(),
            }
            file.write(json.dumps(line) + "\n")


def read_scores(
    source: Path, completions: Completions, *, vocabulary_size: int | None = None
) -> EngineScores:
    """An engine's scores: `write_completions` lines with `argmax_ids`, and maybe `logprobs`.

    `top_logprobs`, if there, holds for each token pairs [id, log q] or a mapping of ids to log q.
    Lines may come in any order. Raises RecordError where the prompts or completions are not the
    base's, one is missing, a list has another length than its completion, or an id is none of the
    vocabulary's.
    """
    rows = _rows(source)
    missing = sorted(set(range(len(completions.prompts))) - rows.keys())
    if missing or len(rows) != len(completions.prompts):
        raise RecordError(
            f"{source} scores {len(rows)} prompts"
            + (f", without prompt {missing[0]}" if missing else "")
            + f"; expected the {len(completions.prompts)} that dtm complete wrote "
            "with the same settings"
        )
    without = [number for number in sorted(rows) if rows[number].get("logprobs") is None]
    if 0 < len(without) < len(rows):
        raise RecordError(
            f"prompt {without[0]} of {source} has no logprobs, others have; expected all or none"
        )
    shape = completions.ids.shape
    argmax_ids = np.zeros(shape, np.int32)
    logprobs = np.full(shape, np.nan, np.float32)
    argmax_logprobs = np.full(shape, np.nan, np.float32)
    for number in range(shape[0]):
        row, length = rows[number], int(completions.lengths[number])
        where = f"prompt {number} of {source}"
        _check_same(row, completions, number, where)
        argmax_ids[number, :length] = _ids(row, length, where, vocabulary_size)
        if not without:
            logprobs[number, :length] = _logprobs(row.get("logprobs"), "logprobs", length, where)
        if row.get("top_logprobs") is not None:
            chosen = _chosen(row["top_logprobs"], argmax_ids[number, :length], where)
            argmax_logprobs[number, :length] = chosen
    return EngineScores(
        argmax_ids,
        None if without else logprobs,
        None if np.isnan(argmax_logprobs).all() else argmax_logprobs,
    )


def _rows(source: Path) -> dict[int, dict[str, Any]]:
    try:
        # Not splitlines(): a JSON string may hold line separators other than \\n.
        lines = source.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise RecordError(f"the scores file {source} does not exist; check the path") from error
    except (UnicodeDecodeError, OSError) as error:
        raise RecordError(f"{source} cannot be read as UTF-8 JSON lines: {error}") from error
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecordError(f"line {number} of {source} is not JSON: {error}") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if type(prompt) is not int:
            raise RecordError(
                f"line {number} of {source} is no object with the prompt's number as 'prompt'; "
                "expected the lines that dtm complete wrote, with argmax_ids added"
            )
        if prompt in rows:
            raise RecordError(f"{source} scores prompt {prompt} twice; expected each once")
        rows[prompt] = row
    return rows


def _check_same(row: Mapping[str, Any], completions: Completions, number: int, where: str) -> None:
    length = int(completions.lengths[number])
    expected = {
        "prompt_ids": list(completions.prompts.prompts[number].ids),
        "completion_ids": completions.ids[number, :length].tolist(),
    }
    for name, ids in expected.items():
        if row.get(name) != ids:
            raise RecordError(
                f"{name} of {where} are not the base's; score the file that dtm complete wrote "
                "for this base with the same prompts and settings"
            )


def _ids(row: Mapping[str, Any], length: int, where: str, vocabulary_size: int | None) -> list[int]:
    values = _list(row.get("argmax_ids"), "argmax_ids", length, where)
    limit = 2**31 if vocabulary_size is None else vocabulary_size
    for value in values:
        if type(value) is not int or not 0 <= value < limit:
            raise RecordError(
                f"argmax_ids of {where} holds {value!r}; expected token ids from 0 to {limit - 1}"
            )
    return values


def _logprobs(values: Any, name: str, length: int, where: str) -> list[float]:
    for value in _list(values, name, length, where):
        # bool is an int; a NaN fails both comparisons; 1e-6 is rounding.
        if isinstance(value, bool | str) or not _is_logprob(value):
            raise RecordError(
                f"{name} of {where} holds {value!r}; expected natural log-probabilities, finite "
                "and not above 0"
            )
    return [min(value, 0.0) for value in values]


def _is_logprob(value: Any) -> bool:
    return isinstance(value, int | float) and -1e30 < value <= 1e-6


def _list(values: Any, name: str, length: int, where: str) -> list[Any]:
    if not isinstance(values, list):
        raise RecordError(
            f"{where} has no list {name!r}; expected one with an item for each completion token"
        )
    if len(values) != length:
        raise RecordError(
            f"{name} of {where} has {len(values)} items, its completion {length} tokens; "
            "expected one each"
        )
    return values


def _chosen(tops: Any, argmax_ids: NDArray[np.int32], where: str) -> list[float]:
    chosen: list[float] = []
    for top, token in zip(
        _list(tops, "top_logprobs", len(argmax_ids), where), argmax_ids, strict=True
    ):
        try:
            found = {int(key): value for key, value in dict(top).items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise RecordError(
                f"top_logprobs of {where} must hold, for each token, pairs [id, log-probability] "
                f"or a mapping of ids to them; found {top!r}"
            ) from error
        own = [found[int(token)]] if int(token) in found else []
        chosen += _logprobs(own, "top_logprobs", len(own), where) or [math.nan]
    return chosen
