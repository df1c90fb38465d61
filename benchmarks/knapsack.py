"""How long choosing a plan takes, how far from proven it is, and what the proof costs.

Components and schemes as a sweep has them: sizes of a few shapes, KLs over five orders of magnitude
that rise as bits fall. HiGHS alone on the same numbers is tried where `--highs` gives it seconds.
"""

import argparse
import time
from typing import Any

import numpy as np
from machine import machine, write_result
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from divergent_tokens.search.knapsack import Floats, Integers, least_harm

CASES = ((210, 5), (500, 10), (20_000, 10))
SHARES = (0.3, 0.5, 0.7)


def sweep(n: int, m: int, seed: int) -> tuple[Floats, Integers]:
    """Harm and size [component, option] of `n` components under `m` schemes."""
    rng = np.random.default_rng(seed)
    base = rng.choice([2 * 576 * 576, 2 * 576 * 1536, 2 * 192 * 576], n)
    shares = np.sort(rng.uniform(0.15, 0.6, m))[::-1]
    size = np.c_[base, (base[:, np.newaxis] * shares).astype(np.int64)]
    harm = 10 ** rng.uniform(-7, -2, (n, 1)) / shares**4 * rng.lognormal(0, 0.3, (n, m))
    return np.c_[np.zeros(n), harm], size


def highs(harm: Floats, size: Integers, limit: int, seconds: float) -> dict[str, Any]:
    """The same by scipy's milp alone, its numbers scaled to 1."""
    n, m = harm.shape
    rows = np.repeat(np.arange(n), m)
    one_each = csr_array((np.ones(n * m), (rows, np.arange(n * m))))
    start = time.perf_counter()
    result = milp(
        harm.ravel() / harm.sum(),
        integrality=np.ones(n * m),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(size.ravel()[np.newaxis] / limit, -np.inf, 1),
        ],
        options={"time_limit": seconds, "mip_rel_gap": 1e-6},
    )
    taken = time.perf_counter() - start
    harm_sum = None if result.x is None else float((result.x.round() * harm.ravel()).sum())
    return {"highs_seconds": taken, "highs_finished": result.status == 0, "highs_harm": harm_sum}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--highs", type=float, default=0, help="seconds for HiGHS alone; 0: not")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    for n, m in CASES:
        harm, size = sweep(n, m, options.seed)
        for share in SHARES:
            limit = int(share * size[:, 0].sum())
            row: dict[str, Any] = {"components": n, "schemes": m, "share": share}
            for way, prove in (("price", False), ("proof", None)):
                if prove is None and n > 500:
                    continue
                start = time.perf_counter()
                found = least_harm(harm, size, limit, prove=prove)
                row[f"{way}_seconds"] = time.perf_counter() - start
                row[f"{way}_gap"] = found.gap / found.harm
            if options.highs:
                row |= highs(harm, size, limit, options.highs)
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()))
    path = write_result("knapsack", {"seed": options.seed, "rows": rows})
    print(f"on {machine()['device']}; written to {path}")


if __name__ == "__main__":
    main()
