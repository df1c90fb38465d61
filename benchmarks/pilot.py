"""Does a trial of 32 prompts foretell the intervals of 128, and the number that a width needs?

First on rows kept of 1,024 prompts (benchmarks/coverage.py): many trials drawn from them, each with
128 other prompts. Then on a model: `pilot` with 32 prompts, and a comparison on 128 others.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine, write_result

from divergent_tokens.candidates import scheme_candidates
from divergent_tokens.measure.comparison import Comparison, compare
from divergent_tokens.measure.intervals import Estimate
from divergent_tokens.measure.needed import Sample, estimate_of, needed_prompts, sample_of
from divergent_tokens.measure.prompts import read_prompts
from divergent_tokens.measure.widths import Width, parse_widths
from divergent_tokens.models import load_model
from divergent_tokens.pilot import beginnings, pilot
from divergent_tokens.store import default_cache

N_TRIAL, N_LATER, N_WANTED = 32, 128, 256
METRICS = {"fdt": "fdt", "sdt": "n_divergent", "kl": "kl"}


def main() -> None:
    arguments = parse()
    rows = json.loads(arguments.rows.read_text())
    result: dict[str, Any] = {
        "rows": rows["settings"],
        "n_trial": N_TRIAL,
        "n_later": N_LATER,
        "n_wanted": N_WANTED,
        "trials": arguments.trials,
        "drawn": drawn(rows["rows"], arguments),
    }
    if arguments.base:
        result["model"] = on_a_model(arguments)
    print(machine()["device"], "written to", write_result("pilot", result, arguments.out))


def drawn(rows: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> list[Any]:
    """For each strength and metric what trials foretell, and what other prompts then show."""
    found = []
    for strength, columns in rows.items():
        for metric in METRICS:
            population = sample(columns, metric)
            one = {"strength": strength, "metric": metric} | trials(population, arguments)
            found.append(one)
            print(
                f"{strength:7} {metric:4} foretold / found width {one['ratio']['median']:.2f} "
                f"({one['ratio']['low']:.2f} to {one['ratio']['high']:.2f}); {N_WANTED} needed: "
                f"foretold {one['needed']['median']:.0f} ({one['needed']['low']:.0f} to "
                f"{one['needed']['high']:.0f}), in the range {one['in_range']:.0%}",
                flush=True,
            )
    return found


def trials(population: Sample, arguments: argparse.Namespace) -> dict[str, Any]:
    """Widths foretold over widths found, and numbers foretold for the width that 256 have."""
    rng = np.random.default_rng(arguments.seed)
    n = len(population.sums)
    of_wanted = [
        width_of(estimate_of(part(population, rng.permutation(n)[:N_WANTED]))) for _ in range(50)
    ]
    wanted = Width(population.metric, float(np.mean(of_wanted)), relative=False)
    ratios, numbers, held = [], [], []
    for _ in range(arguments.trials):
        order = rng.permutation(n)
        trial = part(population, order[:N_TRIAL])
        later = part(population, order[N_TRIAL : N_TRIAL + N_LATER])
        foretold = width_of(estimate_of(trial, copies=N_LATER // N_TRIAL))
        ratios.append(foretold / width_of(estimate_of(later)))
        needed = needed_prompts(trial, wanted)
        numbers.append(needed.n_prompts)
        held.append((needed.low or 0) <= N_WANTED <= (needed.high or np.inf))
    return {
        "width": wanted.size,
        "ratio": middle(ratios),
        "needed": middle(numbers),
        "in_range": float(np.mean(held)),
    }


def sample(columns: dict[str, list[float]], metric: str) -> Sample:
    agreement = np.array(columns["longest_agreement"], float) if metric == "fdt" else None
    sums, lengths = (np.array(columns[name], float) for name in (METRICS[metric], "n_tokens"))
    return Sample(metric, sums, lengths, agreement)


def part(population: Sample, chosen: Any) -> Sample:
    agreement = population.longest_agreement
    return Sample(
        population.metric,
        population.sums[chosen],
        population.lengths[chosen],
        None if agreement is None else agreement[chosen],
    )


def width_of(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None, "some prompts differ"
    return estimate.high - estimate.low


def middle(values: list[Any]) -> dict[str, float]:
    """The median, and where 90 of 100 lie."""
    low, median, high = np.quantile(np.array(values, float), [0.05, 0.5, 0.95])
    return {"median": float(median), "low": float(low), "high": float(high)}


def on_a_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The pilot's record, and what a comparison on 128 other prompts says at the same places."""
    base = load_model(arguments.base, dtype="float32", cache=arguments.cache)
    candidates = scheme_candidates(base, *arguments.schemes)
    longest = max(arguments.prefixes)
    trial = read_prompts(arguments.prompts, base, n_prompts=N_TRIAL, prefix=longest)
    widths = parse_widths((), new_tokens=arguments.new_tokens[-1])
    found = pilot(
        base,
        candidates,
        trial,
        widths,
        prefixes=arguments.prefixes,
        new_tokens=arguments.new_tokens,
        cache=arguments.cache,
    )
    others = read_prompts(
        arguments.prompts, base, n_prompts=N_LATER, prefix=arguments.at, skip=N_TRIAL
    )
    later = compare(
        base, candidates, others, new_tokens=max(arguments.new_tokens), cache=arguments.cache
    )
    foretold = compare_trial(base, candidates, trial, arguments)
    checks = []
    for new_tokens in arguments.new_tokens:
        checks += check(foretold, later, new_tokens)
    for one in checks:
        before, after = one["foretold"], one["found"]
        print(
            f"{one['candidate']:9} {one['new_tokens']:4} {one['metric']:4} width foretold "
            f"{before:.4g}, found {after:.4g} ({before / after:.2f})",
            flush=True,
        )
    return {
        "base": arguments.base,
        "pilot": found.to_json(),
        "prefix": arguments.at,
        "checks": checks,
    }


def compare_trial(
    base: Any, candidates: Any, trial: Any, arguments: argparse.Namespace
) -> Comparison:
    """The pilot's own run at the checked prefix once more, for its rows."""
    shorter = beginnings(trial, arguments.at, base)
    return compare(
        base, candidates, shorter, new_tokens=max(arguments.new_tokens), cache=arguments.cache
    )


def check(foretold: Comparison, later: Comparison, new_tokens: int) -> list[dict[str, Any]]:
    found = []
    for before, after in zip(foretold.candidates, later.candidates, strict=True):
        for metric in METRICS:
            trial = sample_of(metric, before.divergence.beginning(new_tokens))
            others = estimate_of(sample_of(metric, after.divergence.beginning(new_tokens)))
            copies = N_LATER // N_TRIAL
            found.append(
                {
                    "candidate": before.name,
                    "new_tokens": new_tokens,
                    "metric": metric,
                    "trial": estimate_of(trial).to_json(),
                    "foretold": width_of(estimate_of(trial, copies=copies)),
                    "found": width_of(others),
                    "later": others.to_json(),
                }
            )
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", help="a model to try too, such as demo:smollm2")
    parser.add_argument(
        "--rows", type=Path, default=Path(__file__).parent / "results" / "coverage-rows.json"
    )
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--schemes", nargs="+", default=["int8", "int4:g64"])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--at", type=int, default=64, help="the prefix that is checked")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache())
    return parser.parse_args()


if __name__ == "__main__":
    main()
