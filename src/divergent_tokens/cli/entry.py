"""The command `dtm`: parse, call one verb, print one report, exit code."""

import signal
import sys
import traceback
from importlib.metadata import version
from typing import Annotated, Any

import typer

from divergent_tokens.cli.compare import compare
from divergent_tokens.cli.complete import complete
from divergent_tokens.cli.components import components
from divergent_tokens.cli.compress import compress
from divergent_tokens.cli.export import export
from divergent_tokens.cli.output import BAD_INPUT, BUG, BY_SIGNAL, drop_output, print_out, say
from divergent_tokens.cli.pilot import pilot
from divergent_tokens.cli.prune import prune
from divergent_tokens.cli.report import report
from divergent_tokens.cli.search import search
from divergent_tokens.cli.signals import leave_at_once, on_signals, received, remarks, stopped_by
from divergent_tokens.cli.sweep import sweep
from divergent_tokens.cli.verify import verify
from divergent_tokens.errors import DivergentTokensError

# Heavy imports stand inside each command, so that `dtm --help` answers at once.

# What typer raises about a command line; it has brought click's classes along, and then its own.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Find out, token by token, how far a compressed language model has moved from its base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        print_out(f"dtm {version('divergent-tokens')}\n")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


COMMANDS = (
    compare,
    pilot,
    complete,
    components,
    sweep,
    search,
    compress,
    verify,
    export,
    prune,
    report,
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run `dtm`; every foreseen problem is one message and an exit code."""
    received.clear()
    remarks.clear()
    on_signals(leave_at_once)
    try:
        code = _run()
    except BaseException:
        if not received:
            raise
        code = 0
    if received:  # whatever a library made of the interrupt
        code = say(stopped_by(received[0]), BY_SIGNAL + received[0])
    on_signals(signal.SIG_IGN)  # all is done, and the interpreter's end is no place to die
    sys.exit(code)


def _run() -> int:
    try:
        return app(standalone_mode=False, prog_name="dtm") or 0
    except DivergentTokensError as error:
        return say(str(error), BAD_INPUT)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print_out(error.format_message() + "\n")
            return BAD_INPUT
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return say(error.format_message() + hint, BAD_INPUT)
    except SystemExit:  # how typer leaves when nobody reads its help
        drop_output()
        return 0
    except Exception as error:
        if received or isinstance(error, typer.Abort):  # what typer or a library made of it
            return BY_SIGNAL + signal.SIGINT
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            return say(
                "out of memory, even for one sequence at once; use fewer --new-tokens, --dtype "
                "bfloat16, another --device or a smaller model",
                BAD_INPUT,
            )
        traceback.print_exc()
        return say("this is a mistake in dtm itself; please report the lines above", BUG)
