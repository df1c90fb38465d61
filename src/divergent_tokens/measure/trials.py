"""What a trial says of one prefix and number of new tokens: how many prompts, and at what cost."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from divergent_tokens.measure import metrics
from divergent_tokens.measure.comparison import Comparison
from divergent_tokens.measure.intervals import Estimate
from divergent_tokens.measure.metrics import Divergence
from divergent_tokens.measure.needed import (
    Contrast,
    Needed,
    estimate_of,
    needed_prompts,
    prompts_to_tell,
    sample_of,
)
from divergent_tokens.measure.widths import UNITS, Width

MOST_CENSORED = 0.5
"""Where more prompts than this never part, FDT measures the completions' length."""
MOST_REPEATED = 0.3
"""Where more tokens than this lie in loops, SDT and KL are of loops."""
OWN_PASSES = 2
"""Over prompts and completions, that a comparison makes beside its candidates': the base's, and
the rounding floor's."""


@dataclass(frozen=True)
class Judged:
    """One candidate at one prefix and number of new tokens."""

    name: str
    estimates: dict[str, Estimate]
    """By metric, on the trial's prompts."""
    needed: dict[str, Needed]
    """By the metric whose width is wanted."""
    censored: float
    """Share of prompts with no divergence."""
    near_ties: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            **{metric: found.to_json() for metric, found in self.estimates.items()},
            "needed": {metric: found.to_json() for metric, found in self.needed.items()},
            "censored": self.censored,
            "near_ties": self.near_ties,
        }


@dataclass(frozen=True)
class Pair:
    """Two candidates at one prefix and number of new tokens."""

    a: str
    b: str
    contrasts: tuple[Contrast, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "a": self.a,
            "b": self.b,
            "contrasts": [contrast.to_json() for contrast in self.contrasts],
        }


@dataclass(frozen=True)
class Cell:
    """One prefix and number of new tokens: what the trial says of it, and what it would cost."""

    prefix: int | None
    new_tokens: int
    n_trial: int
    sequence_length: float
    """Tokens of a prompt and its completion, a mean over prompts."""
    repeated: float
    """Share of the base's tokens in repeated passages."""
    rounding_kl: float | None
    """Of the rounding floor, at the most new tokens of the trial."""
    candidates: tuple[Judged, ...]
    pairs: tuple[Pair, ...]
    wants_fdt: bool

    @property
    def n_prompts(self) -> int | None:
        """Prompts that meet every width for every candidate, the trial's at least."""
        return self._most([found.n_prompts for found in self._needed()])

    @property
    def n_prompts_high(self) -> int | None:
        """The same by the high ends of the ranges."""
        return self._most([found.high for found in self._needed()])

    @property
    def spoiled_by(self) -> list[str]:
        """Why a comparison here would say little: "censored", "loops"."""
        worst = max(judged.censored for judged in self.candidates)
        found = ["censored"] if self.wants_fdt and worst > MOST_CENSORED else []
        return found + (["loops"] if self.repeated > MOST_REPEATED else [])

    @property
    def forward_tokens(self) -> dict[str, int] | None:
        """Tokens through the model: to complete, of each pass of scores, and in all."""
        if self.n_prompts is None:
            return None
        once = round(self.n_prompts * self.sequence_length)
        return {
            "completions": once,
            "each_pass": once,
            "all": once * (1 + OWN_PASSES + len(self.candidates)),
        }

    def _needed(self) -> list[Needed]:
        return [found for judged in self.candidates for found in judged.needed.values()]

    def _most(self, numbers: Sequence[float | None]) -> int | None:
        """The largest, rounded up to two digits: no trial knows more."""
        known = [number for number in numbers if number is not None]
        if len(known) < len(numbers):
            return None
        most = max(self.n_trial, *known)
        step = int(10 ** max(0, math.floor(math.log10(most)) - 1))
        return math.ceil(most / step) * step

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "prefix": self.prefix,
            "new_tokens": self.new_tokens,
            "sequence_length": self.sequence_length,
            "repeated": self.repeated,
            "rounding_kl": self.rounding_kl,
            "candidates": [judged.to_json() for judged in self.candidates],
            "pairs": [pair.to_json() for pair in self.pairs],
            "n_prompts": self.n_prompts,
            "n_prompts_high": self.n_prompts_high,
            "spoiled_by": self.spoiled_by,
            "forward_tokens": self.forward_tokens,
        }


def judge(found: Comparison, new_tokens: int, widths: Sequence[Width]) -> Cell:
    """The cell of a trial's comparison, its completions cut to `new_tokens`."""
    completions = found.completions
    ids, mask = completions.ids[:, :new_tokens], completions.mask[:, :new_tokens]
    cut = {one.name: one.divergence.beginning(new_tokens) for one in found.candidates}
    starts = completions.sequence_lengths - completions.lengths
    assert found.rounding.kl is not None
    return Cell(
        prefix=completions.prompts.prefix,
        new_tokens=new_tokens,
        n_trial=len(completions.prompts),
        sequence_length=float((starts + mask.sum(1)).mean()),
        repeated=float(metrics.repeated(ids, mask)[mask].mean()),
        rounding_kl=found.rounding.kl.value,
        candidates=tuple(_judged(name, cut[name], found, widths) for name in cut),
        pairs=tuple(_pair(a, b, cut, found) for a, b in itertools.combinations(cut, 2)),
        wants_fdt=any(width.metric == "fdt" for width in widths),
    )


def _judged(name: str, cut: Divergence, found: Comparison, widths: Sequence[Width]) -> Judged:
    settings: dict[str, Any] = {"level": found.level, "seed": found.seed}
    samples = {metric: sample_of(metric, cut) for metric in UNITS}
    return Judged(
        name=name,
        estimates={metric: estimate_of(one, **settings) for metric, one in samples.items()},
        needed={w.metric: needed_prompts(samples[w.metric], w, **settings) for w in widths},
        censored=float(np.mean(cut.censored)),
        near_ties=metrics.near_ties(
            None if censored else float(found.margins[i, t])
            for i, (t, censored) in enumerate(zip(cut.fdt, cut.censored, strict=True))
        ),
    )


def _pair(a: str, b: str, cut: Mapping[str, Divergence], found: Comparison) -> Pair:
    contrasts = tuple(
        prompts_to_tell(
            sample_of(metric, cut[a]),
            sample_of(metric, cut[b]),
            level=found.level,
            seed=found.seed,
        )
        for metric in UNITS
    )
    return Pair(a, b, contrasts)
