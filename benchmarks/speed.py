"""What a further candidate costs: our one pass, beside generating with it and comparing texts.

Ratios within one run, on one machine; every way is timed `--repeat` times and the median kept.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine, synchronize, write_result

from divergent_tokens import load_model, read_prompts, scheme_candidates
from divergent_tokens.measure.batches import first_batch_size
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.generation import generate
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.scores import score
from divergent_tokens.measure.states import base_states
from divergent_tokens.store import default_cache


def main() -> None:
    arguments = parse()
    base = load_model(arguments.base, cache=arguments.cache, dtype=arguments.dtype)
    prompts = read_prompts(
        arguments.prompts,
        base,
        n_prompts=arguments.n_prompts,
        prefix=arguments.prefix,
        cache=arguments.cache,
    )
    completions = complete(base, prompts, new_tokens=arguments.new_tokens, ignore_eos=True)
    head = find_head(base.network)
    states = base_states(base, head, completions, batch_size=first_batch_size(base.device))
    ids = torch.tensor([prompt.ids for prompt in prompts.prompts], device=base.device)

    def generate_rows(n_at_once: int) -> None:
        for rows in ids.split(n_at_once):
            generate(base.network, rows, new_tokens=arguments.new_tokens)

    with scheme_candidates(base, "int8")["int8"] as candidate:
        ways: dict[str, Callable[[], object]] = {
            "score": lambda: score(candidate, head, completions, head, states),
            "generate, one batch": lambda: generate_rows(len(ids)),
        }
        if not arguments.skip_single:
            ways["generate, one by one"] = lambda: generate_rows(1)
        seconds = {name: timed(way, arguments.repeat) for name, way in ways.items()}
    report(arguments, seconds, len(prompts), states.batch_size)


def timed(way: Callable[[], object], repeat: int) -> float:
    """Median seconds; the first of several runs warms up and does not count."""
    taken = []
    for _ in range(repeat + (repeat > 1)):
        synchronize()
        start = time.perf_counter()
        way()
        synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[repeat > 1 :])


def report(
    arguments: argparse.Namespace, seconds: dict[str, float], n_prompts: int, batch_size: int
) -> None:
    print(
        f"{arguments.base} on {machine()['device']}: {n_prompts} prompts of "
        f"{arguments.prefix} + {arguments.new_tokens} tokens, batches of {batch_size}"
    )
    for name, value in seconds.items():
        print(
            f"{name:22} {value:8.2f} s   {value / seconds['score']:6.1f} times a further candidate"
        )
    result = {
        "base": arguments.base,
        "n_prompts": n_prompts,
        "prefix": arguments.prefix,
        "new_tokens": arguments.new_tokens,
        "dtype": arguments.dtype,
        "seconds": seconds,
        "ratios": {name: value / seconds["score"] for name, value in seconds.items()},
    }
    print("written to", write_result(arguments.name, result, arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", default="demo:smollm2")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--n-prompts", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--skip-single", action="store_true", help="leave out the slowest way")
    parser.add_argument("--name", default="speed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache())
    return parser.parse_args()


if __name__ == "__main__":
    main()
