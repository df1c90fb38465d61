"""What it costs to probe every expert of a mixture on its own, against how many there are.

Random weights, small widths, always the same number of parameters in the experts and in use by each
token: twice as many experts are half as wide, and a token passes twice as many.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from machine import machine, seconds_of, write_result
from random_completions import random_completions
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.models import Model
from divergent_tokens.probe import probe

LAYERS, WIDTH, VOCABULARY = 8, 256, 512
EXPERT_WIDTHS = 16_384
"""Experts times their inner width, in each layer."""
USED_WIDTHS = 256
"""Experts a token passes times their inner width."""
PREFIX, NEW_TOKENS = 32, 64


def main() -> None:
    arguments = parse()
    schemes = [parse_scheme(text) for text in arguments.schemes]
    completions = random_completions(
        arguments.n_prompts, vocabulary=VOCABULARY, prefix=PREFIX, new_tokens=NEW_TOKENS
    )
    dtype = getattr(torch, arguments.dtype)
    models = {n: mixture(n, arguments.device, dtype) for n in arguments.experts}
    experts = {
        n: [c for c in find_components(model.network) if c.expert is not None]
        for n, model in models.items()
    }
    seconds: dict[int, list[float]] = {n: [] for n in models}
    for _ in range(arguments.repeat + 1):  # in turns, so that a slow minute hits all of them
        for n, model in models.items():
            run = partial(probe, model, experts[n], schemes, completions)
            seconds[n].append(seconds_of(partial(run, batch_size=arguments.batch_size)))
    rows = []
    for n, components in experts.items():
        median = statistics.median(seconds[n][1:])
        rows.append(
            {
                "experts": LAYERS * n,
                "components": len(components),
                "parameters": sum(c.n_parameters for c in components),
                "seconds": median,
            }
        )
        print(
            f"{LAYERS * n:6} experts, {len(components):6} matrices, "
            f"{rows[-1]['parameters'] / 1e6:.0f} M weights: {median:6.2f} s, "
            f"{median / rows[0]['seconds']:.2f} times the first"
        )
    result = {
        "model": f"Qwen3-MoE, random, {LAYERS} layers, hidden {WIDTH}, {arguments.dtype}",
        "schemes": arguments.schemes,
        "prompts": f"{arguments.n_prompts} of {PREFIX} + {NEW_TOKENS} random tokens",
        "rows": rows,
    }
    print(machine()["device"], "written to", write_result("experts", result, arguments.out))


@torch.no_grad()
def mixture(n_experts: int, device: str, dtype: torch.dtype) -> Model:
    width = EXPERT_WIDTHS // n_experts
    torch.manual_seed(0)
    network = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=n_experts,
            num_experts_per_tok=max(1, USED_WIDTHS // width),
            moe_intermediate_size=width,
            max_position_embeddings=256,
        )
    )
    network.eval().requires_grad_(False).to(device, dtype)
    return Model(network, None, f"{n_experts} experts", str(n_experts))  # type: ignore[arg-type]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[64, 128, 256], metavar="N")
    parser.add_argument("--schemes", nargs="+", default=["int8", "int4"])
    parser.add_argument("--n-prompts", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
