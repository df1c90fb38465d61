"""The prompts with what base and candidates wrote, as the page's script reads them."""

from collections.abc import Sequence
from typing import Any

from divergent_tokens.report.records import Source
from divergent_tokens.report.tables import Record
from divergent_tokens.report.text import NEAR_TIE_LOGITS, ordered

ROW = (
    "fdt",
    "censored",
    "n_divergent",
    "n_tokens",
    "kl",
    "margin",
    "base_token",
    "candidate_token",
    "base_token_p",
    "base_token_q",
    "candidate_token_p",
    "candidate_token_q",
)
"""What the page needs of a ROW, in this order, which page/texts.js repeats."""
_DIGITS = 4


def text_view(sources: Sequence[Source]) -> dict[str, Any]:
    """Prompts, the base's tokens, and of each candidate its rows and what it wrote on its own."""
    found = [_comparison(source) for source in sources if _has_texts(source)]
    return {"near_tie": NEAR_TIE_LOGITS, "columns": ROW, "comparisons": found}


def _has_texts(source: Source) -> bool:
    """Older files lack the base's completions."""
    return source.kind == "comparison" and "completions" in source.record["prompts"]


def _comparison(source: Source) -> dict[str, Any]:
    record = source.record
    prompts = record["prompts"]
    rows = record["candidates"][0]["rows"]
    return {
        "file": source.name,
        "texts": prompts["texts"],
        "pieces": prompts["completions"],
        "domains": [row["domain"] for row in rows],
        "languages": [row["language"] for row in rows],
        "candidates": [_candidate(candidate) for candidate in ordered(record)],
    }


def _candidate(candidate: Record) -> dict[str, Any]:
    return {
        "name": candidate["name"],
        "rows": [[_short(row[column]) for column in ROW] for row in candidate["rows"]],
        "written": {str(e["prompt"]): e["candidate_text"] for e in candidate["examples"]},
    }


def _short(value: Any) -> Any:
    """Numbers as exact as anybody reads them: a page of ten thousand rows is to stay small."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
