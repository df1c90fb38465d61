"""`{record-schema} NAME` and `{sweep-tables}`: a file's fields, from what checks or makes it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from divergent_tokens.sensitivities import _TABLES

Schema = Mapping[str, Any]


class RecordSchema(SphinxDirective):
    """The fields of a JSON Schema that comes with the package: one table for each object in it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Tables in Markdown, parsed as if they stood in the page."""
        place = files("divergent_tokens") / "data" / "schemas" / f"{self.arguments[0]}.json"
        schema = json.loads(place.read_text("utf-8"))
        lines = [line for table in tables_of(schema) for line in table]
        return self.parse_text_to_nodes("\n".join(lines))


class SweepTables(SphinxDirective):
    """The tables of sweep.db, as SQLite is told to make them."""

    def run(self) -> list[nodes.Node]:
        """One list of columns a table."""
        lines = []
        for table in _TABLES:
            name, _, columns = table.partition(" ")
            lines += [f"`{name}`", f": `{columns.strip('()')}`", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def tables_of(schema: Schema) -> Iterator[list[str]]:
    """The record's own table, then one for each named part that has fields."""
    yield _table(schema)
    for name, part in schema.get("$defs", {}).items():
        if "properties" in part and "$ref" not in part:
            yield ["", f"**{name}**: {_cell(part.get('description', ''))}", "", *_table(part)]


def _table(schema: Schema) -> list[str]:
    return ["| field | what it is | type |", "| --- | --- | --- |", *_rows(schema, "")]


def _rows(schema: Schema, before: str) -> Iterator[str]:
    """The fields, those of an object within under its name."""
    for name, field in schema.get("properties", {}).items():
        yield f"| `{before}{name}` | {_cell(field.get('description', ''))} | {_type(field)} |"
        inner = field.get("items", field) if "$ref" not in field else {}
        for one in (inner, *_alternatives(inner)):
            yield from _rows(one, f"{before}{name}{'[]' if 'items' in field else ''}.")


def _alternatives(field: Schema) -> Sequence[Schema]:
    return [*field.get("anyOf", ()), *field.get("oneOf", ())]


def _type(field: Schema) -> str:
    alternatives = _alternatives(field)
    if alternatives:
        return " or ".join(map(_type, alternatives))
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type", "any")
    kinds = kind if isinstance(kind, list) else [kind]
    within = f" of {_type(field['items'])}" if isinstance(field.get("items"), dict) else ""
    return " or ".join(kinds) + within


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the directives known."""
    app.add_directive("record-schema", RecordSchema)
    app.add_directive("sweep-tables", SweepTables)
    return {"parallel_read_safe": True}
