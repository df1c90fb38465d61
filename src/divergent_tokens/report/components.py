"""A model's components, for a terminal and as Markdown; records in, runs no model."""

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from divergent_tokens.report.numbers import MISSING
from divergent_tokens.report.tables import Record, Section, harmless, markdown_page, table

_COLUMNS = ("name", "kind", "layer", "[out, in]", "parameters", "bytes")
_TOTALS = ("kind", "components", "parameters", "bytes")


def components_text(record: Record) -> RenderableType:
    """All components, then totals by kind."""
    record = harmless(record)
    parts: list[RenderableType] = [Text(_title(record))]
    parts += [table(*section) for section in _sections(record)]
    parts += [Text(f"\n• {note}") for note in _notes(record)]
    return Group(*parts)


def components_markdown(record: Record) -> str:
    """The same as Markdown."""
    record = harmless(record)
    return markdown_page(_title(record), _sections(record), _notes(record))


def _included(record: Record) -> list[Record]:
    return [component for component in record["components"] if component["included"]]


def _title(record: Record) -> str:
    included = _included(record)
    n_parameters, size = _sums(included)
    return (
        f"{record['base']['reference']}: {len(included)} components, {n_parameters:,} parameters, "
        f"{size:,} bytes"
    )


def _sums(components: Sequence[Record]) -> tuple[int, int]:
    n_parameters = sum(component["n_parameters"] for component in components)
    return n_parameters, sum(component["base_size_bytes"] for component in components)


def _sections(record: Record) -> Iterator[Section]:
    yield _COLUMNS, [_row(component) for component in record["components"]], "Components"
    included, schemes = _included(record), record["schemes"]
    rows = [
        _total(kind, [component for component in included if component["kind"] == kind], schemes)
        for kind in dict.fromkeys(component["kind"] for component in included)
    ]
    if schemes:
        rows.append(_total("all", included, schemes))
    yield (*_TOTALS, *(f"under {scheme}" for scheme in schemes)), rows, "By kind"


def _total(kind: str, members: Sequence[Record], schemes: Sequence[str]) -> list[str]:
    n_parameters, size = _sums(members)
    under = [sum(component["size_bytes"][scheme] for component in members) for scheme in schemes]
    return [kind, str(len(members)), f"{n_parameters:,}", *(f"{n:,}" for n in (size, *under))]


def _row(component: Record) -> list[str]:
    n_out, n_in = component["shape"]
    return [
        component["name"],
        component["kind"] + ("" if component["included"] else " (left out)"),
        MISSING if component["layer"] is None else str(component["layer"]),
        f"[{n_out}, {n_in}]",
        f"{component['n_parameters']:,}",
        f"{component['base_size_bytes']:,}",
    ]


def _notes(record: Record) -> Iterator[str]:
    left_out = [c["name"] for c in record["components"] if not c["included"]]
    if left_out:
        yield (
            f"Left out unless --include names them: {', '.join(left_out)}. Bytes are 16 bits a "
            "weight, or what the checkpoint stores if it is less."
        )
