"""Joint plans: what the probe's sums and the flip law predict, beside what is measured.

Random plans of one scheme or two, and plans chosen by the search at a row of budgets. The flip
law's constants come from the sweep's measured components alone, and from half of the random plans.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from joint import held_out_arguments, measure
from machine import write_result
from probed import run_of

from divergent_tokens.measure.flips import fit, predict, readings
from divergent_tokens.probe import kl_of
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.forecasts import measured_readings
from divergent_tokens.search.search import search
from divergent_tokens.search.settings import Method, Settings
from divergent_tokens.sensitivities import Sensitivities, read_sensitivities


def main() -> None:
    arguments = parse()
    sweep = read_sensitivities(arguments.sweep)
    schemes = list(dict.fromkeys(row.scheme for row in sweep.rows if row.method == "probe"))
    plans = random_plans(sweep, schemes, arguments.random)
    sums: dict[str, dict[str, Any]] = {name: summed(sweep, plan) for name, plan in plans.items()}
    for budget in chosen_budgets(arguments.chosen):
        found = search(sweep, budget, Settings(method=Method.probe))
        name = f"chosen, {budget}"
        plans[name] = dict(found.offer.components)
        forecast = found.offer.forecast
        sums[name] = {"sum": forecast.kl, "joint": forecast.kl_joint, "own": forecast.optimistic_kl}
    before = (
        json.loads(arguments.measured.read_text(encoding="utf-8")) if arguments.measured else {}
    )
    measured = {row["plan"]: row for row in before.get("rows", [])}
    measured = measured or measure(arguments, sweep, plans)
    rows = [
        {"plan": name, "n": len(plans[name]), **sums[name]}
        | {metric: measured[name][metric] for metric in ("kl", "sdt", "fdt")}
        for name in plans
    ]
    half = [row for row in rows if row["plan"].startswith("random")][::2]
    laws = {
        "components": fit(measured_readings(sweep)),
        "plans": fit(
            readings(
                sweep.margins,
                [tuple(row[m]["value"] for m in ("kl", "sdt", "fdt")) for row in half],
            )
        ),
    }
    for row in rows:
        for name, law in laws.items():
            given = predict(sweep.margins, row["kl"]["value"], law)
            whole = None if row["sum"] is None else predict(sweep.margins, row["sum"], law)
            row[f"by {name}"] = {"from_measured_kl": short(given), "from_sum": short(whole)}
    report(rows, laws)
    result = {
        "base": sweep.run["base"]["reference"],
        "run": run_of(sweep),
        "measured_by": {key: before[key] for key in ("command", "device") if before},
        "laws": {name: law.to_json() for name, law in laws.items()},
        "rows": rows,
    }
    print("written to", write_result(arguments.name or "prediction", result, arguments.out))


def random_plans(sweep: Sensitivities, schemes: list[str], n: int) -> dict[str, dict[str, str]]:
    rng = random.Random(1)
    names = [component.name for component in sweep.components]
    found = {}
    for i in range(n):
        chosen = rng.sample(names, round(len(names) ** rng.uniform(0.3, 1)))
        pool = rng.sample(schemes, rng.choice([1, 1, 2]))
        plan = {name: rng.choice(pool) for name in chosen}
        found[f"random {i}, {len(chosen)} of {'/'.join(pool)}"] = plan
    return found


def chosen_budgets(n: int) -> list[Budget]:
    return [Budget(Unit.bits, round(float(bits), 2)) for bits in np.linspace(4.5, 12, n)]


def summed(sweep: Sensitivities, plan: dict[str, str]) -> dict[str, float]:
    draws = [sweep.draws(name, scheme) for name, scheme in plan.items()]
    single = sum(kl_of(one, sweep.lengths)[0] for one in draws)
    return {"sum": single, "joint": kl_of(np.sum(draws, 0), sweep.lengths)[0]}


def short(prediction: Any) -> Any:
    if prediction is None or prediction.sdt is None:
        return None
    parts = (("sdt", prediction.sdt), ("fdt", prediction.fdt))
    return {name: [e.value, e.low, e.high] for name, e in parts}


def report(rows: list[dict[str, Any]], laws: dict[str, Any]) -> None:
    for name, law in laws.items():
        print(f"law of {name}: {law.to_json()}")
    for row in rows:
        given = row["by plans"]["from_measured_kl"] or {
            "sdt": [float("nan")],
            "fdt": [float("nan")],
        }
        print(
            f"{row['plan']:44.44} sum {row['sum'] or float('nan'):8.5f} joint "
            f"{row['joint'] or float('nan'):8.5f} KL {row['kl']['value']:8.5f}  SDT "
            f"{row['sdt']['value']:.4f} law {given['sdt'][0]:.4f}  FDT {row['fdt']['value']:5.1f} "
            f"law {given['fdt'][0]:5.1f}"
        )
    for kind in ("random", "chosen"):
        for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 100)):
            part = [r for r in rows if r["plan"].startswith(kind) and r["sum"]]
            part = [r for r in part if low <= r["kl"]["value"] < high]
            if not part:
                continue
            logs = np.log([[r["sum"], r["joint"]] / np.array(r["kl"]["value"]) for r in part])
            print(f"{kind}, KL {low} to {high}: {len(part)} plans", end="")
            for j, form in enumerate(("sum", "joint")):
                bias, spread = np.exp(np.median(logs[:, j])), logs[:, j].std()
                print(f"; {form} / measured {bias:.2f}, spread {spread:.2f}", end="")
            print()
        for metric in ("sdt", "fdt"):
            hits = [
                given[metric][1] <= row[metric]["value"] <= given[metric][2]
                for row in rows
                if row["plan"].startswith(kind) and (given := row["by components"]["from_sum"])
            ]
            if hits:
                print(f"{kind}: {metric} within the interval for {sum(hits)} of {len(hits)} plans")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    held_out_arguments(parser)
    parser.add_argument("--random", type=int, default=50, metavar="N")
    parser.add_argument("--chosen", type=int, default=20, metavar="N")
    parser.add_argument("--measured", type=Path, help="an earlier result: predict anew, only")
    return parser.parse_args()


if __name__ == "__main__":
    main()
