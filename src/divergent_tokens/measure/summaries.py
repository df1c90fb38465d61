"""What a comparison says of one candidate: estimates over prompts, as a whole and by group."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from divergent_tokens.measure import metrics
from divergent_tokens.measure.intervals import (
    Estimate,
    Survival,
    estimate_mean,
    estimate_ratio,
    median_fdt,
    survival,
)
from divergent_tokens.measure.metrics import Divergence

LONG_AGREEMENT = 0.9
"""Which quantile of the prompts' longest agreements the FDT of an unseen prompt may have."""


@dataclass(frozen=True)
class Metrics:
    """The METRICS of comparison.json; None is "not measured", never zero. See docs/metrics.md."""

    fdt: Estimate
    median_fdt: Estimate
    sdt: Estimate
    dppl: Estimate | None
    base_dppl: float | None
    kl: Estimate | None
    kl_p99: float | None
    acceptance: Estimate | None
    near_ties: float | None
    identical: float
    n_tokens: int
    mean_length: float
    survival: Survival
    sdt_by_quarter: list[float | None]
    repeated: float
    ppl: dict[str, Any] | None = None
    by_domain: dict[str, "Metrics"] = field(default_factory=dict)
    by_language: dict[str, "Metrics"] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; groups are left out of groups."""
        plain = {
            name: value.to_json() if isinstance(value, Estimate | Survival) else value
            for name, value in vars(self).items()
            if not name.startswith("by_")
        }
        groups = {"by_domain": self.by_domain, "by_language": self.by_language}
        for name, members in groups.items():
            plain[name] = {group: part.to_json() for group, part in members.items()}
        return plain


def summarize(
    divergence: Divergence,
    margins_at_first: Sequence[float | None],
    repeated: NDArray[np.bool_],
    *,
    level: float,
    seed: int,
    domains: Sequence[str | None] = (),
    languages: Sequence[str | None] = (),
    ppl: dict[str, Any] | None = None,
) -> Metrics:
    """All metrics of one candidate from its rows; `repeated` marks tokens [prompt, token]."""
    d = divergence

    def ratio(sums: NDArray[Any] | None, unit: Any) -> Estimate | None:
        if sums is None:
            return None
        return estimate_ratio(sums, d.n_tokens, unit=unit, level=level, seed=seed)

    sdt = ratio(d.n_divergent, "share")
    assert sdt is not None
    return Metrics(
        fdt=estimate_fdt(d.fdt, d.n_tokens, d.longest_agreement, level=level, seed=seed),
        median_fdt=median_fdt(d.fdt, d.censored, level=level),
        sdt=sdt,
        dppl=ratio(d.nats, "perplexity"),
        base_dppl=None
        if d.base_nats is None
        else float(np.exp(d.base_nats.sum() / d.n_tokens.sum())),
        kl=ratio(d.kl, "nats"),
        kl_p99=None if d.kl_per_token is None else float(np.quantile(d.kl_per_token[d.mask], 0.99)),
        acceptance=ratio(d.acceptance, "share"),
        near_ties=metrics.near_ties(margins_at_first),
        identical=float(d.censored.mean()),
        n_tokens=int(d.n_tokens.sum()),
        mean_length=float(d.n_tokens.mean()),
        survival=survival(d.fdt, d.censored, level=level),
        sdt_by_quarter=metrics.sdt_by_quarter(d.apart, d.mask),
        repeated=float(repeated[d.mask].mean()),
        ppl=ppl,
        by_domain=_by_group(d, domains, margins_at_first, repeated, level, seed),
        by_language=_by_group(d, languages, margins_at_first, repeated, level, seed),
    )


def _by_group(
    d: Divergence,
    groups: Sequence[str | None],
    margins_at_first: Sequence[float | None],
    repeated: NDArray[np.bool_],
    level: float,
    seed: int,
) -> dict[str, Metrics]:
    found = sorted({group for group in groups if group is not None})
    members = {group: [i for i, g in enumerate(groups) if g == group] for group in found}
    return {
        group: summarize(
            d.subset(rows),
            [margins_at_first[i] for i in rows],
            repeated[rows],
            level=level,
            seed=seed,
        )
        for group, rows in members.items()
    }


def estimate_fdt(
    fdt: NDArray[Any],
    n_tokens: NDArray[Any],
    longest_agreement: NDArray[Any],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Mean FDT; all arrays are [prompt].

    A few prompts in a hundred never part from the base, since it repeats itself from the start;
    they can hold half of the mean and be in no sample of fifty. Long agreements later in the text
    are in every sample, so the unseen prompt of the high bound has the longest agreement of
    a prompt that one in ten exceeds.
    """
    unseen = float(np.quantile(longest_agreement, LONG_AGREEMENT))
    return estimate_mean(fdt, ceiling=n_tokens, extreme=unseen, level=level, seed=seed)
