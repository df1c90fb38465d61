"""Which cache is the faster for completions: the dynamic one, or the static, compiled one?"""

import argparse
import time
from pathlib import Path

import torch
from machine import machine, synchronize, write_result

from divergent_tokens import load_model, read_prompts
from divergent_tokens.measure.generation import generate
from divergent_tokens.store import default_cache


def main() -> None:
    arguments = parse()
    base = load_model(arguments.base, cache=arguments.cache, dtype=arguments.dtype)
    prompts = read_prompts(
        "builtin",
        base,
        n_prompts=arguments.n_prompts,
        prefix=arguments.prefix,
        cache=arguments.cache,
    )
    ids = torch.tensor([prompt.ids for prompt in prompts.prompts], device=base.device)
    seconds: dict[str, list[float]] = {}
    written = {}
    for name, static in (("dynamic", False), ("static", True)):
        seconds[name] = []
        for _ in range(3):  # the first compiles and warms up
            synchronize()
            start = time.perf_counter()
            written[name] = generate(
                base.network, ids, new_tokens=arguments.new_tokens, static_cache=static
            )
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    same = [
        a == b
        for x, y in zip(written["dynamic"], written["static"], strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    tokens = ids.shape[0] * arguments.new_tokens
    for name, values in seconds.items():
        print(
            f"{name:8} first {values[0]:7.2f} s, then {min(values[1:]):7.2f} s: "
            f"{tokens / min(values[1:]):,.0f} tokens/s"
        )
    print(f"the two agree on {sum(same) / len(same):.2%} of tokens; on {machine()['device']}")
    result = {
        "base": arguments.base,
        "shape": [*ids.shape, arguments.new_tokens],
        "dtype": arguments.dtype,
    }
    result |= {"seconds": seconds, "agreement": sum(same) / len(same)}
    print("written to", write_result(arguments.name, result, arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", default="demo:smollm2")
    parser.add_argument("--n-prompts", type=int, default=128)
    parser.add_argument("--prefix", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--name", default="generation")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache())
    return parser.parse_args()


if __name__ == "__main__":
    main()
