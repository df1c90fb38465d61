"""In bfloat16: what the probe and a measured sweep still see of the harm that float32 shows.

Reads two sweeps of one base on the same prompts: one run in float32, with measured rows, and one in
bfloat16, with both methods' rows.
"""

import argparse
from pathlib import Path

import numpy as np
from machine import write_result
from probed import row, run_of

from divergent_tokens.sensitivities import read_sensitivities


def main() -> None:
    arguments = parse()
    truth, half = read_sensitivities(arguments.float32), read_sensitivities(arguments.bfloat16)
    measured = {(r.component, r.scheme): r.kl for r in truth.rows if r.method == "measure"}
    print(f"rounding floor in bfloat16: a KL of {half.rounding_kl:.2g}")
    rows = []
    for scheme in dict.fromkeys(r.scheme for r in half.rows):
        for method in ("probe", "measure"):
            found = {
                r.component: r
                for r in half.rows
                if r.scheme == scheme and r.method == method and (r.component, scheme) in measured
            }
            if not found:
                continue
            kls = np.array([measured[name, scheme] for name in found])
            line = row(scheme, f"{method} in bfloat16", [r.kl for r in found.values()], kls)
            line["n_components"] = len(found)
            line["below_rounding"] = sum(half.below_rounding(r) for r in found.values())
            line["pairs"] = [[r.kl, kl] for r, kl in zip(found.values(), kls, strict=True)]
            rows.append(line)
            print(
                f"{scheme:14} {method:8} Spearman {line['spearman']:6.3f}   ratio "
                f"{line['ratio']:7.2f}   {line['below_rounding']} of {len(found)} below three "
                "times the floor"
            )
    result = {
        "base": half.run["base"]["reference"],
        "run": run_of(half),
        "rounding_kl": half.rounding_kl,
        "rows": rows,
    }
    print("written to", write_result(arguments.name, result, arguments.out))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("float32", type=Path)
    parser.add_argument("bfloat16", type=Path)
    parser.add_argument("--name", default="bfloat16")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
