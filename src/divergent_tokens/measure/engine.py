"""Completions out to another engine, and its scores of them back in; one JSON object a prompt."""

import json
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
    """log q of the engine's own choice, from its top_logprobs."""


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


def read_scores(source: Path, completions: Completions) -> EngineScores:
    """An engine's scores: `write_completions` lines with `argmax_ids`, and `logprobs` where it has them.

    `top_logprobs`, if there, holds for each token pairs [id, log q] or a mapping of ids to log q.
    Lines may come in any order. Raises RecordError where the prompts or completions are not the
    base's, one is missing, or a list has another length than its completion.
    """
    rows = _rows(source)
    missing = sorted(set(range(len(completions.prompts))) - rows.keys())
    if missing or len(rows) != len(completions.prompts):
        raise RecordError(
            f"{source} scores {len(rows)} prompts"
            + (f", without prompt {missing[0]}" if missing else "")
            + f"; expected the {len(completions.prompts)} that dtm complete wrote with the same settings"
        )
    shape = completions.ids.shape
    argmax_ids = np.zeros(shape, np.int32)
    logprobs = np.full(shape, np.nan, np.float32)
    argmax_logprobs = np.full(shape, np.nan, np.float32)
    for number in range(shape[0]):
        row, length = rows[number], int(completions.lengths[number])
        where = f"prompt {number} of {source}"
        _check_same(row, completions, number, where)
        argmax_ids[number, :length] = _numbers(row, "argmax_ids", length, where, integers=True)
        if row.get("logprobs") is not None:
            logprobs[number, :length] = _numbers(row, "logprobs", length, where)
        if row.get("top_logprobs") is not None:
            chosen = _chosen(row["top_logprobs"], argmax_ids[number, :length], where)
            argmax_logprobs[number, :length] = chosen
    mask = completions.mask
    return EngineScores(
        argmax_ids,
        None if np.isnan(logprobs[mask]).any() else logprobs,
        None if np.isnan(argmax_logprobs[mask]).any() else argmax_logprobs,
    )


def _rows(source: Path) -> dict[int, dict[str, Any]]:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise RecordError(f"the scores file {source} does not exist; check the path") from error
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise RecordError(f"{source} is not a UTF-8 file of JSON lines: {error}") from error
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = int(row["prompt"])
        except (ValueError, TypeError, KeyError) as error:
            raise RecordError(
                f"line {number} of {source} is not an object with a prompt's number in \"prompt\""
            ) from error
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


def _numbers(
    row: Mapping[str, Any], name: str, length: int, where: str, *, integers: bool = False
) -> NDArray[Any]:
    try:
        values = np.asarray(row[name], dtype=np.int64 if integers else np.float64)
    except (KeyError, ValueError, TypeError) as error:
        raise RecordError(f"{where} has no list of numbers {name!r}; expected one a completion token") from error
    if values.shape != (length,):
        raise RecordError(
            f"{name} of {where} has shape {values.shape}, its completion {length} tokens; expected one each"
        )
    if not integers and (np.isnan(values).any() or (values > 1e-6).any()):
        raise RecordError(f"{name} of {where} holds NaN or positive numbers; expected natural log-probabilities")
    return values


def _chosen(tops: Any, argmax_ids: NDArray[np.int32], where: str) -> list[float]:
    try:
        pairs = [dict(top) if not isinstance(top, dict) else top for top in tops]
        found = [{int(token): float(value) for token, value in top.items()} for top in pairs]
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"top_logprobs of {where} must hold, for each token, pairs [id, log-probability]"
        ) from error
    if len(found) != len(argmax_ids):
        raise RecordError(f"top_logprobs of {where} has {len(found)} items, expected {len(argmax_ids)}")
    return [top.get(int(token), float("nan")) for top, token in zip(found, argmax_ids, strict=True)]
