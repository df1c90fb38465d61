"""Do the intervals cover? Real prompts are taken for the population and resampled.

Rows of at least 1,000 prompts for a mild, a middle and a strong scheme; samples of 50 and 200 are
drawn from them with replacement, and we count how often the interval holds the population's value.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, write_result

from divergent_tokens import load_model, read_prompts, scheme_candidates
from divergent_tokens.measure.batches import first_batch_size
from divergent_tokens.measure.comparison import divergence_of
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.intervals import Estimate, estimate_ratio
from divergent_tokens.measure.scores import score
from divergent_tokens.measure.states import base_states
from divergent_tokens.measure.summaries import estimate_fdt
from divergent_tokens.store import default_cache

COLUMNS = ("fdt", "n_divergent", "n_tokens", "nats", "kl", "acceptance", "longest_agreement")
Rows = dict[str, np.ndarray[Any, Any]]


def main() -> None:
    arguments = parse()
    kept = json.loads(arguments.rows.read_text()) if arguments.rows else measure(arguments)
    settings, rows = kept["settings"], kept["rows"]
    results = []
    for strength, columns in rows.items():
        population = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
        for n in (50, 200):
            for metric, estimate in ESTIMATORS.items():
                share, width = coverage(
                    population, estimate, n=n, trials=arguments.trials, seed=arguments.seed
                )
                results.append(
                    {
                        "strength": strength,
                        "metric": metric,
                        "n": n,
                        "coverage": share,
                        "mean_width": width,
                        "value": estimate(population, 0).value,
                    }
                )
                print(f"{strength:8} {metric:5} n={n:<4} coverage {share:6.1%}", flush=True)
    sizes = {strength: len(columns["fdt"]) for strength, columns in rows.items()}
    result = {
        "trials": arguments.trials,
        "prompts": sizes,
        "rows": settings,
        "results": results,
    }
    print(
        f"on {machine()['device']}; written to", write_result(arguments.name, result, arguments.out)
    )


ESTIMATORS: dict[str, Callable[[Rows, int], Estimate]] = {
    "fdt": lambda r, seed: estimate_fdt(r["fdt"], r["n_tokens"], r["longest_agreement"], seed=seed),
    "sdt": lambda r, seed: estimate_ratio(r["n_divergent"], r["n_tokens"], unit="share", seed=seed),
    "dppl": lambda r, seed: estimate_ratio(r["nats"], r["n_tokens"], unit="perplexity", seed=seed),
    "kl": lambda r, seed: estimate_ratio(r["kl"], r["n_tokens"], unit="nats", seed=seed),
}


def coverage(
    population: Rows, estimate: Callable[[Rows, int], Estimate], *, n: int, trials: int, seed: int
) -> tuple[float, float]:
    """Share of samples whose interval holds the population's value; the intervals' mean width."""
    truth = estimate(population, 0).value
    assert truth is not None
    rng = np.random.default_rng(seed)
    held, widths = 0, []
    for trial in range(trials):
        chosen = rng.integers(0, len(population["fdt"]), n)
        found = estimate({name: values[chosen] for name, values in population.items()}, trial)
        low = -np.inf if found.low is None else found.low
        high = np.inf if found.high is None else found.high
        held += low <= truth <= high
        widths.append(high - low)
    return held / trials, float(np.mean(widths))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each scheme's sums and counts, prompt by prompt, on the base's completions."""
    base = load_model(arguments.base, cache=arguments.cache)
    prompts = read_prompts(
        arguments.prompts,
        base,
        n_prompts=arguments.n_prompts,
        prefix=arguments.prefix,
        cache=arguments.cache,
    )
    completions = complete(
        base, prompts, new_tokens=arguments.new_tokens, cache=arguments.cache, progress=told
    )
    head = find_head(base.network)
    size = first_batch_size(base.device)
    states = base_states(base, head, completions, batch_size=size, cache=arguments.cache)
    candidates = scheme_candidates(base, *arguments.schemes.values())
    rows = {}
    for strength, scheme in arguments.schemes.items():
        with candidates[scheme] as model:
            scores = score(model, head, completions, head, states, name=scheme, progress=told)
        found = divergence_of(scores, completions)
        columns = {name: getattr(found, name) for name in COLUMNS}
        rows[strength] = {name: values.tolist() for name, values in columns.items()}
    settings = {
        "base": arguments.base,
        "source": arguments.prompts,
        "prefix": arguments.prefix,
        "new_tokens": arguments.new_tokens,
        "schemes": arguments.schemes,
        "measured_on": machine(),
    }
    kept = {"settings": settings, "rows": rows}
    if arguments.write_rows:
        arguments.write_rows.write_text(json.dumps(kept))
    return kept


def told(stage: str, done: int, total: int, unit: str) -> None:
    print(f"\r{stage}: {done} of {total} {unit}", end="\n" if done == total else "", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", default="demo:smollm2")
    parser.add_argument("--prompts", default="self")
    parser.add_argument(
        "--schemes",
        type=lambda text: dict(part.split("=") for part in text.split(",")),
        default={"mild": "int8", "middle": "int6", "strong": "int4:g64"},
        help="mild=int8,middle=int6,...",
    )
    parser.add_argument("--n-prompts", type=int, default=1024)
    parser.add_argument("--prefix", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rows", type=Path, help="rows that --write-rows wrote, instead of measuring"
    )
    parser.add_argument("--write-rows", type=Path)
    parser.add_argument("--name", default="coverage")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache())
    return parser.parse_args()


if __name__ == "__main__":
    main()
