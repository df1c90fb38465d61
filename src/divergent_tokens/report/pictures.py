"""The page's figures as files for papers: SVG or PNG, one for each view."""

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from divergent_tokens.errors import DivergentTokensError, RecordError
from divergent_tokens.report.chapters import chapters
from divergent_tokens.report.figures.figure import Figure
from divergent_tokens.report.records import Source
from divergent_tokens.store import clear_disk_errors, replacing_file

WIDTH = 900
"""Pixels; the heights are the page's."""
SCALE = 2
"""Pixels of a PNG for one of the page."""
BROWSER = "BROWSER_PATH"
"""The environment variable by which kaleido, too, is told of a browser."""
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def check_figures(folder: Path) -> None:
    """Raise before any work where pictures cannot be drawn, or not be written there."""
    try:
        import kaleido  # noqa: F401
    except ImportError as error:
        raise DivergentTokensError(
            "pictures need kaleido: pip install 'divergent-tokens[figures]', and Chromium or Chrome"
        ) from error
    if browser() is None:
        raise DivergentTokensError(
            "pictures are drawn by Chromium or Chrome, and none was found; install one "
            f"(apt-get install chromium), or name its program in {BROWSER}"
        )
    if folder.exists() and not folder.is_dir():
        raise RecordError(f"{folder} is a file; expected a folder to write figures to")
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise RecordError(f"the folder {folder} cannot be written to; name another")
    if not folder.absolute().parent.is_dir():
        raise RecordError(f"the folder {folder.parent} does not exist; make it, or name another")


def browser() -> str | None:
    """The browser that draws: the one that is named, or the first of the usual ones."""
    named = os.environ.get(BROWSER)
    found = (shutil.which(name) for name in ([named] if named else _BROWSERS))
    return next(filter(None, found), None)


def write_pictures(sources: Sequence[Source], folder: Path, format: str) -> list[Path]:
    """The files: NAME.svg, or NAME-VIEW.svg of a figure with several views; replaces older ones.

    All are drawn in one run of the browser, and stand in the folder once all are there.
    """
    found = dict(_pictures(sources))
    where = browser()
    assert where is not None, "checked before"
    with tempfile.TemporaryDirectory() as temporary:
        drawn = [Path(temporary) / f"{name}.{format}" for name in found]
        try:
            asyncio.run(_draw(list(found.values()), drawn, format, where))
        except Exception as error:  # of kaleido, of the browser
            said = " ".join(str(error).split())[:200]
            raise DivergentTokensError(
                f"{where} could not draw ({type(error).__name__}: {said}); try another browser, "
                f"named in {BROWSER}"
            ) from error
        missing = [path.name for path in drawn if not path.is_file() or not path.stat().st_size]
        if missing:
            raise DivergentTokensError(
                f"{where} did not draw {missing[0]}; try another browser, named in {BROWSER}"
            )
        with clear_disk_errors(folder):
            folder.mkdir(exist_ok=True)
        for path in drawn:
            with replacing_file(folder / path.name) as target:
                shutil.copy(path, target)
        return [folder / path.name for path in drawn]


async def _draw(
    figures: Sequence[dict[str, Any]], paths: Sequence[Path], format: str, where: str
) -> None:
    import kaleido

    options = {"format": format, "width": WIDTH, "scale": SCALE if format == "png" else 1}
    # No MathJax, which would come from the network.
    async with kaleido.Kaleido(n=1, path=where, mathjax=False) as drawer:
        for figure, path in zip(figures, paths, strict=True):
            opts = {**options, "height": figure["layout"]["height"]}
            path.write_bytes(await drawer.calc_fig(figure, opts))


def _pictures(sources: Sequence[Source]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and plotly's JSON of every view."""
    for chapter in chapters(sources):
        for part in chapter.parts:
            for figure in part.figures:
                yield from _views(figure)


def _views(figure: Figure) -> Iterator[tuple[str, dict[str, Any]]]:
    if not figure.views:
        yield figure.name, {"data": list(figure.data), "layout": _layout(figure, {})}
    for i, view in enumerate(figure.views):
        data = [figure.data[j] for j in view.traces]
        # The number keeps views apart whose labels have the same letters.
        name = f"{figure.name}-{i + 1}-{_plain(view.label)}"
        yield name, {"data": data, "layout": _layout(figure, dict(view.layout))}


def _layout(figure: Figure, view: dict[str, Any]) -> dict[str, Any]:
    paper = {"paper_bgcolor": "white", "plot_bgcolor": "white", "font": {"size": 13}}
    return {**figure.layout, **view, **paper}


def _plain(label: str) -> str:
    """A part of a file's name: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:40]
