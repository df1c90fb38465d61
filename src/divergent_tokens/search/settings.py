"""How a search ranks components and what it may choose from."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from divergent_tokens.compress.couplings import Coupling


class RankBy(StrEnum):
    """What counts as harm."""

    kl = "kl"
    fdt = "fdt"
    sdt = "sdt"
    dppl = "dppl"
    ppl = "ppl"
    weight_error = "weight-error"


class Method(StrEnum):
    """Which of a sweep's rows a KL is taken from."""

    auto = "auto"
    """Measured, but the probe's where that lies under three times the rounding floor."""
    probe = "probe"
    measure = "measure"


@dataclass(frozen=True)
class Settings:
    """How a search ranks and what it may choose from."""

    rank_by: RankBy = RankBy.kl
    """What counts as harm."""
    schemes: tuple[str, ...] = ()
    """Those of the sweep to choose from; all if there is none."""
    method: Method = Method.auto
    """Which of the sweep's KLs count."""
    coupling: Coupling | None = None
    """Whose rules the plan keeps to."""
    seed: int = 0
    """For halves and resamples of the prompts."""
    level: float = 0.95
    """Of the intervals."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; the schemes are said by what was found."""
        return {
            "rank_by": str(self.rank_by),
            "method": str(self.method),
            "couple": None if self.coupling is None else str(self.coupling),
            "seed": self.seed,
        }
