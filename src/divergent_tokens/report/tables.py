"""Tables for a terminal and for Markdown, of cells that are text already."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Record = Mapping[str, Any]
Section = tuple[Sequence[str], Sequence[Sequence[str]], str]
"""Column names, rows of cells, and a heading."""

GAP = 2
"""Blanks between two columns."""
_MARKDOWN = frozenset("\\`*_[]<>|~#&$")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table without lines, under a bold title."""
    built = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    if title is not None:
        built.title, built.title_justify, built.title_style = Text(f"\n{title}"), "left", "bold"
    for column in columns:
        built.add_column(Text(column), overflow="fold")
    for row in rows:
        built.add_row(*map(Text, row))
    return built


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of the same in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [
        "| " + " | ".join(cell if cell == "---" else escaped(cell) for cell in line) + " |"
        for line in lines
    ]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in _MARKDOWN else c for c in text)


def text_page(title: str, sections: Iterable[Section], notes: Iterable[str]) -> RenderableType:
    """A title, tables under their headings, and notes, for a terminal."""
    parts: list[RenderableType] = [Text(title), *(table(*section) for section in sections), Text()]
    return Group(*parts, *(Text(f"• {note}") for note in notes))


def on_one_line(cell: str) -> str:
    """A value and its interval beside each other."""
    value, _, interval = cell.partition("\n")
    return f"{value} ({interval})" if interval else value


def markdown_page(title: str, sections: Iterable[Section], notes: Iterable[str]) -> str:
    """A title, tables under their headings, and notes, in Markdown."""
    lines = [escaped(title)]
    for columns, rows, heading in sections:
        cells = [[on_one_line(cell) for cell in row] for row in rows]
        lines += ["", f"**{escaped(heading)}**", "", *markdown_table(columns, cells)]
    listed = [f"- {escaped(note)}" for note in notes]
    return "\n".join([*lines, *([""] if listed else []), *listed]) + "\n"


def on_prompts(prompts: Record, new_tokens: int) -> str:
    """What was measured on: how many prompts, how long, where from, how far they went on."""
    n = prompts["n_prompts"]
    start = "whole chat turns" if prompts["prefix"] is None else f"{prompts['prefix']} tokens"
    return (
        f"on {n} prompt{'' if n == 1 else 's'} of {start} from {prompts['source']}, "
        f"{new_tokens} new tokens"
    )


def harmless(value: Any) -> Any:
    """The same with every text on one line: line breaks shown, what terminals obey taken out."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in value)
    if isinstance(value, Mapping):
        return {harmless(key): harmless(inner) for key, inner in value.items()}
    return [harmless(inner) for inner in value] if isinstance(value, list) else value
