"""`dtm export`: a plan as another tool's settings."""

from pathlib import Path
from typing import Annotated

import typer

from divergent_tokens.cli.output import check_out, print_out
from divergent_tokens.cli.signals import on_signals, tidy_up
from divergent_tokens.compress.tools import Tool


def export(
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN", help="The plan that `dtm search` wrote.", show_default=False
        ),
    ],
    to: Annotated[Tool, typer.Option("--to", help="The tool that is to carry it out.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the settings here; else they are printed.")
    ] = None,
) -> None:
    """Write a plan's decisions as another tool reads them, for its own quantizer."""
    if out:
        check_out(out, plan)

    from divergent_tokens.compress.plan_file import read_plan
    from divergent_tokens.compress.recipes import recipe
    from divergent_tokens.store import write_text

    on_signals(tidy_up)
    found = recipe(read_plan(plan), to)
    if out is None:
        print_out(found.text)
        return
    write_text(out, found.text)
    print_out("".join(f"• {note.replace('FILE', str(out))}\n" for note in found.notes))
