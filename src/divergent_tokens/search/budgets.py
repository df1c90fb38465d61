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


def one_budget(share: str | None, bits: float | None, count: int | None) -> Budget | None:
    """The budget that was given in one of three units, if one was."""
    given = {"--budget": share, "--bits": bits, "--count": count}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise DivergentTokensError(f"{' and '.join(names)} are two budgets; give one of them")
    if share is not None:
        return Budget(Unit.share, parse_share(share))
    if bits is not None:
        if not bits > 0:
            raise DivergentTokensError(f"--bits is {bits}; expected a number such as 5.5")
        return Budget(Unit.bits, bits)
    return None if count is None else Budget(Unit.components, count)
