"""`{dtm-command} NAME`: what `dtm NAME --help` says, as a table made from the command itself."""

from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

from divergent_tokens.cli.entry import app as dtm

COMMANDS: dict[str, Any] = get_command(dtm).commands


class CommandTable(SphinxDirective):
    """Arguments and options of one command.

    typer has its own copy of click, which sphinx-click does not know: its help is read instead.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A table in Markdown, parsed as if it stood in the page."""
        (name,) = self.arguments
        if name not in COMMANDS:
            raise self.error(f"dtm has no command {name}; it has {', '.join(COMMANDS)}")
        return self.parse_text_to_nodes("\n".join(table_of(COMMANDS[name])))


def table_of(command: Any) -> Iterator[str]:
    """The lines of a table: an argument or option, its meaning, and its default or limits."""
    context = command.make_context(command.name, [], resilient_parsing=True)
    yield "| option | meaning | |"
    yield "| --- | --- | --- |"
    for parameter in command.params:
        name, said = parameter.get_help_record(context)
        if parameter.param_type_name == "argument":
            name = name.partition(" <")[0]  # newer versions of typer add the type
        meaning, _, limits = said.partition("  [")
        yield f"| {_code(name)} | {_cell(meaning)} | {_cell(limits.removesuffix(']'))} |"


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the directive known."""
    app.add_directive("dtm-command", CommandTable)
    return {"parallel_read_safe": True}
