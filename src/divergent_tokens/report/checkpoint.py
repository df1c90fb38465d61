"""What was written as a checkpoint, for a terminal and as Markdown; records in, runs no model."""

from collections.abc import Iterator

from rich.console import RenderableType

from divergent_tokens.report.numbers import percent
from divergent_tokens.report.tables import Record, Section, harmless, markdown_page, text_page


def checkpoint_text(record: Record) -> RenderableType:
    """For a terminal: title, components by scheme, notes."""
    record = harmless(record)
    return text_page(title(record), _sections(record), notes(record))


def checkpoint_markdown(record: Record) -> str:
    """The same as Markdown."""
    record = harmless(record)
    return markdown_page(title(record), _sections(record), notes(record))


def title(record: Record) -> str:
    """What was written where, and how large it is."""
    n = record["n_files"]
    return (
        f"{record['folder']}: {record['base']['reference']} under the plan, "
        f"{record['size_bytes'] / 1e6:.1f} MB of weights in {n} file{'' if n == 1 else 's'}, "
        f"{percent(record['size_bytes'] / record['base_size_bytes'])} of the base's"
    )


def _sections(record: Record) -> Iterator[Section]:
    rows = [[scheme, str(count)] for scheme, count in record["schemes"].items()]
    yield ("scheme", "components"), rows, "Components"


def notes(record: Record) -> Iterator[str]:
    """How the rest is stored, and who else loads it."""
    if not record["schemes"]:
        yield "The plan names no component: this is the base as it was."
    if record["dense"]:
        yield (
            f"All weights are ordinary ones in {record['dtype']}: the harm of the plan without "
            "its size."
        )
        return
    yield f"What is not in codes is in {record['dtype']}."
    elsewhere = record["elsewhere"]
    if not elsewhere["n_problems"]:
        yield f"By rule {elsewhere['target']} loads it too."
    else:
        yield (
            f"{elsewhere['target']} would not load {elsewhere['n_problems']} components rightly, "
            f"the first of them {elsewhere['first']}"
        )
