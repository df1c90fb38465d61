"""`dtm report`: one page of everything that was found out."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from divergent_tokens.cli.output import check_out, print_out
from divergent_tokens.cli.signals import on_signals, tidy_up
from divergent_tokens.errors import DivergentTokensError

if TYPE_CHECKING:
    from divergent_tokens.report.records import Source


class Picture(StrEnum):
    """What a figure is written as."""

    svg = "svg"
    png = "png"


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE ...",
            help="comparison.json, sweep.db, plan.json, a curve, pruning.json or its folder, "
            "verification.json; all of one base.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write every figure here as a file of its own."),
    ] = None,
    figure_format: Annotated[
        Picture, typer.Option(help="What the figures are written as.")
    ] = Picture.svg,
) -> None:
    """Make one page, for any browser and offline, of records that other commands wrote."""
    if out is None and figures is None:
        raise DivergentTokensError(
            "there is nothing to write; give --out page.html, or --figures DIR"
        )
    if out:
        check_out(out, *files)

    from divergent_tokens.report.page import check_extra, page
    from divergent_tokens.report.pictures import check_figures, write_pictures
    from divergent_tokens.report.records import read_sources
    from divergent_tokens.store import write_text

    on_signals(tidy_up)
    check_extra()
    if figures:
        check_figures(figures)
    sources = read_sources(files)
    if out:
        written = page(sources)
        write_text(out, written)
        print_out(f"{out}: {_said(sources)}, {len(written.encode()) / 1e6:.1f} MB\n")
    if figures:
        names = write_pictures(sources, figures, figure_format)
        print_out(f"{figures}: {len(names)} figures as {figure_format}\n")


def _said(sources: "Sequence[Source]") -> str:
    """How many records of which kind: 2 comparisons, 1 sweep."""
    counts: dict[str, int] = {}
    for source in sources:
        counts[source.kind] = counts.get(source.kind, 0) + 1
    return ", ".join(f"{n} {kind}{'' if n == 1 else 's'}" for kind, n in counts.items())
