"""What a verification found, for a terminal and as Markdown; records in, runs no model."""

from collections.abc import Iterator

from rich.console import RenderableType

from divergent_tokens.report.numbers import estimate, percent
from divergent_tokens.report.tables import (
    Record,
    Section,
    harmless,
    markdown_page,
    on_prompts,
    text_page,
)

_METRICS = ("fdt", "sdt", "kl", "dppl")


def verification_text(record: Record) -> RenderableType:
    """For a terminal: verdict, checks, what was measured, notes."""
    record = harmless(record)
    return text_page(title(record), sections(record), notes(record))


def verification_markdown(record: Record) -> str:
    """The same as Markdown."""
    record = harmless(record)
    return markdown_page(title(record), sections(record), notes(record))


def title(record: Record) -> str:
    """The verdict in a sentence."""
    verdict = "is what its plan says" if record["passed"] else "is NOT what its plan says"
    return (
        f"{record['folder']} {verdict} ({record['plan']['n_components']} components of "
        f"{record['base']['reference']}, {record['base']['dtype']})"
    )


def sections(record: Record) -> Iterator[Section]:
    """The checks, and what was measured."""
    rows = [
        [check["name"], "✓" if check["passed"] else "✗", check["found"]]
        for check in record["checks"]
    ]
    yield ("check", "", "found"), rows, "Checks"
    measured = record["measured"]
    if measured is None:
        return
    rows = [
        [name, *("\n".join(_cell(metrics, metric)) for metric in _METRICS)]
        for name, metrics in {"rounding": measured["rounding"], **measured["candidates"]}.items()
    ]
    heading = "Against the base, " + on_prompts(
        measured["prompts"], measured["prompts"]["new_tokens"]
    )
    yield ("", *(metric.upper() for metric in _METRICS)), rows, heading


def _cell(metrics: Record, name: str) -> tuple[str, str]:
    return estimate(metrics[name], as_percent=name == "sdt")


def notes(record: Record) -> Iterator[str]:
    """What the numbers stand for, and who else loads it."""
    plan = record["plan"]
    if plan["base_size_bytes"]:
        yield (
            f"The plan takes {percent(plan['size_bytes'] / plan['base_size_bytes'])} of the bytes "
            "of the components that it chose from."
        )
    if record["measured"] is not None:
        yield (
            "in memory: the base with the plan applied; reloaded: the folder as transformers loads "
            "it. Both are held against the base's own text."
        )
        yield from _note_on_overlap(record["measured"])
    for server, found in record["servers"].items() if record["passed"] else ():
        if not found:
            yield f"By rule {server} loads such a checkpoint rightly."
        else:
            yield (
                f"By rule {server} would not load {len(found)} components rightly, the first of "
                f"them {found[0]}"
            )


def _note_on_overlap(measured: Record) -> Iterator[str]:
    """Whether the plan was chosen on these prompts."""
    overlap = measured["overlap"]
    if overlap == 0:
        yield "None of the prompts measured on was among those that chose the plan."
    elif overlap is not None:
        yield (
            f"{overlap} of the {measured['prompts']['n_prompts']} prompts measured on chose the "
            "plan too, which flatters both: leave them out with --skip-prompts."
        )
