"""The command `dtm`: parse, call one verb, print one report, exit code."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.console import Console
from rich.text import Text

from divergent_tokens.conditions import Condition, parse_condition
from divergent_tokens.errors import DivergentTokensError

if TYPE_CHECKING:
    from divergent_tokens.candidates import Candidates
    from divergent_tokens.measure.progress import Progress
    from divergent_tokens.measure.prompts import PromptSet
    from divergent_tokens.models import Model

# Heavy imports stand inside each command, so that `dtm --help` answers at once.

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

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


Base = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or demo:smollm2.", show_default=False)]
Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="SOURCE",
        help="builtin, self (drawn from the base), a .txt, .jsonl or .parquet file, or hf:DATASET[:CONFIG[:SPLIT]].",
    ),
]
NPrompts = Annotated[int, typer.Option("--n-prompts", min=1, help="How many prompts.")]
SkipPrompts = Annotated[
    int, typer.Option("--skip-prompts", min=0, help="Leave out the first so many that would fit.")
]
Prefix = Annotated[int, typer.Option("--prefix", min=1, help="Tokens of each prompt.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="Most tokens of each completion.")]
Chat = Annotated[bool, typer.Option("--chat", help="Each document is a user's turn in the chat template.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end of sequence.")]
TextField = Annotated[str, typer.Option("--text-field", help="The field of a row that holds its text.")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Sequences at once; found by trying if left out.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto, float32, bfloat16, float16. auto: float32 on a CPU, the checkpoint's own elsewhere.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="For resampling, drawn prompts and the rounding floor.")]
Cache = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Where completions and dequantized models are kept.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights (they are a risk).")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint (a risk).")
]


@app.command()
def compare(
    base: Base,
    candidates: Annotated[
        list[str] | None, typer.Argument(help="Models to compare with it.", show_default=False)
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Compare with the base under a scheme: int8, int8:tensor, int4:g64, int4:g64:asym, magnitude:0.5."),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Compare with another engine's scores of `dtm complete`'s file."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write comparison.json here.")] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="Exit with 1 if it is true of any candidate: 'fdt<40 and sdt>0.1'."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Measure perplexity on this text too.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Print so many of each candidate's earliest divergences.")] = 0,
    format: Annotated[Format, typer.Option("--format", help="How the result is printed.")] = Format.text,  # noqa: A002
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    include: Annotated[
        list[str] | None, typer.Option(help="Schemes touch only components that match (glob, or re:...).")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Schemes leave out components that match (glob, or re:...).")
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
        raise DivergentTokensError(f"--level is {level}; expected a share between 0 and 1, such as 0.95")
    if not (candidates or scheme or scores):
        raise DivergentTokensError(
            f"there is no candidate to compare {base} with; name a model, or give --scheme int8, "
            "or --scores NAME=FILE"
        )
    files = _scores_files(scores or [])

    from divergent_tokens.candidates import joined, model_candidates, scheme_candidates
    from divergent_tokens.measure import comparison
    from divergent_tokens.measure.perplexity import read_text
    from divergent_tokens.models import load_model
    from divergent_tokens.store import check_writable, default_cache

    if out:
        check_writable(out)
    given_text = read_text(text) if text else None
    cache = cache or default_cache()
    loading: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "cache": cache,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }
    with _progress(quiet) as progress:
        progress(f"loading {base}", 0, 1, "")
        model = load_model(base, **loading)
        progress(f"loading {base}", 1, 1, "")
        schemes: Candidates = {}
        if scheme:
            schemes = scheme_candidates(model, *scheme, include=include or (), exclude=exclude or ())
        everything = joined(model_candidates(*(candidates or ()), **loading), schemes)
        for name in files.keys() & everything.keys():
            raise DivergentTokensError(f"two candidates are called {name!r}; name the scores otherwise")
        result = comparison.compare(
            model,
            everything,
            _read_prompts(
                prompts, model, n_prompts, skip_prompts, prefix, chat, text_field, seed, cache, progress
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
    from divergent_tokens.store import check_writable, default_cache

    check_writable(out)
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
                prompts, model, n_prompts, skip_prompts, prefix, chat, text_field, seed, cache, progress
            ),
            new_tokens=new_tokens,
            ignore_eos=ignore_eos,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
        )
    write_completions(out, written)
    typer.echo(f"{len(written.prompts)} prompts, {int(written.mask.sum())} completion tokens: {out}")


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
            raise DivergentTokensError(f"--scores {value!r}; expected NAME=FILE, as in vllm=scores.jsonl")
        if name in files:
            raise DivergentTokensError(f"--scores names {name!r} twice; give each engine its own name")
        files[name] = Path(file)
    return files


def _print_comparison(record: dict[str, Any], format: Format) -> None:  # noqa: A002
    from divergent_tokens.report.text import comparison_markdown, comparison_text

    if format is Format.json:
        typer.echo(_as_json(record))
    elif format is Format.markdown:
        typer.echo(comparison_markdown(record), nl=False)
    else:
        console = Console()
        console.print(comparison_text(record, width=console.width))


def _fail_where_true(conditions: list[Condition], record: dict[str, Any]) -> None:
    failed = [
        f"{candidate['name']}: {condition}"
        for candidate in record["candidates"]
        for condition in conditions
        if condition.holds(candidate["metrics"])
    ]
    if failed:
        Console(stderr=True).print(Text("failed: " + "; ".join(failed)))
        raise typer.Exit(FAILED)


def _write_json(target: Path, record: dict[str, Any]) -> None:
    from divergent_tokens.store import write_text

    write_text(target, _as_json(record) + "\n")


def _as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


@contextmanager
def _progress(quiet: bool) -> Iterator["Progress"]:
    """A bar on the terminal's error stream, one line a stage; nothing where nobody watches."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        from divergent_tokens.measure.progress import silent

        yield silent
        return
    from divergent_tokens.report.bars import Bars

    with Bars(console) as bars:
        yield bars


def main() -> None:
    """Run `dtm`; every foreseen problem is one message and an exit code."""
    try:
        code = app(standalone_mode=False)
    except DivergentTokensError as error:
        code = _say(str(error), BAD_INPUT)
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        code = BAD_INPUT
    except click.ClickException as error:
        hint = f" (see {error.ctx.command_path} --help)" if getattr(error, "ctx", None) else ""  # type: ignore[attr-defined]
        code = _say(error.format_message() + hint, BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        code = _say("interrupted; nothing was left half written", INTERRUPTED)
    sys.exit(code)


def _say(message: str, code: int) -> int:
    print(f"dtm: {message}", file=sys.stderr)
    return code
