"""The paper's figure: held-out FDT after the k least harmful components, by what judged them.

Reads a sweep with both methods' rows (and `--text`, for the order by PPL). Every order takes the
components from the least harm up; the joint model is measured on prompts that chose nothing.
"""

import argparse
from collections.abc import Callable
from typing import Any

from joint import held_out_arguments, measure
from machine import write_result
from probed import run_of

from divergent_tokens.probe import kl_of
from divergent_tokens.sensitivities import Sensitivities, read_sensitivities


def main() -> None:
    arguments = parse()
    sweep = read_sensitivities(arguments.sweep)
    rows = {(r.component, r.scheme): r for r in sweep.rows if r.method == "measure"}
    schemes = arguments.schemes or list(dict.fromkeys(scheme for _, scheme in rows))
    names = [c.name for c in sweep.components if (c.name, schemes[0]) in rows]
    counts = [round(share * len(names)) for share in arguments.shares]
    plans: dict[str, dict[str, str]] = {}
    for scheme in schemes:
        for order, harm in orders(arguments, sweep, rows, scheme).items():
            ascending = sorted(names, key=harm)
            for k in counts:
                plans[f"{scheme}, {order}, {k}"] = dict.fromkeys(ascending[:k], scheme)
    found = measure(arguments, sweep, plans)
    for scheme in schemes:
        print(f"\nheld-out FDT (SDT), {scheme}")
        for order in orders(arguments, sweep, rows, scheme):
            cells = (found[f"{scheme}, {order}, {k}"] for k in counts)
            values = "  ".join(
                f"{cell['fdt']['value']:6.1f} ({100 * cell['sdt']['value']:.2f}%)" for cell in cells
            )
            print(f"{order:24} {values}")
    result = {
        "base": sweep.run["base"]["reference"],
        "run": run_of(sweep),
        "n_components": len(names),
        "counts": counts,
        "held_out": found,
    }
    print("written to", write_result(arguments.name or "selection", result, arguments.out))


def orders(
    arguments: argparse.Namespace,
    sweep: Sensitivities,
    rows: dict[tuple[str, str], Any],
    scheme: str,
) -> dict[str, Callable[[str], float]]:
    """What judges a component, by the name of the order: the smaller the better."""
    n = len(sweep.prompts)
    lengths = sweep.lengths

    def of(name: str) -> Any:
        return rows[name, scheme]

    def measured_kl(n: int) -> Callable[[str], float]:
        return lambda name: float(sweep.prompt_kl(name, scheme, "measure")[:n].sum())

    def probed_kl(n: int) -> Callable[[str], float]:
        return lambda name: kl_of(sweep.draws(name, scheme)[:n, :1], lengths[:n])[0]

    position = {c.name: i for i, c in enumerate(sweep.components)}
    found: dict[str, Callable[[str], float]] = {
        f"FDT, {n} prompts": lambda name: -of(name).fdt,
        f"SDT, {n} prompts": lambda name: of(name).sdt,
        f"KL, {n} prompts": measured_kl(n),
        "weight error": lambda name: of(name).weight_error,
        "DPPL": lambda name: of(name).dppl,
        "first layers first": lambda name: position[name],
    }
    if rows[next(iter(rows))].ppl is not None:
        found["PPL"] = lambda name: of(name).ppl
    found |= {f"KL, {k} prompts": measured_kl(k) for k in (16,) if k < n}
    found |= {f"probe, {k} prompts": probed_kl(k) for k in sorted({32, 128, n}) if k <= n}
    chosen = arguments.orders or found
    return {name: harm for name, harm in found.items() if name in chosen}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    held_out_arguments(parser)
    parser.add_argument("--schemes", nargs="+")
    parser.add_argument("--orders", nargs="+", help="only these, by the names that are printed")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    return parser.parse_args()


if __name__ == "__main__":
    main()
