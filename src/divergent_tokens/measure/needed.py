"""How many prompts an interval of a wanted width needs, judged from the few of a trial.

The trial's prompts, each taken k times over, stand for k times as many prompts of the same kind,
and the interval of those is computed as every other one is (`intervals.py`). Its width falls with
about the square root of the number, but not quite: the one more prompt that it allows for weighs
less and less.

A trial knows its own spread roughly only. How roughly is an interval too: of the variance over
prompts, a mean of squares, since the number needed is proportional to it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from divergent_tokens.measure.intervals import Estimate, estimate_difference, estimate_ratio
from divergent_tokens.measure.metrics import Divergence
from divergent_tokens.measure.summaries import estimate_fdt
from divergent_tokens.measure.widths import Width

MOST_COPIES = 64
"""Beyond so many times the trial, the square root alone carries on."""
POWER = 0.8
"""Of the runs with the prompts that tell two candidates apart, so many would."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One metric of a candidate on the trial's prompts; all arrays are [prompt]."""

    metric: str
    sums: Floats
    """FDTs, divergent tokens, or nats of KL."""
    lengths: Floats
    """Tokens of the completions."""
    longest_agreement: Floats | None = None
    """For FDT, which allows for a prompt not seen that is as lucky from its start."""


@dataclass(frozen=True)
class Needed:
    """A number of prompts, and within which range the trial knows it."""

    n_prompts: float | None
    """None where the trial cannot say: its interval has no end, or nothing differs."""
    low: float | None
    high: float | None
    """None where there may be no number that is enough."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self)


@dataclass(frozen=True)
class Contrast:
    """How many prompts tell two candidates apart by one metric, on the same prompts or not."""

    metric: str
    difference: Estimate
    """Of the first minus the second, on the trial's prompts."""
    paired: Needed
    """Both on the same prompts, as `dtm compare` has them."""
    unpaired: float | None
    """Each on as many prompts of its own."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "metric": self.metric,
            "difference": self.difference.to_json(),
            "paired": self.paired.to_json(),
            "unpaired": self.unpaired,
        }


def sample_of(metric: str, divergence: Divergence) -> Sample:
    """What FDT, SDT or KL is made of, from a candidate's rows; KL has to be known."""
    sums = {"fdt": divergence.fdt, "sdt": divergence.n_divergent, "kl": divergence.kl}[metric]
    assert sums is not None, "a model's scores hold all three"
    return Sample(
        metric,
        np.asarray(sums, dtype=np.float64),
        np.asarray(divergence.n_tokens, dtype=np.float64),
        np.asarray(divergence.longest_agreement, dtype=np.float64) if metric == "fdt" else None,
    )


def needed_prompts(sample: Sample, width: Width, *, level: float = 0.95, seed: int = 0) -> Needed:
    """How many prompts like those of the sample make the metric's interval as narrow as `width`.

    The range is that of the variance over prompts; with a relative width the value's own doubt is
    left out.
    """

    def narrowness(copies: int) -> float:
        """The interval's width over the wanted one, of so many copies of the trial."""
        found = estimate_of(sample, copies=copies, level=level, seed=seed)
        if found.value is None or found.low is None or found.high is None:
            return math.inf
        wanted = width.of(found.value)
        return (found.high - found.low) / wanted if wanted > 0 else math.inf

    found = _where_one(narrowness, len(sample.sums))
    if found is None:
        return Needed(None, None, None)
    spread = variance(sample, level=level, seed=seed)
    if not spread.value or spread.low is None or spread.high is None:
        return Needed(found, None, None)
    return Needed(found, found * spread.low / spread.value, found * spread.high / spread.value)


def _where_one(narrowness: Callable[[int], float], n_trial: int) -> float | None:
    """The number of prompts where the interval is just narrow enough; None where it never is."""
    before: tuple[float, float] | None = None  # logs of a number of prompts and its narrowness
    copies = 1
    while True:
        ratio = narrowness(copies)
        if not math.isfinite(ratio):
            return None
        here = math.log(n_trial * copies), math.log(ratio)
        if ratio <= 1 and before is not None:
            share = before[1] / (before[1] - here[1])
            return math.exp(before[0] + share * (here[0] - before[0]))
        if ratio <= 1 or copies == MOST_COPIES:
            return n_trial * copies * ratio**2
        before, copies = here, 2 * copies


def estimate_of(sample: Sample, *, copies: int = 1, level: float = 0.95, seed: int = 0) -> Estimate:
    """The metric with its interval, as a comparison has it, of each prompt `copies` times."""
    sums, lengths = np.tile(sample.sums, copies), np.tile(sample.lengths, copies)
    if sample.longest_agreement is not None:
        agreement = np.tile(sample.longest_agreement, copies)
        return estimate_fdt(sums, lengths, agreement, level=level, seed=seed)
    unit: Any = "share" if sample.metric == "sdt" else "nats"
    return estimate_ratio(sums, lengths, unit=unit, level=level, seed=seed)


def variance(sample: Sample, *, level: float = 0.95, seed: int = 0) -> Estimate:
    """Variance over prompts of the metric's numerator about its expectation, with its interval.

    The number of prompts that an interval needs is proportional to it. A mean of squares whose few
    largest make most of it, so that the interval is a wide one, and it allows for one larger still.
    """
    counts = np.ones_like(sample.sums) if sample.metric == "fdt" else sample.lengths
    residuals = sample.sums - sample.sums.sum() / counts.sum() * counts
    return estimate_ratio(
        residuals**2, np.ones_like(residuals), unit="nats", level=level, seed=seed
    )


def prompts_to_tell(a: Sample, b: Sample, *, level: float = 0.95, seed: int = 0) -> Contrast:
    """How many prompts show that a and b differ, with a power of 0.8 at this level.

    ((z of the level + z of the power) · sd / difference)², the normal approximation, with the sd of
    the prompts' differences for pairs. Its low and high are those at the far and the near end of
    the difference's interval; where 0 is inside, no number need be enough, and high is None.
    """
    # So that the mean of a prompt's numbers is the pooled ratio.
    scale = 1.0 if a.metric == "fdt" else float(a.lengths.mean())
    x, y = a.sums / scale, b.sums / scale
    ceiling = a.lengths if a.metric == "fdt" else max(x.max(), y.max())
    difference = estimate_difference(x, y, ceiling=ceiling, level=level, seed=seed)
    paired, own = float(np.var(x - y, ddof=1)), float(np.var(x, ddof=1) + np.var(y, ddof=1))
    z = float(stats.norm.isf((1 - level) / 2) + stats.norm.ppf(POWER))

    def needed(spread: float, gap: float | None) -> float | None:
        return z * z * spread / gap**2 if gap else None

    assert difference.low is not None
    assert difference.high is not None, "a trial has more than one prompt"
    near, far = sorted((abs(difference.low), abs(difference.high)))
    apart = difference.low * difference.high > 0
    return Contrast(
        metric=a.metric,
        difference=difference,
        paired=Needed(
            needed(paired, difference.value),
            needed(paired, far),
            needed(paired, near) if apart else None,
        ),
        unpaired=needed(own, difference.value),
    )
