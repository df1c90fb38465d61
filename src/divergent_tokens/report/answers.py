"""Tables of an evaluation harness's tasks, from comparison.json's content; runs no model."""

from collections.abc import Iterator, Mapping, Sequence

from divergent_tokens.report.numbers import MISSING, estimate, number, percent
from divergent_tokens.report.tables import Record, Section

_COLUMNS = ("task", "metric", "base", "here", "flips", "wrong", "right", "other", "p")


def task_sections(
    record: Record, candidates: Sequence[Record], labels: Mapping[str, str]
) -> Iterator[Section]:
    """A table for each candidate that was asked, its answers beside the base's."""
    asked = record.get("tasks")
    if not asked:
        return
    for candidate in candidates:
        if candidate.get("tasks"):
            rows = [
                _row(base, theirs)
                for base, theirs in zip(asked["base"], candidate["tasks"], strict=True)
            ]
            yield _COLUMNS, rows, f"Tasks: {labels[candidate['name']]}"


def task_notes(record: Record) -> Iterator[str]:
    """What a reader must know to read these tables."""
    asked = record.get("tasks")
    if not asked:
        return
    settings = asked["settings"]
    yield (
        f"Tasks by {settings['harness']}{_told(settings)}. ±: its standard errors. flips: answers "
        "that are right in one of the two models only; wrong, right: which way; other: the answer "
        "is another one, whether right or wrong. p: McNemar's exact test of the difference in "
        "accuracy."
    )
    shares = [task["flips"]["share"]["value"] for task in asked["rounding"] if task["flips"]]
    if any(shares):
        yield f"Rounding alone flips up to {percent(max(shares))} of a task's answers."
    if any(candidate.get("tasks") is None for candidate in record["candidates"]):
        yield "Another engine's scores have no tasks: they hold no model that could be asked."


def _row(base: Record, theirs: Record) -> list[str]:
    filter = "" if theirs["filter"] == "none" else f" ({theirs['filter']})"
    start = [theirs["task"], theirs["metric"] + filter, _with_error(base), _with_error(theirs)]
    flips = theirs["flips"]
    if flips is None:
        return [*start, *[MISSING] * 5]
    return [
        *start,
        "\n".join(estimate(flips["share"], as_percent=True)),
        str(flips["to_wrong"]),
        str(flips["to_right"]),
        percent(flips["changed"]),
        number(flips["p_value"], 2),
    ]


def _with_error(answers: Record) -> str:
    error = answers["stderr"]
    return number(answers["value"]) + ("" if error is None else f"\n± {number(error, 2)}")


def _told(settings: Record) -> str:
    parts = []
    if settings["num_fewshot"] is not None:
        parts.append(f"{settings['num_fewshot']} examples in the prompt")
    if settings["limit"] is not None:
        limit = settings["limit"]
        some = percent(limit) if limit < 1 else f"{limit:g}"
        parts.append(f"{some} of each task's documents")
    if settings["chat"]:
        parts.append("in the chat template")
    return "".join(f", {part}" for part in parts)
