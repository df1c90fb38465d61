"""GPTQ beside AbsMax at the same bits, and beside rounding to nearest on GPTQ's own grid.

Give `--calibration` a source apart from `--prompts`: on texts that it was made from GPTQ looks too
good. All components at once; then a plan that may take either for each of them. Runs where
llm-compressor is installed (`make test-llmcompressor` makes such an environment).
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from joint import estimates
from machine import write_result

from divergent_tokens.calibrated import ready_plan, ready_schemes
from divergent_tokens.candidates import Candidate
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import find_components, weight_of
from divergent_tokens.compress.gptq import entry_of, round_to_nearest
from divergent_tokens.compress.kept import Kept
from divergent_tokens.compress.plan import Plan, uniform_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.measure.comparison import compare
from divergent_tokens.measure.perplexity import read_text
from divergent_tokens.measure.prompts import read_prompts
from divergent_tokens.models import Model, load_model
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.search import search
from divergent_tokens.store import default_cache
from divergent_tokens.sweep import sweep

GRIDS = ("int8:g64", "int4:g64", "int3:g64", "int2:g64")


def main() -> None:
    arguments = parse()
    base = load_model(arguments.base, cache=arguments.cache)
    components = find_components(base.network)
    prompts = partial(read_prompts, arguments.prompts, base, prefix=arguments.prefix)
    chosen_on = prompts(n_prompts=arguments.n_prompts)
    held_out = prompts(n_prompts=arguments.n_prompts, skip=arguments.n_prompts)
    plans = {}
    with tempfile.TemporaryDirectory() as place:
        for grid in arguments.grids:
            plans[grid] = uniform_plan(components, parse_scheme(grid))
            plans[f"nearest on GPTQ's grid, {grid}"] = nearest(base, components, grid, Path(place))
            gptq = uniform_plan(components, parse_scheme(f"gptq:{grid}"))
            plans[f"gptq:{grid}"] = ready_plan(
                base, components, gptq, source=arguments.calibration, cache=arguments.cache
            )
        for bits in arguments.bits:
            plans[f"a plan of either, {bits:g} bits"] = either(
                arguments, base, components, chosen_on, bits, Path(place)
            )
        found = measured(arguments, base, components, plans, held_out)
    for name, row in found.items():
        print(
            f"{name:36} FDT {row['fdt']['value']:6.1f}  SDT {100 * row['sdt']['value']:6.2f} %  "
            f"KL {row['kl']['value']:8.5f}  DPPL {row['dppl']['value']:8.3f}  PPL {row['ppl']}"
        )
    result = {
        "base": arguments.base,
        "prompts": Path(arguments.prompts).name,
        "calibration": Path(arguments.calibration).name,
        "n_prompts": arguments.n_prompts,
        "new_tokens": arguments.new_tokens,
        "held_out": found,
    }
    print("written to", write_result("gptq", result, arguments.out))


def nearest(base: Model, components: Any, grid: str, place: Path) -> Plan:
    """All components rounded to nearest on the grid that llm-compressor gives GPTQ."""
    scheme = parse_scheme(f"gptq:{grid}")
    kept = Kept(place, base.fingerprint, "nearest")
    for component in components:
        weight = weight_of(base.network, component)
        rounded = round_to_nearest(weight, scheme.steps[0].grid)
        kept.write(str(scheme), component, entry_of(rounded))
    return uniform_plan(components, scheme).bound(kept)


def either(
    arguments: argparse.Namespace,
    base: Model,
    components: Any,
    prompts: Any,
    bits: float,
    place: Path,
) -> Plan:
    """The plan that the probe chooses among GPTQ and AbsMax at 3, 4 and 8 bits."""
    texts = [
        f"{kind}{grid}" for grid in ("int3:g64", "int4:g64", "int8:g64") for kind in ("", "gptq:")
    ]
    schemes = ready_schemes(
        base,
        components,
        [parse_scheme(text) for text in texts],
        cache=arguments.cache,
        source=arguments.calibration,
    )
    found = sweep(
        base,
        components,
        schemes,
        prompts,
        place / "sweep.db",
        new_tokens=arguments.new_tokens,
        cache=arguments.cache,
    )
    plan = search(found, Budget(Unit.bits, bits)).plan_file().plan()
    return ready_plan(base, components, plan, source=arguments.calibration, cache=arguments.cache)


def measured(
    arguments: argparse.Namespace,
    base: Model,
    components: Any,
    plans: dict[str, Plan],
    prompts: Any,
) -> dict[str, Any]:
    candidates = {
        name: Candidate(partial(lent_plan, base, plan, components=components))
        for name, plan in plans.items()
    }
    comparison = compare(
        base,
        candidates,
        prompts,
        new_tokens=arguments.new_tokens,
        text=read_text(arguments.text) if arguments.text else None,
        cache=arguments.cache,
    )
    found = {}
    for candidate in comparison.candidates:
        metrics = candidate.metrics.to_json()
        found[candidate.name] = {
            **estimates(metrics, "fdt", "sdt", "kl", "dppl"),
            "ppl": metrics["ppl"],
            "schemes": plans[candidate.name].name,
        }
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="demo:smollm2")
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--calibration", required=True, help="what GPTQ is made from")
    parser.add_argument("--n-prompts", type=int, default=64, help="to choose on, and to report on")
    parser.add_argument("--prefix", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--text", help="for PPL")
    parser.add_argument("--grids", nargs="+", default=GRIDS)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
