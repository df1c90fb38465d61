"""The paper's claim on quantization: how many of the weights plain AbsMax int8 can take over before
the text diverges sooner than under LLM.int8 on all of them.

Reads a sweep of the AbsMax scheme; components are taken over in ascending order of harm. What is
not taken over stays as it is, or is under LLM.int8 (`--rest llm.int8`).
"""

import argparse

from joint import held_out_arguments, measure
from machine import write_result
from probed import run_of

from divergent_tokens.sensitivities import read_sensitivities

ALL = "llm.int8 on all"


def main() -> None:
    arguments = parse()
    sweep = read_sensitivities(arguments.sweep)
    rows = [row for row in sweep.rows if row.scheme == arguments.scheme and row.method == "probe"]
    order = [row.component for row in sorted(rows, key=lambda row: row.kl)]
    weights = {component.name: component.n_parameters for component in sweep.components}
    plans = {ALL: dict.fromkeys(order, "llm.int8")}
    shares = {}
    for k in sorted({round(share * len(order)) for share in arguments.shares}):
        plan = dict.fromkeys(order[:k], arguments.scheme)
        if arguments.rest:
            plan |= dict.fromkeys(order[k:], arguments.rest)
        plans[f"{k} of {len(order)}"] = plan
        shares[f"{k} of {len(order)}"] = sum(map(weights.get, order[:k])) / sum(weights.values())
    found = measure(arguments, sweep, plans)
    for name, metrics in found.items():
        share = f"{100 * shares[name]:5.1f} %" if name in shares else ""
        fdt, sdt = metrics["fdt"], metrics["sdt"]
        print(
            f"{name:18} {share:8} FDT {fdt['value']:6.1f} ({fdt['low']:.1f} to {fdt['high']:.1f})  "
            f"SDT {100 * sdt['value']:.2f} %  KL {metrics['kl']['value']:.3g}"
        )
    reached = [
        s for name, s in shares.items() if found[name]["fdt"]["value"] >= found[ALL]["fdt"]["value"]
    ]
    print(f"at the FDT of LLM.int8 on all: {100 * max(reached, default=0):.1f} % of the weights")
    result = {
        "base": sweep.run["base"]["reference"],
        "run": run_of(sweep),
        "scheme": arguments.scheme,
        "rest": arguments.rest,
        "shares": shares,
        "held_out": found,
        "share_at_the_same_fdt": max(reached, default=0),
    }
    print("written to", write_result(arguments.name or "llm-int8", result, arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    held_out_arguments(parser)
    parser.add_argument("--scheme", default="int8:tensor")
    parser.add_argument("--rest", help="the scheme of what is not taken over; none if absent")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1]
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
