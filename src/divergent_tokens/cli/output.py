"""What a command prints and writes, and its exit codes."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console, RenderableType

from divergent_tokens.cli.options import Format
from divergent_tokens.errors import DivergentTokensError

if TYPE_CHECKING:
    from divergent_tokens.measure.progress import Progress

FAILED, BAD_INPUT, BUG = 1, 2, 3
BY_SIGNAL = 128
"""Ended by a signal: this plus its number, so that an interrupt is 130."""


def check_out(out: Path, *inputs: Path | str | None, option: str = "--out") -> None:
    """Raise where `out` could not be written, or would replace what is read."""
    from divergent_tokens.store import check_writable

    check_writable(out)
    if not out.is_file():
        return
    for file in inputs:
        path = Path(file or "").expanduser()
        if file and path.is_file() and out.samefile(path):
            raise DivergentTokensError(
                f"{option} {out} would replace {file}, which is read; name another file"
            )
        if file and path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise DivergentTokensError(
                f"{option} {out} would replace a file of {file}, which is read; name another file"
            )


def write_json(target: Path, record: dict[str, Any]) -> None:
    """Replace the file, at once or not at all."""
    from divergent_tokens.store import write_text

    write_text(target, as_json(record) + "\n")


def as_json(record: dict[str, Any]) -> str:
    """JSON in ASCII: any terminal shows it, obeys nothing in it, and any file name fits into it."""
    return json.dumps(record, allow_nan=False)


def print_out(text: str) -> None:
    """Write to the standard output; a reader that has gone (`| head`) changes nothing else."""
    if sys.stdout is None:  # closed by the shell
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except OSError as error:
        drop_output()
        raise DivergentTokensError(
            f"could not write to the standard output: {error.strerror}; free some room, or send "
            "it elsewhere"
        ) from error


def print_rich(make: Callable[[int], RenderableType]) -> None:
    """Print the table or text that is made for the terminal's width."""
    terminal = Console()
    # Into memory first: rich writes even what it captures, and fails where the disk is full.
    console = Console(
        file=io.StringIO(),
        width=terminal.width,
        force_terminal=terminal.is_terminal,
        color_system=cast(Any, terminal.color_system),
    )
    with console.capture() as captured:
        console.print(make(console.width))
    print_out(captured.get())


def print_record(
    record: dict[str, Any],
    format: Format,
    *,
    text: Callable[[int], RenderableType],
    markdown: Callable[[], str],
) -> None:
    """Print a record as it was asked for; `text` is given the terminal's width."""
    if format is Format.json:
        print_out(as_json(record) + "\n")
    elif format is Format.markdown:
        print_out(markdown())
    else:
        print_rich(text)


def drop_output() -> None:
    """Point the standard output at nothing: what is still buffered would fail again at exit."""
    with suppress(OSError), Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


@contextmanager
def progress_bar(quiet: bool) -> Iterator["Progress"]:
    """A bar on the terminal's error stream, one line a stage; nothing where nobody watches."""
    # Not by rich's own judgement: it takes FORCE_COLOR, common in builds, for somebody watching.
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        from divergent_tokens.measure.progress import silent

        yield silent
        return
    from divergent_tokens.report.bars import Bars

    with Bars(Console(stderr=True)) as bars:
        yield bars


def say(message: str, code: int) -> int:
    """One line on the error stream; what a checkpoint's files say cannot command the terminal."""
    line = "".join(c if c.isprintable() else " " for c in message)
    with suppress(OSError):  # nobody listens
        print(f"dtm: {line}", file=sys.stderr, flush=True)
    return code
