"""`dtm verify`: whether a checkpoint is what its plan says, as others load it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from divergent_tokens.cli.loading import load_base
from divergent_tokens.cli.options import (
    BatchSize,
    Cache,
    CalibrationSource,
    Chat,
    Device,
    Format,
    IgnoreEos,
    NewTokens,
    NPrompts,
    Prefix,
    Prompts,
    Quiet,
    Seed,
    SkipPrompts,
    TextField,
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
from divergent_tokens.errors import RecordError


def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `dtm compress` wrote.", show_default=False)
    ],
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="The base, if it was moved since the plan was made."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write verification.json here.")] = None,
    format: Annotated[
        Format, typer.Option("--format", help="How the result is printed.")
    ] = Format.text,
    prompts: Prompts = "builtin",
    n_prompts: NPrompts = 32,
    skip_prompts: SkipPrompts = 0,
    prefix: Prefix = 64,
    new_tokens: NewTokens = 128,
    chat: Chat = False,
    ignore_eos: IgnoreEos = False,
    text_field: TextField = "text",
    batch_size: BatchSize = None,
    device: Device = "auto",
    seed: Seed = 0,
    calibration: CalibrationSource = "builtin",
    cache: Cache = None,
    quiet: Quiet = False,
) -> None:
    """Reload a checkpoint as anybody would, and hold it against the plan that it was made from.

    In a fresh process, with plain transformers: no key missing or left over, every weight equal to
    the plan's to the bit, its sizes as planned. Then it is measured on prompts beside the plan in
    memory. Ends with 1 if anything is not as planned.
    """
    if out:
        check_out(out, base, None if _is_verification(out) else folder, prompts)

    from divergent_tokens import verify as verification
    from divergent_tokens.compress.checkpoint import PLAN
    from divergent_tokens.compress.plan_file import read_plan
    from divergent_tokens.measure.prompts import read_prompts
    from divergent_tokens.store import default_cache

    on_signals(tidy_up)
    if not folder.is_dir():
        raise RecordError(f"{folder} is no folder; name one that `dtm compress` wrote")
    file = read_plan(folder / PLAN)
    cache = cache or default_cache()
    with progress_bar(quiet) as progress:
        model = load_base(
            base or file.base["reference"],
            progress,
            dtype=_dtype(folder),
            device=device,
            cache=cache,
        )
        found = verification.verify(
            folder,
            model,
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
            new_tokens=new_tokens,
            ignore_eos=ignore_eos,
            calibration=calibration,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
            command=["dtm", *sys.argv[1:]],
        )
    record = found.to_json()
    if out:
        write_json(out, record)
    _print(record, format)
    failed = [check for check in record["checks"] if not check["passed"]]
    if failed:
        said = "; ".join(f"{check['name']}: {check['found']}" for check in failed)
        raise typer.Exit(say(f"{folder} is not as its plan says: {said}", FAILED))


def _is_verification(out: Path) -> bool:
    """Whether an earlier run wrote it, which may lie beside the checkpoint that it is about."""
    try:
        record = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and str(record.get("schema")).startswith(
        "divergent-tokens/verification/"
    )


def _dtype(folder: Path) -> str:
    """What the checkpoint's config says that it runs in; auto where it says nothing sound."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("dtype") or config.get("torch_dtype")
    except (OSError, ValueError, AttributeError):
        return "auto"
    return found if found in ("float32", "bfloat16", "float16") else "auto"


def _print(record: dict[str, Any], format: Format) -> None:
    from divergent_tokens.report.verification import verification_markdown, verification_text

    print_record(
        record,
        format,
        text=lambda _width: verification_text(record),
        markdown=lambda: verification_markdown(record),
    )
