"""`dtm search`: a plan from a sweep, what may be expected of it, and what it does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergent_tokens.cli.loading import load_base
from divergent_tokens.cli.options import (
    AllowPickle,
    BatchSize,
    Bits,
    Cache,
    CalibrationSource,
    Chat,
    Count,
    Couple,
    Device,
    Format,
    MaxMemory,
    Quiet,
    Share,
    SkipPrompts,
    TextField,
    TrustRemoteCode,
)
from divergent_tokens.cli.output import (
    check_out,
    print_record,
    progress_bar,
    write_json,
)
from divergent_tokens.cli.signals import on_signals, tidy_up
from divergent_tokens.errors import DivergentTokensError, RecordError
from divergent_tokens.search.budgets import Budget, one_budget
from divergent_tokens.search.settings import Method, RankBy, Settings

if TYPE_CHECKING:
    from divergent_tokens.compress.plan_file import PlanFile
    from divergent_tokens.measure.flips import FlipLaw, Reading
    from divergent_tokens.search.curve import Point
    from divergent_tokens.search.search import Search
    from divergent_tokens.sensitivities import Sensitivities


def search(
    sweep: Annotated[
        Path,
        typer.Argument(
            metavar="SWEEP", help="The file that `dtm sweep` wrote.", show_default=False
        ),
    ],
    budget: Share = None,
    bits: Bits = None,
    count: Count = None,
    out: Annotated[Path | None, typer.Option(help="Write plan.json here.")] = None,
    rank_by: Annotated[
        list[RankBy] | None,
        typer.Option(
            metavar="ORDER",
            help="What counts as harm: kl (if left out), fdt, sdt, dppl, ppl, weight-error. "
            "Several are for --curve.",
        ),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME", help="Choose among these of the sweep's schemes only."),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="Which KLs of the sweep count; auto: measured ones, but for those under three "
            "times the rounding floor."
        ),
    ] = Method.auto,
    couple: Couple = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Measure the plan on these prompts, held out from the sweep's."
        ),
    ] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="Measure plans of a quarter, half, three quarters and all of the components too, "
            "in every order asked for.",
        ),
    ] = False,
    counts: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Other counts for --curve, such as 42,84,126."),
    ] = None,
    curve_out: Annotated[
        Path | None, typer.Option(help="Write the curve here; else into the plan's trail.")
    ] = None,
    fit_on: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PLAN", help="Fit the flip law on what was measured of these plans, too."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="The base to measure on, if it was moved since."),
    ] = None,
    n_prompts: Annotated[
        int, typer.Option("--n-prompts", metavar="N", min=1, help="How many prompts.")
    ] = 128,
    skip_prompts: SkipPrompts = 0,
    prefix: Annotated[
        int | None,
        typer.Option(
            "--prefix", metavar="N", min=1, help="Tokens of each prompt; as the sweep had."
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens",
            metavar="N",
            min=1,
            help="Most tokens of a completion; as the sweep had.",
        ),
    ] = None,
    chat: Chat = False,
    text_field: TextField = "text",
    level: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    format: Annotated[
        Format, typer.Option("--format", help="How the result is printed.")
    ] = Format.text,
    batch_size: BatchSize = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16, float16; as the sweep had.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="N", min=0, max=2**32 - 1, help="For folds, resamples, drawn prompts."
        ),
    ] = 0,
    calibration: CalibrationSource = "builtin",
    cache: Cache = None,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Choose a scheme for each component that meets a budget with the least harm."""
    asked = one_budget(budget, bits, count)
    orders = tuple(dict.fromkeys(rank_by or [RankBy.kl]))
    if not 0 < level < 1:
        raise DivergentTokensError(
            f"--level is {level}; expected a share between 0 and 1, such as 0.95"
        )
    wanted = _counts(counts) if counts else ()
    _check_sense(asked, out, orders, prompts, curve=curve, counts=wanted, curve_out=curve_out)
    for target in filter(None, (out, curve_out)):
        check_out(target, sweep, prompts, *(fit_on or ()))

    from divergent_tokens.measure.flips import fit
    from divergent_tokens.search.curve import curve as curve_of
    from divergent_tokens.search.curve import quarters
    from divergent_tokens.search.forecasts import measured_readings
    from divergent_tokens.search.search import search as search_for
    from divergent_tokens.sensitivities import read_sensitivities

    on_signals(tidy_up)
    sensitivities = read_sensitivities(sweep)
    settings = Settings(orders[0], tuple(scheme or ()), method, couple, seed, level)
    readings = _readings(fit_on or (), sensitivities)
    found = search_for(sensitivities, asked, settings, readings=readings) if asked else None
    law = fit([*measured_readings(sensitivities), *readings])
    points: tuple[Point, ...] = ()
    if curve:
        wanted = wanted or quarters(len(sensitivities.components))
        points = curve_of(sensitivities, orders, wanted, settings, law)
    steps: Mapping[str, Any] = {}
    if prompts:
        plans = {} if found is None else {"plan": found.plan_file()}
        plans |= {point.name: point.plan_file(sensitivities.run["base"]) for point in points}
        steps = _measured(
            sensitivities,
            plans,
            prompts,
            base=base,
            n_prompts=n_prompts,
            skip=skip_prompts,
            prefix=prefix,
            new_tokens=new_tokens,
            chat=chat,
            text_field=text_field,
            level=level,
            seed=seed,
            batch_size=batch_size,
            device=device,
            max_memory=max_memory,
            dtype=dtype,
            calibration=calibration,
            cache=cache,
            quiet=quiet,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
    record = _record(sensitivities, settings, found, law, points, steps, readings)
    _write(out, curve_out, found, record)
    _print_search(record, format)


# --- what was asked for ---


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise DivergentTokensError(
            f"--counts is {text!r}; expected numbers of components, as in 42,84,126"
        )
    return counts


def _check_sense(
    asked: Budget | None,
    out: Path | None,
    orders: Sequence[RankBy],
    prompts: str | None,
    *,
    curve: bool,
    counts: Sequence[int],
    curve_out: Path | None,
) -> None:
    """Raise for options that do nothing without another one."""
    if asked is None and (out or not curve):
        raise DivergentTokensError(
            "there is no budget; give --budget 60%, --bits 5.5 or --count 84"
        )
    if len(orders) > 1 and not curve:
        raise DivergentTokensError(
            f"one order makes a plan, and {len(orders)} are given to --rank-by; give one, or draw "
            "a curve of them with --curve"
        )
    if curve and not prompts:
        raise DivergentTokensError(
            "--curve measures on prompts that the sweep did not use, and there are none; name "
            "them with --prompts"
        )
    if (counts or curve_out) and not curve:
        raise DivergentTokensError("--counts and --curve-out belong to --curve; give that too")


def _readings(paths: Sequence[Path], sensitivities: "Sensitivities") -> "list[Reading]":
    """The flip law's constants from plans that were measured on this base."""
    if not paths:
        return []
    from divergent_tokens.search.held_out import readings_of

    own = sensitivities.run["base"]["fingerprint"]
    return [reading for path in paths for reading in readings_of(path, fingerprint=own)]


# --- what is measured ---


def _measured(
    sensitivities: "Sensitivities",
    plans: "Mapping[str, PlanFile]",
    source: str,
    *,
    base: str | None,
    n_prompts: int,
    skip: int,
    prefix: int | None,
    new_tokens: int | None,
    chat: bool,
    text_field: str,
    level: float,
    seed: int,
    batch_size: int | None,
    device: str,
    max_memory: int | None,
    dtype: str | None,
    calibration: str,
    cache: Path | None,
    quiet: bool,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> Mapping[str, Any]:
    """Each plan's measurement as a step of its trail; what is not given is as the sweep had it."""
    from divergent_tokens.measure.prompts import read_prompts
    from divergent_tokens.search.held_out import measure_plans
    from divergent_tokens.store import default_cache

    run, cache = sensitivities.run, cache or default_cache()
    reference = base or run["base"]["reference"]
    with progress_bar(quiet) as progress:
        model = load_base(
            reference,
            progress,
            dtype=dtype or run["dtype"],
            device=device,
            max_memory=max_memory,
            cache=cache,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        if model.fingerprint != run["base"]["fingerprint"]:
            raise RecordError(
                f"{sensitivities.path} is of another base: {run['base']['reference']} with the "
                f"fingerprint {run['base']['fingerprint'][:12]}…, and {reference} has "
                f"{model.fingerprint[:12]}…; name the base that was swept with --base"
            )
        return measure_plans(
            model,
            plans,
            read_prompts(
                source,
                model,
                n_prompts=n_prompts,
                prefix=prefix or run["prompts"]["prefix"] or 64,
                skip=skip,
                chat=chat or run["prompts"]["prefix"] is None,
                text_field=text_field,
                seed=seed,
                cache=cache,
                progress=progress,
            ),
            chosen_on={prompt.digest for prompt in sensitivities.prompts},
            new_tokens=new_tokens or run["new_tokens"],
            ignore_eos=run["ignore_eos"],
            calibration=calibration,
            level=level,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
        )


# --- what is said ---


def _record(
    sensitivities: "Sensitivities",
    settings: Settings,
    found: "Search | None",
    law: "FlipLaw",
    points: "Sequence[Point]",
    steps: Mapping[str, Any],
    readings: "Sequence[Reading]",
) -> dict[str, Any]:
    """All that is printed, in plain values."""
    refit = None
    if steps:
        from divergent_tokens.measure.flips import fit
        from divergent_tokens.search.forecasts import measured_readings
        from divergent_tokens.search.held_out import readings_in

        new = readings_in(list(steps.values()))
        refit = fit([*measured_readings(sensitivities), *readings, *new]).to_json()
    base = sensitivities.run["base"]
    nothing: dict[str, Any] = {
        "base": {name: base[name] for name in ("reference", "fingerprint")},
        "law": law.to_json(),
        "budget": None,
        "gap": None,
        "picks": {},
        "n_below_rounding": 0,
        "around": [],
    }
    return {
        **(nothing if found is None else found.to_json()),
        **settings.to_json(),
        "measured": steps.get("plan"),
        "curve": [point.to_json(steps[point.name]) for point in points] or None,
        "refit": refit,
    }


def _write(
    out: Path | None, curve_out: Path | None, found: "Search | None", record: Mapping[str, Any]
) -> None:
    curve = record["curve"]
    if curve_out:
        kept = {name: record[name] for name in ("base", "law", "refit")}
        write_json(curve_out, {"schema": "divergent-tokens/curve/1", **kept, "points": curve})
    if out and found is not None:
        from divergent_tokens.compress.plan_file import write_plan

        steps = [record["measured"]] if record["measured"] else []
        if curve and not curve_out:
            steps.append({"step": "curve", "points": curve})
        write_plan(out, found.plan_file(*steps))


def _print_search(record: dict[str, Any], format: Format) -> None:
    from divergent_tokens.report.search import search_markdown, search_text

    print_record(
        record,
        format,
        text=lambda _width: search_text(record),
        markdown=lambda: search_markdown(record),
    )
