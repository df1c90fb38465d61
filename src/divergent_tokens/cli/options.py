"""Options that several commands share."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.errors import DivergentTokensError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of a size such as 20GiB, 500MB, or 24gb."""
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) == 0:
        raise DivergentTokensError(
            f"{text!r} is no size of memory; expected one such as 20GiB or 500MB"
        )
    unit = 1024 if found[3] else 1000
    return int(float(found[1]) * unit ** " kmgt".index(found[2].lower() or " "))


def given(context: typer.Context, *names: str) -> list[str]:
    """Of these parameters the options that stand on the command line, as they are written."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        options[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]


class Format(StrEnum):
    """How the result is printed."""

    text = "text"
    markdown = "markdown"
    json = "json"


Base = Annotated[
    str,
    typer.Argument(
        metavar="BASE", help="Hub id, folder, .gguf file, or demo:smollm2.", show_default=False
    ),
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
NPrompts = Annotated[int, typer.Option("--n-prompts", metavar="N", min=1, help="How many prompts.")]
SkipPrompts = Annotated[
    int,
    typer.Option(
        "--skip-prompts", metavar="N", min=0, help="Leave out the first so many that would fit."
    ),
]
Prefix = Annotated[int, typer.Option("--prefix", metavar="N", min=1, help="Tokens of each prompt.")]
NewTokens = Annotated[
    int, typer.Option("--new-tokens", metavar="N", min=1, help="Most tokens of each completion.")
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Each document is a user's turn in the chat template.")
]


class Writer(StrEnum):
    """Who writes the base's completions."""

    transformers = "transformers"
    vllm = "vllm"


GenerateWith = Annotated[
    Writer,
    typer.Option(
        "--generate-with",
        help="Who writes the base's completions; vllm must be installed, and loads the base again.",
    ),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end of sequence.")]
TextField = Annotated[
    str, typer.Option("--text-field", help="The field of a row that holds its text.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size", metavar="N", min=1, help="Sequences at once; found by trying if left out."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=parse_size,
        help="Weights on each device at most, as in 20GiB; other layers wait in CPU memory or on "
        "disk until it is their turn. Left out: as fits.",
    ),
]
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
        metavar="N",
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
Share = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="SHARE", help="Bytes under the plan, of the base's bytes: 60%."
    ),
]
Bits = Annotated[
    float | None,
    typer.Option("--bits", metavar="N", min=0, help="Bits a weight under the plan, on average."),
]
Count = Annotated[
    int | None,
    typer.Option("--count", metavar="N", min=1, help="How many components are converted."),
]
Couple = Annotated[
    Coupling | None,
    typer.Option("--couple", help="Keep to what it loads, components bound together."),
]
CalibrationSource = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="SOURCE",
        help="Text that gptq:, wanda:, fisher: and sparsegpt: are made from: builtin, a file, or "
        "hf:DATASET.",
    ),
]
TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="TASK,...",
        help="Run these tasks of lm-eval too: names, groups, wildcards, or .yaml files.",
    ),
]
TaskPath = Annotated[
    list[Path] | None,
    typer.Option("--task-path", metavar="DIR", help="Where task definitions of your own lie."),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot", metavar="N", help="Examples in each task's prompt; left out: its own."
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(
        "--limit", metavar="N", help="So many documents of each task, or a share below 1."
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
