"""How time grows: probe and measured rows against prompts, tokens, schemes, layers and components.

A small random Llama; one quantity grows by doubling while the others stay. What is shown is the
time over what a straight line through the first size would give: above 1 it grows faster. Of a
measured sweep it is the time of one row in the middle layer.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from machine import machine, seconds_of, write_result
from random_completions import random_completions
from transformers import LlamaConfig, LlamaForCausalLM

from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.measure.completions import Completions
from divergent_tokens.models import Model
from divergent_tokens.probe import probe
from divergent_tokens.sweep import sweep

FIRST = {"prompts": 16, "tokens": 64, "schemes": 1, "layers": 4, "components": 7}
N_SIZES = 4
SCHEMES = [f"int{bits}{rest}" for bits in (8, 6, 4, 3) for rest in ("", ":g64")]
VOCABULARY = 1024


def main() -> None:
    arguments = parse()
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for way, seconds in {"probe": probed, "measure": measured}.items():
        found[way] = {}
        for axis, first in FIRST.items():
            if way == "measure" and axis in ("schemes", "components"):
                continue  # each row is a row: there is nothing to share
            sizes = [first * 2**i for i in range(N_SIZES)]
            times = [
                seconds({**FIRST, "components": 0} | {axis: size}, arguments) for size in sizes
            ]
            over = [t / times[0] / (size / first) for t, size in zip(times, sizes, strict=True)]
            found[way][axis] = {"sizes": sizes, "seconds": times, "over_linear": over}
            shown = "  ".join(f"{size}: {t:.3f} s" for size, t in zip(sizes, times, strict=True))
            print(f"{way:8} {axis:11} {shown}   {over[-1]:.2f} times a straight line", flush=True)
    print(machine()["device"], "written to", write_result("growth", found, arguments.out))


def network(n_layers: int, device: str) -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
    )
    made = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
    return Model(made, None, str(n_layers), str(n_layers))  # type: ignore[arg-type]


def texts(sizes: Mapping[str, int]) -> Completions:
    """Half of the tokens are a prompt, half its completion."""
    half = sizes["tokens"] // 2
    return random_completions(sizes["prompts"], vocabulary=VOCABULARY, prefix=half, new_tokens=half)


def probed(sizes: Mapping[str, int], arguments: argparse.Namespace) -> float:
    """Seconds of a probe. `components`: so many of the network's; 0 for all."""
    layers = 8 if sizes["components"] else sizes["layers"]
    model = network(layers, arguments.device)
    components = find_components(model.network)[: sizes["components"] or None]
    schemes = [parse_scheme(text) for text in SCHEMES[: sizes["schemes"]]]
    completions = texts(sizes)
    run = partial(probe, model, components, schemes, completions, batch_size=16)
    return statistics.median([seconds_of(run) for _ in range(arguments.repeat + 1)][1:])


def measured(sizes: Mapping[str, int], arguments: argparse.Namespace) -> float:
    """Seconds of a measured row of the middle layer."""
    model = network(sizes["layers"], arguments.device)
    middle = sizes["layers"] // 2
    components = find_components(model.network, include=[f"*.layers.{middle}.*"])
    completions = texts(sizes)
    with tempfile.TemporaryDirectory() as place:
        rows = sweep(
            model,
            components,
            [parse_scheme("int8")],
            completions.prompts,
            Path(place) / "sweep.db",
            method="measure",
            new_tokens=sizes["tokens"] // 2,
            ignore_eos=True,
            batch_size=16,
        ).rows
    return statistics.median(row.seconds for row in rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
