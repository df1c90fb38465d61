"""`dtm prune`: zeros where they harm least, in rounds, with training in between."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from divergent_tokens.cli.loading import load_base
from divergent_tokens.cli.options import (
    AllowPickle,
    Base,
    BatchSize,
    Cache,
    Chat,
    Format,
    NewTokens,
    NPrompts,
    Prefix,
    Prompts,
    Quiet,
    Seed,
    SkipPrompts,
    TextField,
    TrustRemoteCode,
    given,
)
from divergent_tokens.cli.output import print_record, progress_bar
from divergent_tokens.cli.signals import on_signals, remarks, tidy_up
from divergent_tokens.errors import DivergentTokensError


class Criterion(StrEnum):
    """What says how much a weight matters."""

    fisher = "fisher"
    wanda = "wanda"
    magnitude = "magnitude"
    sparsegpt = "sparsegpt"


class Allocate(StrEnum):
    """What says how sparse each matrix becomes."""

    threshold = "global"
    kl = "kl"
    fdt = "fdt"
    fdt_threshold = "fdt-threshold"
    uniform = "uniform"
    uniform_spared = "uniform-spared"


class Granularity(StrEnum):
    """What gets a sparsity of its own."""

    component = "component"
    expert = "expert"
    head = "head"
    rows = "rows"


class Loss(StrEnum):
    """What training makes small."""

    distill = "distill"
    ce = "ce"
    both = "both"


def prune(
    context: typer.Context,
    base: Base,
    out: Annotated[
        Path, typer.Option(help="Write the pruned model into this folder.", show_default=False)
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(help="The share of the weights that is zero at the end.", show_default=False),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="N:M", help="Instead: N of M neighbours stay, 2:4 or 4:8."),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cuts, each a little deeper; left out: 10, or 1 for --steps 0 or --pattern.",
            show_default=False,
        ),
    ] = None,
    criterion: Annotated[
        Criterion, typer.Option(help="What says how much a weight matters.")
    ] = Criterion.fisher,
    allocate: Annotated[
        Allocate | None,
        typer.Option(
            help="How sparse each matrix becomes: by one threshold for all (fisher only), by the "
            "least harm in KL or FDT, by one threshold of FDT as in the paper, or alike. Left out: "
            "global for fisher, else kl, and kl with --granularity head or rows.",
            show_default=False,
        ),
    ] = None,
    granularity: Annotated[
        Granularity,
        typer.Option(
            help="What gets a sparsity of its own: a matrix (an expert's matrices are such), an "
            "attention head, or 64 rows of a matrix."
        ),
    ] = Granularity.component,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Move what stays of a matrix, so that its outputs change least."
        ),
    ] = False,
    correct: Annotated[
        int,
        typer.Option(
            help="Times that the cut of --allocate global is made again by what it costs each "
            "matrix, 0 to 20; worth its time (take 3) with little or no training.",
        ),
    ] = 0,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="plan.json",
            help="Quantize too: measure everything under this plan for the base.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=0, help="Training steps after each cut; 0: none.")
    ] = 200,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text to train on, and to see what matters: self, builtin, a file, hf:DATASET; "
            "given more than once, as much of each, as far as it goes.  [default: self]",
            show_default=False,
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a training sequence.")] = 256,
    n_sequences: Annotated[int, typer.Option(min=8, help="Training sequences at most.")] = 1024,
    train_batch: Annotated[int, typer.Option(min=1, help="Sequences of a training step.")] = 16,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences at once, where memory is short."),
    ] = None,
    lr: Annotated[float, typer.Option(min=0, help="The highest learning rate.")] = 3e-4,
    loss: Annotated[
        Loss, typer.Option(help="Distillation from the base, cross-entropy, or both.")
    ] = Loss.distill,
    lift: Annotated[
        bool,
        typer.Option(
            "--lift", help="Half of the steps before each cut with the zeros let go (AC/DC)."
        ),
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Make activations again in training.")
    ] = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Train compiled layers; if left out, where it pays: on one GPU, for long work.",
        ),
    ] = None,
    n_saliency: Annotated[
        int, typer.Option(min=1, help="Training sequences that saliencies and repairs are seen on.")
    ] = 64,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", metavar="PATTERN", help="Only these (globs, or re:...)."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Not these.")
    ] = None,
    prompts: Prompts = "builtin",
    n_prompts: NPrompts = 64,
    skip_prompts: SkipPrompts = 0,
    prefix: Prefix = 64,
    new_tokens: NewTokens = 128,
    chat: Chat = False,
    text_field: TextField = "text",
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Report perplexity on this.")
    ] = None,
    batch_size: BatchSize = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="auto (all GPUs train), cpu, cuda or cuda:1 (one GPU alone)."
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights in training.")] = "float32",
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a pruned model that is there.")
    ] = False,
    format: Annotated[
        Format, typer.Option("--format", help="How the result is printed.")
    ] = Format.text,
    cache: Cache = None,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Set weights to zero where that harms least, in rounds, and train what is left.

    Writes dense safetensors with exact zeros. Zeros alone make nothing faster. Stopped at any
    moment and run again, it goes on after the last finished round.
    """
    if (sparsity is None) == (pattern is None):
        found = "neither" if sparsity is None else "both"
        raise DivergentTokensError(
            f"expected either a --sparsity such as 0.75 or a --pattern such as 2:4, found {found}"
        )
    _check_acts(context)

    from divergent_tokens.compress.components import find_components
    from divergent_tokens.compress.plan_file import read_plan
    from divergent_tokens.compress.prune import parse_pattern
    from divergent_tokens.measure.perplexity import read_text
    from divergent_tokens.measure.prompts import read_prompts
    from divergent_tokens.measure.sequences import read_sequences
    from divergent_tokens.pruning.prune import check_folder
    from divergent_tokens.pruning.prune import prune as prune_in_rounds
    from divergent_tokens.pruning.settings import Settings
    from divergent_tokens.recover import Training
    from divergent_tokens.replicas import training_devices
    from divergent_tokens.store import default_cache

    on_signals(tidy_up)
    check_folder(out.resolve(), overwrite=overwrite)
    n_of_m = parse_pattern(pattern) if pattern else None
    finer = granularity in (Granularity.head, Granularity.rows) and not n_of_m
    by_default = Allocate.threshold if criterion is Criterion.fisher and not finer else Allocate.kl
    settings = Settings(
        sparsity=1 - n_of_m[0] / n_of_m[1] if n_of_m else float(sparsity or 0),
        rounds=rounds or (10 if steps and not n_of_m else 1),
        criterion=criterion.value,
        allocate=(allocate or by_default).value,
        pattern=n_of_m,
        n_saliency=n_saliency,
        granularity=granularity.value,
        repair=repair,
        corrections=correct,
        training=Training(
            steps=steps,
            batch_size=train_batch,
            micro_batch=micro_batch or train_batch,
            learning_rate=lr,
            loss=loss.value,
            lifted=lift,
            checkpointing=checkpointing,
        ),
        new_tokens=new_tokens,
        seed=seed,
    )
    plan_file = read_plan(plan) if plan else None
    given_text = read_text(text) if text else None
    cache = cache or default_cache()
    with _saying_what_is_kept(out, settings.rounds), progress_bar(quiet) as progress:
        model = load_base(
            base,
            progress,
            dtype=dtype,
            device=device,
            cache=cache,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        components = find_components(model.network, include=include or (), exclude=exclude or ())
        sequences = read_sequences(
            data or ["self"],
            model,
            length=length,
            n_sequences=n_sequences,
            text_field=text_field,
            seed=seed,
            cache=cache,
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
        record = prune_in_rounds(
            model,
            components,
            sequences,
            prompt_set,
            out,
            settings,
            plan=plan_file,
            text=given_text,
            devices=training_devices(model.network) if device == "auto" else (),
            batch_size=batch_size,
            compiled=compiled,
            overwrite=overwrite,
            cache=cache,
            progress=progress,
            command=["dtm", *sys.argv[1:]],
        )
    _print({**record, "folder": str(out)}, format)


@contextmanager
def _saying_what_is_kept(out: Path, rounds: int) -> Iterator[None]:
    """After an interrupt: which rounds are there to go on with."""
    from divergent_tokens.pruning.kept_rounds import finished_rounds, rounds_folder

    try:
        yield
    except BaseException:
        n, folder = finished_rounds(out.resolve()), rounds_folder(out.resolve())
        if n:
            remarks.append(
                f"{n} of {rounds} rounds are kept in {folder}: run the same command to go on"
            )
        raise


def _check_acts(context: typer.Context) -> None:
    """DivergentTokensError for options that could not do anything here."""
    asked = context.params
    training = given(context, "lr", "loss", "train_batch", "micro_batch")
    training += [f"--{name}" for name in ("lift", "checkpointing") if asked[name]]
    training += ["--compile"] if asked["compiled"] else []
    if asked["steps"] == 0 and training:
        raise DivergentTokensError(
            f"--steps 0 trains nothing, and {', '.join(training)} would not act; leave out what is "
            "of training, or give --steps"
        )
    pattern, allocate = asked["pattern"], asked["allocate"]
    if asked["lift"] and (asked["rounds"] == 1 or asked["steps"] == 1 or pattern):
        raise DivergentTokensError(
            "--lift lets zeros go for half of the steps before each cut but the first; give two "
            "--rounds or more (a pattern is cut at once) and two --steps, or leave it out"
        )
    if pattern and allocate not in (None, Allocate.uniform):
        raise DivergentTokensError(
            f"--pattern {pattern} takes as much of every row, so that --allocate {allocate} would "
            "not act; leave it out"
        )


def _print(record: dict[str, Any], format: Format) -> None:
    from divergent_tokens.report.pruning import pruning_markdown, pruning_text

    print_record(
        record,
        format,
        text=lambda _width: pruning_text(record),
        markdown=lambda: pruning_markdown(record),
    )
