"""What the benchmarks of chosen plans share: plans measured on prompts that chose nothing."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.measure.prompts import PromptSet, read_prompts
from divergent_tokens.models import Model, load_model
from divergent_tokens.search.held_out import measure_plans
from divergent_tokens.sensitivities import Sensitivities
from divergent_tokens.store import default_cache


def held_out_arguments(parser: argparse.ArgumentParser) -> None:
    """The sweep, and the prompts to report on: from its source, after its own."""
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--n-prompts", type=int, help="held out; as many as the sweep's if absent")
    parser.add_argument("--prompts", help="their source, if the sweep's has moved")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache())


def held_out(arguments: argparse.Namespace, sweep: Sensitivities) -> tuple[Model, PromptSet]:
    """The sweep's base, and prompts that it did not use."""
    run = sweep.run
    base = load_model(run["base"]["reference"], dtype=run["dtype"], cache=arguments.cache)
    prompts = read_prompts(
        arguments.prompts or run["prompts"]["source"],
        base,
        n_prompts=arguments.n_prompts or len(sweep.prompts),
        prefix=run["prompts"]["prefix"],
        skip=run["prompts"]["skipped"] + len(sweep.prompts),
        cache=arguments.cache,
    )
    return base, prompts


def estimates(metrics: Mapping[str, Any], *names: str) -> dict[str, dict[str, float]]:
    """Values and their intervals of some metrics, by name."""
    return {name: {k: metrics[name][k] for k in ("value", "low", "high")} for name in names}


def measure(
    arguments: argparse.Namespace, sweep: Sensitivities, plans: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """KL, SDT, FDT of plans (component -> scheme), by name, on held-out prompts."""
    run = sweep.run
    base, prompts = held_out(arguments, sweep)
    found = measure_plans(
        base,
        {name: PlanFile(run["base"], schemes, 0, 0) for name, schemes in plans.items()},
        prompts,
        chosen_on={prompt.digest for prompt in sweep.prompts},
        new_tokens=run["new_tokens"],
        ignore_eos=run["ignore_eos"],
        batch_size=arguments.batch_size,
        cache=arguments.cache,
        progress=lambda stage, done, total, _: done == total and print(stage, flush=True),
    )
    assert not any(step["overlap"] for step in found.values())
    return {name: estimates(step["metrics"], "kl", "sdt", "fdt") for name, step in found.items()}
