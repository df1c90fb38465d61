"""How much a plan may take."""

import math
from dataclasses import dataclass
from enum import StrEnum

from divergent_tokens.errors import DivergentTokensError


class Unit(StrEnum):
    """What a budget counts."""

    components = "count"
    """Components that are converted."""
    share = "budget"
    """Bytes under the plan, of the base's bytes."""
    bits = "bits"
    """Bits a weight, on average."""


@dataclass(frozen=True)
class Budget:
    """How much a plan may take, or how many components it converts."""

    unit: Unit
    value: float

    def __str__(self) -> str:
        """As it is typed."""
        shown = f"{100 * self.value:g}%" if self.unit is Unit.share else f"{self.value:g}"
        return f"--{self.unit} {shown}"


def parse_share(text: str) -> float:
    """A share from `60%` or `0.6`."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise DivergentTokensError(
            f"--budget is {text!r}; expected a share of the base's bytes between 0% and 100%, as "
            "in 60% or 0.6"
        )
    return value
