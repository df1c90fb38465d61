"""Two candidates on the same prompts: which stays with the base for longer, and is that luck?"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from divergent_tokens.measure.intervals import (
    Estimate,
    estimate_difference,
    holm,
    sign_flip_p_value,
)


@dataclass(frozen=True)
class Pair:
    """A paired comparison of the FDTs of two candidates."""

    a: str
    b: str
    fdt_difference: Estimate
    """Mean FDT of a minus that of b, in tokens."""
    p_value: float
    """Of a sign-flip permutation test: how often would coins for signs give as large a mean?"""
    p_holm: float
    """The same, corrected for the number of pairs (Holm 1979)."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"fdt_difference": self.fdt_difference.to_json()}


def compare_pairs(
    fdt: Mapping[str, NDArray[Any]], lengths: NDArray[Any], *, level: float, seed: int
) -> tuple[Pair, ...]:
    """Every pair of candidates, from their FDT [prompt] and the completions' lengths [prompt].

    A log-rank test would take the two for independent groups and reject far too rarely; here the
    same prompts stand on both sides.
    """
    pairs = list(itertools.combinations(fdt, 2))
    found = [sign_flip_p_value(fdt[a], fdt[b], seed=seed) for a, b in pairs]
    p_values = [p_value for p_value in found if p_value is not None]  # None without prompts only
    return tuple(
        Pair(
            a=a,
            b=b,
            fdt_difference=estimate_difference(
                fdt[a], fdt[b], ceiling=lengths, level=level, seed=seed
            ),
            p_value=p_value,
            p_holm=p_holm,
        )
        for (a, b), p_value, p_holm in zip(pairs, p_values, holm(p_values), strict=True)
    )
