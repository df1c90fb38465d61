"""`dtm sweep`: how much harm each component does under each scheme."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from divergent_tokens.cli.loading import load_base
from divergent_tokens.cli.options import (
    AllowPickle,
    Base,
    BatchSize,
    Bits,
    Cache,
    CalibrationSource,
    Chat,
    Count,
    Couple,
    Device,
    Dtype,
    Format,
    GenerateWith,
    IgnoreEos,
    MaxMemory,
    NewTokens,
    NPrompts,
    Prefix,
    Prompts,
    Quiet,
    Seed,
    Share,
    SkipPrompts,
    TextField,
    TrustRemoteCode,
    Writer,
)
from divergent_tokens.cli.output import (
    check_out,
    print_record,
    progress_bar,
)
from divergent_tokens.cli.signals import on_signals, tidy_up
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.search.budgets import one_budget
from divergent_tokens.search.settings import Settings

if TYPE_CHECKING:
    from divergent_tokens.sensitivities import Sensitivities, Sensitivity

N_WORST = 5
"""Components that are named under each scheme."""


class Method(StrEnum):
    """How a component's harm is found out."""

    probe = "probe"
    measure = "measure"
    auto = "auto"


def sweep(
    base: Base,
    scheme: Annotated[
        list[str],
        typer.Option(metavar="SCHEME", help="What is done to each component: int8, int4:g64, ..."),
    ],
    out: Annotated[Path, typer.Option(help="Keep the rows here; what is there is not done again.")],
    method: Annotated[
        Method,
        typer.Option(
            help="probe: KL of all from one backward pass; measure: one by one, all metrics; "
            "auto: probe, then measure what the plan for a budget hangs on."
        ),
    ] = Method.probe,
    budget: Share = None,
    bits: Bits = None,
    count: Count = None,
    couple: Couple = None,
    draws: Annotated[int, typer.Option(min=1, help="Sets of labels that a probe draws.")] = 1,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Measure perplexity on this text too."),
    ] = None,
    format: Annotated[
        Format, typer.Option("--format", help="How the result is printed.")
    ] = Format.text,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Sweep only components that match (glob, or re:...)."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave out components that match (glob, or re:...)."),
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
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Run compiled layers; if left out, where it pays: on a GPU, for long work. A "
            "file goes on as it began.",
        ),
    ] = None,
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
    """Find out how much harm each component does under each scheme, on its own.

    Stopped at any moment and run again, it goes on where it was. The same file takes further
    schemes, and both methods.
    """
    if draws > 1 and method is Method.measure:
        raise DivergentTokensError(
            "--draws belongs to --method probe; nothing is drawn when components are measured"
        )
    asked = one_budget(budget, bits, count)
    if asked is None and method is Method.auto:
        raise DivergentTokensError(
            "--method auto measures what a plan hangs on, and there is no budget for one; give "
            "--budget 60%, --bits 5.5 or --count 84"
        )
    if (asked or couple) and method is not Method.auto:
        raise DivergentTokensError(
            f"a sweep by --method {method} is for any budget; give --method auto, or leave "
            f"{asked or '--couple'} to dtm search"
        )
    if text and method is Method.probe:
        raise DivergentTokensError(
            "a probe reads no text; give --method measure for perplexities, or leave out --text"
        )
    check_out(out, base, text, prompts)

    from divergent_tokens.calibrated import ready_schemes
    from divergent_tokens.compress.components import find_components
    from divergent_tokens.compress.schemes import parse_scheme
    from divergent_tokens.measure.perplexity import read_text
    from divergent_tokens.measure.prompts import read_prompts
    from divergent_tokens.sensitivities import resumed_run
    from divergent_tokens.settle import settle
    from divergent_tokens.store import default_cache
    from divergent_tokens.sweep import sweep as sweep_all

    on_signals(tidy_up)
    # Whatever can be said without the model is said before it is loaded.
    schemes = list(dict.fromkeys(map(parse_scheme, scheme)))
    given_text = read_text(text) if text else None
    resumed_run(out, {"seed": seed, "new_tokens": new_tokens, "ignore_eos": ignore_eos})
    cache = cache or default_cache()
    with progress_bar(quiet) as progress:
        model = load_base(
            base,
            progress,
            dtype=dtype,
            device=device,
            max_memory=max_memory,
            cache=cache,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        components = find_components(model.network, include=include or (), exclude=exclude or ())
        for one in schemes:
            one.check(components)
        ready = ready_schemes(
            model, components, schemes, source=calibration, cache=cache, progress=progress
        )
        prompt_set = read_prompts(
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
        )
        settings: dict[str, Any] = {
            "n_draws": draws,
            "new_tokens": new_tokens,
            "ignore_eos": ignore_eos,
            "by_vllm": generate_with is Writer.vllm,
            "text": given_text,
            "seed": seed,
            "batch_size": batch_size,
            "compiled": compiled,
            "cache": cache,
            "progress": progress,
            "command": ["dtm", *sys.argv[1:]],
        }
        if asked is None:
            one_method: Literal["probe", "measure"] = (
                "measure" if method is Method.measure else "probe"
            )
            found = sweep_all(
                model, components, ready, prompt_set, out, method=one_method, **settings
            )
        else:
            found = settle(
                model,
                components,
                ready,
                prompt_set,
                out,
                asked,
                Settings(coupling=couple, seed=seed),
                **settings,
            )
    names = {component.name for component in components}
    rows = [row for row in _rows_of(found, method) if row.component in names]
    record = _record(found, rows, list(map(str, schemes)), method)
    _print_sweep(record, format)


def _rows_of(found: "Sensitivities", method: Method) -> "list[Sensitivity]":
    """The rows of a method; of auto those that a search takes: measured ones where they tell."""
    if method is not Method.auto:
        return [row for row in found.rows if row.method == method.value]
    telling = [row for row in found.rows if row.method == "probe"]
    telling += [row for row in found.rows if row.method == "measure"]
    return list(
        {(r.component, r.scheme): r for r in telling if not found.below_rounding(r)}.values()
    )


def _record(
    found: "Sensitivities", rows: "Sequence[Sensitivity]", schemes: Sequence[str], method: Method
) -> dict[str, Any]:
    """What was swept by this command, scheme by scheme."""
    run = found.run
    return {
        "file": str(found.path),
        "base": {name: run["base"][name] for name in ("reference", "fingerprint")},
        "dtype": run["dtype"],
        "device": run["device"],
        "prompts": run["prompts"],
        "new_tokens": run["new_tokens"],
        "method": method.value,
        "n_draws": None if method is Method.measure else run.get("n_draws"),
        "settled": run["settled"] if method is Method.auto else None,
        "rounding_kl": found.rounding_kl,
        "passes": None if method is Method.probe else run.get("passes"),
        "compiled": None if method is Method.probe else run.get("compiled"),
        "schemes": [
            _scheme_json(found, scheme, [row for row in rows if row.scheme == scheme])
            for scheme in schemes
        ],
    }


def _scheme_json(
    found: "Sensitivities", scheme: str, rows: "Sequence[Sensitivity]"
) -> dict[str, Any]:
    base_bytes = {component.name: component.base_size_bytes for component in found.components}
    worst = sorted(rows, key=lambda row: row.kl, reverse=True)[:N_WORST]
    return {
        "scheme": scheme,
        "n_components": len(rows),
        "size_bytes": sum(row.size_bytes for row in rows),
        "base_size_bytes": sum(base_bytes[row.component] for row in rows),
        "kl_sum": sum(row.kl for row in rows),
        "n_below_rounding": sum(map(found.below_rounding, rows)),
        "seconds": sum(row.seconds for row in rows),
        "worst": [
            {
                "component": row.component,
                "kl": row.kl,
                "kl_se": row.kl_se,
                "below_rounding": found.below_rounding(row),
            }
            for row in worst
        ],
    }


def _print_sweep(record: dict[str, Any], format: Format) -> None:
    from divergent_tokens.report.sweep import sweep_markdown, sweep_text

    print_record(
        record,
        format,
        text=lambda _width: sweep_text(record),
        markdown=lambda: sweep_markdown(record),
    )
