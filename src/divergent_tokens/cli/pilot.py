"""`dtm pilot`: how many prompts, which prefix and how many new tokens a comparison needs."""

import sys
from pathlib import Path
from typing import Annotated, Any

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
    IgnoreEos,
    MaxMemory,
    NPrompts,
    Prompts,
    Quiet,
    Seed,
    SkipPrompts,
    TextField,
    TrustRemoteCode,
)
from divergent_tokens.cli.output import check_out, print_record, progress_bar, write_json
from divergent_tokens.cli.signals import on_signals, tidy_up
from divergent_tokens.errors import DivergentTokensError

PREFIXES = (32, 64)
NEW_TOKENS = (32, 64, 128)
DEFAULTS: dict[str, Any] = {
    "--prompts": "builtin",
    "--skip-prompts": 0,
    "--text-field": "text",
    "--batch-size": None,
    "--device": "auto",
    "--dtype": "auto",
    "--seed": 0,
    "--calibration": "builtin",
    "--level": 0.95,
    "--max-memory": None,
    "--cache": None,
}
"""Options that the next command repeats where they are others."""


def pilot(
    base: Base,
    candidates: Annotated[
        list[str] | None, typer.Argument(help="Models to compare with it.", show_default=False)
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Compare with the base under a scheme: int8, int4:g64, magnitude:0.5."),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="Compare with the base under a plan that `dtm search` wrote."),
    ] = None,
    width: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC=WIDTH",
            help="How wide an interval may be, end to end: fdt=10 (tokens), sdt=0.01, or of the "
            "value: kl=25%. Left out: fdt=10, sdt=25%, kl=25%.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write pilot.json here.")] = None,
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
    n_prompts: NPrompts = 32,
    skip_prompts: SkipPrompts = 0,
    prefix: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of each prompt, each a run of its own. Left out: 32, 64."),
    ] = None,
    new_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Most tokens of each completion; only the most are run. Left out: 32, 64, 128.",
        ),
    ] = None,
    chat: Chat = False,
    ignore_eos: IgnoreEos = False,
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
    """Say from a small trial how many prompts, which prefix and how many new tokens to use."""
    if not 0 < level < 1:
        raise DivergentTokensError(
            f"--level is {level}; expected a share between 0 and 1, such as 0.95"
        )
    if not (candidates or scheme or plan):
        raise DivergentTokensError(
            f"there is no candidate to try {base} with; name a model, or give --scheme int8 or "
            "--plan plan.json"
        )
    if (include or exclude) and not scheme:
        raise DivergentTokensError(
            "--include and --exclude choose what a scheme touches, and no --scheme is given; give "
            "one, or leave them out"
        )
    if chat and prefix:
        raise DivergentTokensError(
            "--prefix cuts documents and --chat takes whole turns; give one of the two"
        )
    prefixes, lengths = prefix or [*PREFIXES], new_tokens or [*NEW_TOKENS]
    if out:
        check_out(out, base, *(candidates or ()), *(plan or ()), prompts)

    from divergent_tokens import pilot as pilots
    from divergent_tokens.candidates import (
        model_candidates,
    )
    from divergent_tokens.measure.prompts import read_prompts
    from divergent_tokens.measure.widths import parse_widths
    from divergent_tokens.store import default_cache

    on_signals(tidy_up)
    # Whatever is wrong with what was asked for is said before any work is done on the base.
    widths = parse_widths(width or (), new_tokens=max(lengths))
    given = Asked(
        candidates or (), scheme or (), plan or (), include or (), exclude or (), calibration
    )
    given.check()
    options = {
        "--prompts": prompts,
        "--skip-prompts": skip_prompts,
        "--text-field": text_field,
        "--batch-size": batch_size,
        "--device": device,
        "--dtype": dtype,
        "--seed": seed,
        "--calibration": calibration,
        "--level": level,
        "--max-memory": None if max_memory is None else f"{max_memory}B",
        "--cache": cache,
    }
    flags = {
        "--chat": chat,
        "--ignore-eos": ignore_eos,
        "--allow-pickle": allow_pickle,
        "--trust-remote-code": trust_remote_code,
    }
    lists = {"--scheme": scheme, "--plan": plan, "--include": include, "--exclude": exclude}
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
        reading: dict[str, Any] = {
            "prefix": max(prefixes),
            "chat": chat,
            "text_field": text_field,
            "seed": seed,
            "cache": cache,
            "progress": progress,
        }
        trial = read_prompts(prompts, model, n_prompts=n_prompts, skip=skip_prompts, **reading)
        result = pilots.pilot(
            model,
            given.candidates(model, **loading),
            trial,
            widths,
            prefixes=() if chat else prefixes,
            new_tokens=lengths,
            ignore_eos=ignore_eos,
            available=pilots.available(prompts, model, skip=skip_prompts, **reading),
            level=level,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
            comparing=[
                *("dtm", "compare", base, *(candidates or ())),
                *_given(lists, options, flags),
            ],
            command=["dtm", *sys.argv[1:]],
        )
    record = result.to_json()
    if out:
        write_json(out, record)
    _print_pilot(record, format)


def _given(lists: dict[str, Any], options: dict[str, Any], flags: dict[str, bool]) -> list[str]:
    """The options of a comparison as they were typed; those at their defaults are left out."""
    words = [
        word
        for name, values in lists.items()
        for value in values or ()
        for word in (name, str(value))
    ]
    for name, value in options.items():
        if value != DEFAULTS[name]:
            words += [name, str(value)]
    return words + [name for name, given in flags.items() if given]


def _print_pilot(record: dict[str, Any], format: Format) -> None:
    from divergent_tokens.report.pilot import pilot_markdown, pilot_text

    print_record(
        record,
        format,
        text=lambda _: pilot_text(record),
        markdown=lambda: pilot_markdown(record),
    )
