"""At the bytes of one uniform scheme: mixes of a smaller and a larger one, by what chose them.

Reads a sweep of the two schemes to mix and of the uniform one, with both methods' rows.
"""

import argparse

from joint import held_out_arguments, measure
from machine import write_result
from probed import run_of

from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.search import search
from divergent_tokens.search.settings import Method, RankBy, Settings
from divergent_tokens.sensitivities import read_sensitivities


def main() -> None:
    arguments = parse()
    sweep = read_sensitivities(arguments.sweep)
    uniform = {r.component: r for r in sweep.rows if r.scheme == arguments.uniform}
    size = sum(row.size_bytes for row in uniform.values())
    budget = Budget(Unit.share, size / sum(c.base_size_bytes for c in sweep.components))
    plans = {f"uniform {arguments.uniform}": dict.fromkeys(uniform, arguments.uniform)}
    orders = {
        "probed KL": (RankBy.kl, Method.probe),
        "measured KL": (RankBy.kl, Method.measure),
        "FDT": (RankBy.fdt, Method.auto),
        "SDT": (RankBy.sdt, Method.auto),
        "weight error": (RankBy.weight_error, Method.auto),
    }
    if any(row.ppl is not None for row in sweep.rows):
        orders["PPL"] = (RankBy.ppl, Method.auto)
    for name, (rank_by, method) in orders.items():
        settings = Settings(rank_by=rank_by, method=method, schemes=tuple(arguments.mix))
        plans[f"mix by {name}"] = dict(search(sweep, budget, settings).offer.components)
    found = measure(arguments, sweep, plans)
    for name, metrics in found.items():
        texts = [
            f"{metric} {m['value']:.4g} ({m['low']:.3g}–{m['high']:.3g})"
            for metric, m in metrics.items()
        ]
        counts = {scheme: list(plans[name].values()).count(scheme) for scheme in arguments.mix}
        print(f"{name:24} {'  '.join(texts)}  {counts}")
    result = {
        "base": sweep.run["base"]["reference"],
        "run": run_of(sweep),
        "size_bytes": size,
        "held_out": found,
    }
    print("written to", write_result(arguments.name or "mixed", result, arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    held_out_arguments(parser)
    parser.add_argument("--uniform", default="int6:g64")
    parser.add_argument("--mix", nargs="+", default=["int4:g64", "int8:g64"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
