"""`dtm compare`: a base and its candidates in one table."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergent_tokens.cli.loading import Asked, load_base
from divergent_tokens.cli.options import (
    AllowPickle,
    Base,
    BatchSize,
    Cache,
    CalibrationSource,
    Chat,
    Device,
    Dtype,
    Format,
    GenerateWith,
    IgnoreEos,
    Limit,
    MaxMemory,
    NewTokens,
    NPrompts,
    NumFewshot,
    Prefix,
    Prompts,
    Quiet,
    Seed,
    SkipPrompts,
    TaskNames,
    TaskPath,
    TextField,
    TrustRemoteCode,
    Writer,
)
from divergent_tokens.cli.output import (
    FAILED,
    check_out,
    print_record,
    progress_bar,
    say,
    write_json,
)
from divergent_tokens.cli.signals import on_signals, tidy_up
from divergent_tokens.conditions import Condition, largest_flips, parse_condition
from divergent_tokens.errors import DivergentTokensError

if TYPE_CHECKING:
    pass


def compare(
    base: Base,
    candidates: Annotated[
        list[str] | None,
        typer.Argument(metavar="CANDIDATE", help="Models to compare with it.", show_default=False),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCHEME",
            help="Compare with the base under a scheme: int8, int8:tensor, int4:g64, "
            "int4:g64:asym, magnitude:0.5.",
        ),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Compare with the base under a plan that `dtm search` wrote."
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
    report: Annotated[
        Path | None,
        typer.Option(metavar="PAGE", help="Write a page for a browser here, as dtm report does."),
    ] = None,
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
    tasks: TaskNames = None,
    task_path: TaskPath = None,
    num_fewshot: NumFewshot = None,
    limit: Limit = None,
    examples: Annotated[
        int, typer.Option(min=0, help="Print so many of each candidate's earliest divergences.")
    ] = 0,
    format: Annotated[
        Format, typer.Option("--format", help="How the result is printed.")
    ] = Format.text,
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Schemes touch only components that match (glob, or re:...)."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Schemes leave out components that match (glob, or re:...)."
        ),
    ] = None,
    prompts: Prompts = "builtin",
    n_prompts: NPrompts = 128,
    skip_prompts: SkipPrompts = 0,
    prefix: Prefix = 64,
    new_tokens: NewTokens = 128,
    chat: Chat = False,
    ignore_eos: IgnoreEos = False,
    generate_with: GenerateWith = Writer.transformers,
    text_field: TextField = "text",
    batch_size: BatchSize = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    calibration: CalibrationSource = "builtin",
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
    if not (candidates or scheme or plan or scores):
        raise DivergentTokensError(
            f"there is no candidate to compare {base} with; name a model, or give --scheme int8, "
            "--plan plan.json or --scores NAME=FILE"
        )
    if (include or exclude) and not scheme:
        raise DivergentTokensError(
            "--include and --exclude choose what a scheme touches, and no --scheme is given; give "
            "one, or leave them out"
        )
    if tasks is None and (task_path or num_fewshot is not None or limit is not None):
        raise DivergentTokensError(
            "--task-path, --num-fewshot and --limit are about tasks, and no --tasks is given; give "
            "some, or leave them out"
        )
    files = _scores_files(scores or [])
    _check_decidable(
        conditions, has_text=text is not None, has_tasks=tasks is not None, engines=list(files)
    )
    read = base, *(candidates or ()), *files.values(), *(plan or ()), text, prompts
    for option, target in (("--out", out), ("--report", report)):
        if target:
            check_out(target, *read, option=option)
    if report:
        _check_report(report, out)

    from divergent_tokens.candidates import model_candidates
    from divergent_tokens.measure import comparison
    from divergent_tokens.measure.perplexity import read_text
    from divergent_tokens.measure.prompts import read_prompts
    from divergent_tokens.store import default_cache

    on_signals(tidy_up)
    # Whatever is wrong with the candidates is said before any work is done on the base.
    given = Asked(
        candidates or (), scheme or (), plan or (), include or (), exclude or (), calibration
    )
    given.check(*files)
    given_text = read_text(text) if text else None
    asked = None
    if tasks is not None:
        from divergent_tokens.tasks import read_tasks

        asked = read_tasks(
            [name.strip() for name in tasks.split(",") if name.strip()],
            paths=task_path or (),
            num_fewshot=num_fewshot,
            limit=limit,
            chat=chat,
            batch_size=batch_size,
        )
    cache = cache or default_cache()
    loading: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "max_memory": max_memory,
        "cache": cache,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }
    model_candidates(*(candidates or ()), **loading)
    with progress_bar(quiet) as progress:
        model = load_base(base, progress, **loading)
        result = comparison.compare(
            model,
            given.candidates(model, **loading),
            read_prompts(
                prompts,
                model,
                n_prompts=n_prompts,
                prefix=prefix,
                skip=skip_prompts,
                chat=chat,
                text_field=text_field,
                seed=seed,
                cache=cache,
                progress=progress,
            ),
            scores=files,
            new_tokens=new_tokens,
            ignore_eos=ignore_eos,
            by_vllm=generate_with is Writer.vllm,
            text=given_text,
            n_examples=examples,
            tasks=asked,
            level=level,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
            command=["dtm", *sys.argv[1:]],
        )
    record = result.to_json()
    if out:
        write_json(out, record)
    if report:
        _write_report(report, record, out)
    _print_comparison(record, format)
    _fail_where_true(conditions, record)


def _check_report(report: Path, out: Path | None) -> None:
    """Raise before an hour's work for a page that could not be made after it."""
    from divergent_tokens.report.page import check_extra

    check_extra()
    if out is not None and report.resolve() == out.resolve():
        raise DivergentTokensError(f"--out and --report are both {out}; name two files")


def _write_report(report: Path, record: dict[str, Any], out: Path | None) -> None:
    from divergent_tokens.noise import noise
    from divergent_tokens.report.page import page
    from divergent_tokens.report.records import Source
    from divergent_tokens.store import write_text

    source = Source(out or Path("this comparison"), "comparison", record, noise=noise(record))
    write_text(report, page([source]))


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
    conditions: Sequence[Condition], *, has_text: bool, has_tasks: bool, engines: Sequence[str]
) -> None:
    """Raise at once for a condition on what will not be measured, not after an hour's work."""
    metrics = {part.metric: condition for condition in conditions for part in condition.parts}
    if "ppl" in metrics and not has_text:
        raise DivergentTokensError(
            f"the condition {metrics['ppl']} cannot be decided: ppl is measured on a text; give "
            "one with --text"
        )
    if "flips" in metrics and not has_tasks:
        raise DivergentTokensError(
            f"the condition {metrics['flips']} cannot be decided: flips are counted in tasks; name "
            "some with --tasks"
        )
    for metric in ("ppl", "kl", "kl_p99", "acceptance", "flips"):
        if metric in metrics and engines:
            raise DivergentTokensError(
                f"the condition {metrics[metric]} cannot be decided for {engines[0]}: a scores "
                f"file does not hold {metric}; leave it out, or compare models only"
            )


def _print_comparison(record: dict[str, Any], format: Format) -> None:
    from divergent_tokens.report.text import comparison_markdown, comparison_text

    print_record(
        record,
        format,
        text=lambda width: comparison_text(record, width=width),
        markdown=lambda: comparison_markdown(record),
    )


def _fail_where_true(conditions: list[Condition], record: dict[str, Any]) -> None:
    failed = [
        f"{candidate['name']}: {condition} ({condition.found(measured)})"
        for candidate in record["candidates"]
        for measured in [candidate["metrics"] | {"flips": largest_flips(candidate)}]
        for condition in conditions
        if condition.holds(measured)
    ]
    if failed:
        raise typer.Exit(say("failed: " + "; ".join(failed), FAILED))
