"""`dtm complete`: the base's completions for another engine."""

from pathlib import Path
from typing import Annotated

import typer

from divergent_tokens.cli.loading import load_base
from divergent_tokens.cli.options import (
    AllowPickle,
    Base,
    BatchSize,
    Cache,
    Chat,
    Device,
    Dtype,
    GenerateWith,
    IgnoreEos,
    MaxMemory,
    NewTokens,
    NPrompts,
    Prefix,
    Prompts,
    Quiet,
    Seed,
    SkipPrompts,
    TextField,
    TrustRemoteCode,
    Writer,
)
from divergent_tokens.cli.output import (
    check_out,
    print_out,
    progress_bar,
)
from divergent_tokens.cli.signals import on_signals, tidy_up


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
    generate_with: GenerateWith = Writer.transformers,
    text_field: TextField = "text",
    batch_size: BatchSize = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
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
    from divergent_tokens.measure.prompts import read_prompts
    from divergent_tokens.store import default_cache

    on_signals(tidy_up)
    check_out(out, base, prompts)
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
        written = completions.complete(
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
            by_vllm=generate_with is Writer.vllm,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
        )
    write_completions(out, written)
    print_out(
        f"{len(written.prompts)} prompts, {int(written.mask.sum())} completion tokens: {out}\n"
    )
