"""The command `dtm`: parse, call one verb, print one report, exit code."""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from divergent_tokens.conditions import Condition, parse_condition
from divergent_tokens.errors import DivergentTokensError

if TYPE_CHECKING:
    from divergent_tokens.candidates import Candidates
    from divergent_tokens.measure.progress import Progress
    from divergent_tokens.measure.prompts import PromptSet
    from divergent_tokens.models import Model

# Heavy imports stand inside each command, so that `dtm --help` answers at once.

FAILED, BAD_INPUT, BUG = 1, 2, 3
BY_SIGNAL = 128
"""Ended by a signal: this plus its number, so that an interrupt is 130."""

# What typer raises about a command line; it has brought click's classes along, and then its own.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Find out, token by token, how far a compressed language model has moved from its base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Format(StrEnum):
    """How the result is printed."""

    text = "text"
    markdown = "markdown"
    json = "json"


Base = Annotated[
    str, typer.Argument(help="Hub id, folder, .gguf file, or demo:smollm2.", show_default=False)
]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="builtin, self (drawn from the base), a .txt, .jsonl or .parquet file, or "
        "hf:DATASET[:CONFIG[:SPLIT]].",
    ),
]
NPrompts = Annotated[int, typer.Option("--n-prompts", min=1, help="How many prompts.")]
SkipPrompts = Annotated[
    int, typer.Option("--skip-prompts", min=0, help="Leave out the first so many that would fit.")
]
Prefix = Annotated[int, typer.Option("--prefix", min=1, help="Tokens of each prompt.")]
NewTokens = Annotated[
    int, typer.Option("--new-tokens", min=1, help="Most tokens of each completion.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Each document is a user's turn in the chat template.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end of sequence.")]
TextField = Annotated[
    str, typer.Option("--text-field", help="The field of a row that holds its text.")
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Sequences at once; found by trying if left out."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16, float16. auto: float32 on a CPU, the checkpoint's own "
        "elsewhere.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        max=2**32 - 1,
        help="For resampling, drawn prompts and the rounding floor.",
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="Where completions and dequantized models are kept."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load pickled weights (they are a risk).")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint (a risk)."),
]


@app.command()
def compare(
    base: Base,
    candidates: Annotated[
        list[str] | None, typer.Argument(help="Models to compare with it.", show_default=False)
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare with the base under a scheme: int8, int8:tensor, int4:g64, "
            "int4:g64:asym, magnitude:0.5."
        ),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Compare with another engine's scores of `dtm complete`'s file.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write comparison.json here.")] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Exit with 1 if it is true of any candidate: 'fdt<40 and sdt>0.1'.",
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="FILE", help="Measure perplexity on this text too.")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Print so many of each candidate's earliest divergences.")
    ] = 0,
    format: Annotated[
        Format, typer.Option("--format", help="How the result is printed.")
    ] = Format.text,
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Schemes touch only components that match (glob, or re:...)."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Schemes leave out components that match (glob, or re:...)."),
    ] = None,
    prompts: Prompts = "builtin",
    n_prompts: NPrompts = 128,
    skip_prompts: SkipPrompts = 0,
    prefix: Prefix = 64,
    new_tokens: NewTokens = 128,
    chat: Chat = False,
    ignore_eos: IgnoreEos = False,
    text_field: TextField = "text",
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    cache: Cache = None,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure how far candidates have moved from a base, token by token."""
    conditions = [parse_condition(condition) for condition in fail_if or ()]
    if not 0 < level < 1:
        raise DivergentTokensError(
            f"--level is {level}; expected a share between 0 and 1, such as 0.95"
        )
    if not (candidates or scheme or scores):
        raise DivergentTokensError(
            f"there is no candidate to compare {base} with; name a model, or give --scheme int8, "
            "or --scores NAME=FILE"
        )
    if (include or exclude) and not scheme:
        raise DivergentTokensError(
            "--include and --exclude choose what a scheme touches, and no --scheme is given; give "
            "one, or leave them out"
        )
    files = _scores_files(scores or [])
    _check_decidable(conditions, has_text=text is not None, engines=list(files))
    if out:
        _check_out(out, *files.values(), text, prompts)

    from divergent_tokens.candidates import (
        check_names,
        joined,
        model_candidates,
        scheme_candidates,
    )
    from divergent_tokens.compress.schemes import parse_scheme
    from divergent_tokens.measure import comparison
    from divergent_tokens.measure.perplexity import read_text
    from divergent_tokens.models import load_model
    from divergent_tokens.store import default_cache

    _on_signals(_tidy_up)
    # Whatever is wrong with the candidates is said before any work is done on the base.
    check_names(*(candidates or ()), *map(str, map(parse_scheme, scheme or ())), *files)
    given_text = read_text(text) if text else None
    cache = cache or default_cache()
    loading: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "cache": cache,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }
    model_candidates(*(candidates or ()), **loading)
    with _progress(quiet) as progress:
        progress(f"loading {base}", 0, 1, "")
        model = load_model(base, **loading)
        progress(f"loading {base}", 1, 1, "")
        # In the base's dtype and on its device: other rounding would be counted as harm.
        loading |= {"dtype": model.dtype, "device": model.device}
        models = model_candidates(*(candidates or ()), **loading)
        schemes: Candidates = {}
        if scheme:
            schemes = scheme_candidates(
                model, *scheme, include=include or (), exclude=exclude or ()
            )
        result = comparison.compare(
            model,
            joined(models, schemes),
            _read_prompts(
                prompts,
                model,
                n_prompts,
                skip_prompts,
                prefix,
                chat,
                text_field,
                seed,
                cache,
                progress,
            ),
            scores=files,
            new_tokens=new_tokens,
            ignore_eos=ignore_eos,
            text=given_text,
            n_examples=examples,
            level=level,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
            command=["dtm", *sys.argv[1:]],
        )
    record = result.to_json()
    if out:
        _write_json(out, record)
    _print_comparison(record, format)
    _fail_where_true(conditions, record)


@app.command()
def complete(
    base: Base,
    out: Annotated[Path, typer.Option(help="Write the token ids here, one JSON object a prompt.")],
    prompts: Prompts = "builtin",
    n_prompts: NPrompts = 128,
    skip_prompts: SkipPrompts = 0,
    prefix: Prefix = 64,
    new_tokens: NewTokens = 128,
    chat: Chat = False,
    ignore_eos: IgnoreEos = False,
    text_field: TextField = "text",
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    cache: Cache = None,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the base's greedy completions as token ids, for another engine to score."""
    from divergent_tokens.measure import completions
    from divergent_tokens.measure.engine import write_completions
    from divergent_tokens.models import load_model
    from divergent_tokens.store import default_cache

    _on_signals(_tidy_up)
    _check_out(out, prompts)
    cache = cache or default_cache()
    with _progress(quiet) as progress:
        progress(f"loading {base}", 0, 1, "")
        model = load_model(
            base,
            dtype=dtype,
            device=device,
            cache=cache,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        progress(f"loading {base}", 1, 1, "")
        written = completions.complete(
            model,
            _read_prompts(
                prompts,
                model,
                n_prompts,
                skip_prompts,
                prefix,
                chat,
                text_field,
                seed,
                cache,
                progress,
            ),
            new_tokens=new_tokens,
            ignore_eos=ignore_eos,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
        )
    write_completions(out, written)
    _print(f"{len(written.prompts)} prompts, {int(written.mask.sum())} completion tokens: {out}\n")


def _read_prompts(
    source: str,
    model: "Model",
    n_prompts: int,
    skip: int,
    prefix: int,
    chat: bool,
    text_field: str,
    seed: int,
    cache: Path,
    progress: "Progress",
) -> "PromptSet":
    from divergent_tokens.measure.prompts import read_prompts

    return read_prompts(
        source,
        model,
        n_prompts=n_prompts,
        skip=skip,
        prefix=prefix,
        chat=chat,
        text_field=text_field,
        seed=seed,
        cache=cache,
        progress=progress,
    )


def _scores_files(values: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for value in values:
        name, sign, file = value.partition("=")
        if not (name and sign and file):
            raise DivergentTokensError(
                f"--scores {value!r}; expected NAME=FILE, as in vllm=scores.jsonl"
            )
        if name in files:
            raise DivergentTokensError(
                f"--scores names {name!r} twice; give each engine its own name"
            )
        files[name] = Path(file)
        if not files[name].is_file():
            raise DivergentTokensError(f"the scores file {file} does not exist; check the path")
    return files


def _check_decidable(
    conditions: Sequence[Condition], *, has_text: bool, engines: Sequence[str]
) -> None:
    """Raise at once for a condition on what will not be measured, not after an hour's work."""
    metrics = {part.metric: condition for condition in conditions for part in condition.parts}
    if "ppl" in metrics and not has_text:
        raise DivergentTokensError(
            f"the condition {metrics['ppl']} cannot be decided: ppl is measured on a text; give "
            "one with --text"
        )
    for metric in ("ppl", "kl", "kl_p99", "acceptance"):
        if metric in metrics and engines:
            raise DivergentTokensError(
                f"the condition {metrics[metric]} cannot be decided for {engines[0]}: a scores "
                f"file does not hold {metric}; leave it out, or compare models only"
            )


def _check_out(out: Path, *inputs: Path | str | None) -> None:
    """Raise where `out` could not be written, or would replace what is read."""
    from divergent_tokens.store import check_writable

    check_writable(out)
    for file in inputs:
        if file and out.is_file() and Path(file).exists() and out.samefile(file):
            raise DivergentTokensError(
                f"--out {out} would replace {file}, which is read; name another file"
            )


def _print_comparison(record: dict[str, Any], format: Format) -> None:
    from divergent_tokens.report.text import comparison_markdown, comparison_text

    if format is Format.json:
        _print(_as_json(record) + "\n")
    elif format is Format.markdown:
        _print(comparison_markdown(record))
    else:
        console = Console()
        with console.capture() as captured:
            console.print(comparison_text(record, width=console.width))
        _print(captured.get())


def _fail_where_true(conditions: list[Condition], record: dict[str, Any]) -> None:
    failed = [
        f"{candidate['name']}: {condition} ({condition.found(candidate['metrics'])})"
        for candidate in record["candidates"]
        for condition in conditions
        if condition.holds(candidate["metrics"])
    ]
    if failed:
        raise typer.Exit(_say("failed: " + "; ".join(failed), FAILED))


def _write_json(target: Path, record: dict[str, Any]) -> None:
    from divergent_tokens.store import write_text

    write_text(target, _as_json(record) + "\n")


def _as_json(record: dict[str, Any]) -> str:
    """JSON in ASCII: any terminal shows it, obeys nothing in it, and any file name fits into it."""
    return json.dumps(record, allow_nan=False)


def _print(text: str) -> None:
    """Write to the standard output; a reader that has gone (`| head`) changes nothing else."""
    if sys.stdout is None:  # closed by the shell
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
    except OSError as error:
        _drop_output()
        raise DivergentTokensError(
            f"could not write to the standard output: {error.strerror}; free some room, or send "
            "it elsewhere"
        ) from error


def _drop_output() -> None:
    """Point the standard output at nothing: what is still buffered would fail again at exit."""
    with suppress(OSError), Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())


@contextmanager
def _progress(quiet: bool) -> Iterator["Progress"]:
    """A bar on the terminal's error stream, one line a stage; nothing where nobody watches."""
    # Not by rich's own judgement: it takes FORCE_COLOR, common in builds, for somebody watching.
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        from divergent_tokens.measure.progress import silent

        yield silent
        return
    from divergent_tokens.report.bars import Bars

    with Bars(Console(stderr=True)) as bars:
        yield bars


def main() -> None:
    """Run `dtm`; every foreseen problem is one message and an exit code."""
    _received.clear()
    _on_signals(_leave_at_once)
    try:
        code = _run()
    except BaseException:
        if not _received:
            raise
        code = 0
    if _received:  # whatever a library made of the interrupt
        code = _say(_stopped_by(_received[0]), BY_SIGNAL + _received[0])
    _on_signals(signal.SIG_IGN)  # all is done, and the interpreter's end is no place to die
    sys.exit(code)


def _run() -> int:
    try:
        return app(standalone_mode=False, prog_name="dtm") or 0
    except DivergentTokensError as error:
        return _say(str(error), BAD_INPUT)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            _print(error.format_message() + "\n")
            return BAD_INPUT
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _say(error.format_message() + hint, BAD_INPUT)
    except SystemExit:  # how typer leaves when nobody reads its help
        _drop_output()
        return 0
    except Exception as error:
        if _received or isinstance(error, typer.Abort):  # what typer or a library made of it
            return BY_SIGNAL + signal.SIGINT
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            return _say(
                "out of memory, even for one sequence at once; use fewer --new-tokens, --dtype "
                "bfloat16, another --device or a smaller model",
                BAD_INPUT,
            )
        traceback.print_exc()
        return _say("this is a mistake in dtm itself; please report the lines above", BUG)


_received: list[int] = []
"""The signals that came since `main` began."""


def _on_signals(handler: Callable[[int, object], None] | signal.Handlers) -> None:
    """Have interrupts, SIGTERM and the terminal's end handled, but for what the parent ignores."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        return
    ours = (signal.SIG_DFL, signal.default_int_handler, _leave_at_once, _tidy_up)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) in ours:
            signal.signal(number, handler)


def _leave_at_once(number: int, _frame: object) -> None:
    """While packages are imported nothing is half written, and an exception makes torch abort."""
    os._exit(_say(_stopped_by(number), BY_SIGNAL + number))


def _tidy_up(number: int, _frame: object) -> None:
    """Raise KeyboardInterrupt, so that whatever is half written is taken away."""
    _received.append(number)
    if len(_received) == 1 or number != signal.SIGINT:
        raise KeyboardInterrupt
    # Who strikes ctrl-c twice must not interrupt the tidying up.


def _stopped_by(number: int) -> str:
    word = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    return f"{word}; nothing was left half written"


def _say(message: str, code: int) -> int:
    """One line on the error stream; what a checkpoint's files say cannot command the terminal."""
    line = "".join(c if c.isprintable() else " " for c in message)
    with suppress(OSError):  # nobody listens
        print(f"dtm: {line}", file=sys.stderr, flush=True)
    return code
