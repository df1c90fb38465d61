"""`dtm compress`: a plan carried out in a checkpoint that others load."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergent_tokens.cli.loading import load_base
from divergent_tokens.cli.options import Base, Cache, CalibrationSource, Format, Quiet
from divergent_tokens.cli.output import print_record, progress_bar
from divergent_tokens.cli.signals import on_signals, tidy_up
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.errors import DivergentTokensError

if TYPE_CHECKING:
    from divergent_tokens.compress.checkpoint import Checkpoint
    from divergent_tokens.compress.plan_file import PlanFile
    from divergent_tokens.compress.servers import Problem

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def compress(
    base: Base,
    plan: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN", help="The plan that `dtm search` wrote.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Write the checkpoint into this folder.", show_default=False)
    ],
    dense: Annotated[
        bool, typer.Option("--dense", help="Write ordinary weights, whatever the schemes.")
    ] = False,
    target: Annotated[
        Coupling,
        typer.Option(help="Refuse a plan that this would not load rightly."),
    ] = Coupling.transformers,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the weights that are not in codes: float32, bfloat16, float16; auto: as the "
            "base's files have them (a GGUF: float32)."
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that this command wrote.")
    ] = False,
    format: Annotated[
        Format, typer.Option("--format", help="How the result is printed.")
    ] = Format.text,
    calibration: CalibrationSource = "builtin",
    cache: Cache = None,
    quiet: Quiet = False,
) -> None:
    """Write the base under a plan as a checkpoint that plain transformers loads.

    Compressed components are written in compressed-tensors' formats, a tensor at a time, so that
    a model larger than memory can be written. The folder appears whole or not at all.
    """
    if dtype not in _DTYPES:
        raise DivergentTokensError(f"--dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")

    import torch

    from divergent_tokens.calibrated import ready_plan
    from divergent_tokens.compress.checkpoint import (
        check_folder,
        check_for,
        weights_dtype,
        write_checkpoint,
    )
    from divergent_tokens.compress.components import find_components
    from divergent_tokens.compress.plan import check_plan
    from divergent_tokens.compress.plan_file import read_plan
    from divergent_tokens.models import outline_model
    from divergent_tokens.store import default_cache

    on_signals(tidy_up)
    file = read_plan(plan)
    check_folder(out, overwrite=overwrite)
    cache = cache or default_cache()
    of_weights = None if dtype == "auto" else getattr(torch, dtype)
    with progress_bar(quiet) as progress:
        progress("load", 0, 1, "models")
        outline = outline_model(base, cache=cache)
        progress("load", 1, 1, "models")
        ready = file.plan()
        if not all(scheme.is_ready for scheme in ready.schemes.values()):
            running = of_weights or weights_dtype(outline)
            model = load_base(base, progress, dtype=running, device="cpu", cache=cache)
            components = find_components(model.network, include=["*"])
            check_plan(ready, components)
            ready = ready_plan(
                model, components, ready, source=calibration, cache=cache, progress=progress
            )
        written = write_checkpoint(
            outline,
            file,
            out,
            dense=dense,
            target=target,
            dtype=of_weights,
            ready=ready,
            overwrite=overwrite,
            progress=progress,
        )
    elsewhere = Coupling.vllm if target is Coupling.transformers else Coupling.transformers
    found = () if dense else check_for(outline, file.plan(), elsewhere, of_weights)
    record = _record(base, file, written, elsewhere, found)
    _print(record, format)


def _record(
    base: str,
    file: "PlanFile",
    written: "Checkpoint",
    elsewhere: Coupling,
    found: "tuple[Problem, ...]",
) -> dict[str, Any]:
    return {
        "base": {"reference": base, "fingerprint": file.base["fingerprint"]},
        "schemes": dict(Counter(file.components.values()).most_common()),
        **written.to_json(),
        "elsewhere": {
            "target": str(elsewhere),
            "n_problems": len(found),
            "first": str(found[0]) if found else None,
        },
    }


def _print(record: dict[str, Any], format: Format) -> None:
    from divergent_tokens.report.checkpoint import checkpoint_markdown, checkpoint_text

    print_record(
        record,
        format,
        text=lambda _width: checkpoint_text(record),
        markdown=lambda: checkpoint_markdown(record),
    )
