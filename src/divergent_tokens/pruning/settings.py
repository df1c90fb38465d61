"""What is asked of a pruning."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from divergent_tokens.allocation import ALLOCATIONS, MEASURED, Allocate
from divergent_tokens.compress.gptq import check_llm_compressor
from divergent_tokens.compress.units import GRANULARITIES, Granularity
from divergent_tokens.errors import SchemeError
from divergent_tokens.recover import Training
from divergent_tokens.saliencies import (
    LEVELS,
    Criterion,
)

MOST_CORRECTIONS = 20
"""Of a round; each goes through the model twice."""


@dataclass(frozen=True)
class Settings:
    """What is asked of a pruning; all of it decides the result."""

    sparsity: float
    """The share of all weights of the components that is zero at the end."""
    rounds: int = 10
    criterion: Criterion | Literal["sparsegpt"] = "fisher"
    allocate: Allocate = "global"
    pattern: tuple[int, int] | None = None
    """n of m neighbours stay; the sparsity is 1 − n / m then, and there is one round."""
    n_saliency: int = 64
    """Sequences that saliencies are seen on, and what a repair makes up for; all, if fewer."""
    granularity: Granularity = "component"
    """What gets a sparsity of its own."""
    repair: bool = False
    """What stays of a matrix makes up for what goes, before it is trained."""
    corrections: int = 0
    """Times that a cut by `global` is looked at as a whole, and saliencies scaled by matrix."""
    training: Training = field(default_factory=Training)
    new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SchemeError for what makes no sense."""
        if not 0 < self.sparsity < 1:
            raise SchemeError(
                f"a sparsity of {self.sparsity} was asked for; expected a share of the weights "
                "above 0 and below 1, such as 0.5"
            )
        if self.criterion not in (*get_args(Criterion), "sparsegpt"):
            known = ", ".join((*get_args(Criterion), "sparsegpt"))
            raise SchemeError(f"unknown criterion {self.criterion!r}; expected one of {known}")
        if self.n_saliency < 1:
            raise SchemeError(f"{self.n_saliency} sequences for saliencies; expected 1 at least")
        if self.rounds < 1:
            raise SchemeError(f"{self.rounds} rounds were asked for; expected 1 at least")
        if self.allocate not in ALLOCATIONS:
            raise SchemeError(
                f"unknown allocation {self.allocate!r}; expected one of {', '.join(ALLOCATIONS)}"
            )
        if self.allocate == "global" and self.criterion == "sparsegpt":
            raise SchemeError(
                "--allocate global has one threshold for all matrices, and sparsegpt cuts each by "
                "itself, at a share that it is given; take --allocate kl, uniform or uniform-spared"
            )
        if self.repair and self.criterion == "sparsegpt":
            raise SchemeError(
                "sparsegpt moves what stays by itself, towards weights that are not there "
                "afterwards; leave --repair out, or take --criterion wanda"
            )
        if self.allocate == "global" and self.criterion != "fisher":
            raise SchemeError(
                f"--allocate global compares weights of different matrices, and {self.criterion} "
                "has another unit in each; take --criterion fisher, or --allocate kl"
            )
        if not 0 <= self.corrections <= MOST_CORRECTIONS:
            raise SchemeError(
                f"{self.corrections} corrections were asked for (--correct); expected 0 to "
                f"{MOST_CORRECTIONS}, of which the first three do most"
            )
        if self.corrections and (self.allocate != "global" or self.pattern is not None):
            what = "a pattern" if self.pattern is not None else f"--allocate {self.allocate}"
            raise SchemeError(
                f"--correct scales saliencies by matrix, and {what} does not compare them between "
                "matrices; leave --correct out, or have one threshold for all matrices "
                "(--criterion fisher --allocate global, and a --sparsity)"
            )
        by_levels = ("kl", *MEASURED)
        if self.allocate in by_levels and self.pattern is None and self.sparsity > LEVELS[-1]:
            raise SchemeError(
                f"--allocate {self.allocate} knows no level beyond {LEVELS[-1]}, and a sparsity of "
                f"{self.sparsity} was asked for; take another allocation, or a lower sparsity"
            )
        if self.granularity not in GRANULARITIES:
            raise SchemeError(
                f"unknown granularity {self.granularity!r}; expected one of "
                f"{', '.join(GRANULARITIES)}"
            )
        if self.granularity in ("head", "rows") and self.criterion == "sparsegpt":
            raise SchemeError(
                "sparsegpt cuts a matrix as a whole; leave --granularity out, or take --criterion "
                "wanda with --repair"
            )
        finer = self.granularity in ("head", "rows")
        if (finer and self.allocate == "global") or (
            self.granularity != "component" and self.pattern is not None
        ):
            what = "a pattern" if self.pattern is not None else "--allocate global"
            instead = "give --sparsity" if self.pattern is not None else "take --allocate kl"
            raise SchemeError(
                f"{what} gives nothing a sparsity of its own; leave --granularity "
                f"{self.granularity} out, or {instead}"
            )
        if self.pattern is not None and self.rounds > 1:
            raise SchemeError("a pattern such as 2:4 is cut at once; give --rounds 1")
        if self.criterion == "sparsegpt":
            check_llm_compressor("--criterion sparsegpt", "--criterion wanda")

    @property
    def reads_sequences(self) -> bool:
        """Whether zeros or weights hang on the sequences at all."""
        return (
            self.training.steps > 0
            or self.criterion != "magnitude"
            or self.allocate == "kl"
            or self.repair
        )

    @property
    def saliency(self) -> Criterion:
        """What levels are told by: SparseGPT's are Wanda's, which has no more than its diagonal."""
        return "wanda" if self.criterion == "sparsegpt" else self.criterion

    @property
    def by_rows(self) -> bool:
        """Whether each row loses the same share at a level."""
        return self.saliency == "wanda"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "pattern": list(self.pattern) if self.pattern else None}
