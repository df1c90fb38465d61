"""Answers to an evaluation harness's tasks: how many are right, and how many flip."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.intervals import Estimate, estimate_ratio

if TYPE_CHECKING:
    from divergent_tokens.models import Model


@dataclass(frozen=True)
class Answers:
    """One model's answers to one task, by one metric."""

    task: str
    """A task, or a group of tasks."""
    metric: str
    filter: str
    """What the harness makes of an answer before it is scored; "none" for most tasks."""
    value: float | None
    """As the harness adds it up: mean accuracy, perplexity, whatever the metric says."""
    stderr: float | None
    """The harness's standard error; None where it has none."""
    higher_is_better: bool | None
    documents: tuple[str, ...]
    """What identifies each document and its prompt: two models' answers are paired by it."""
    right: NDArray[np.bool_] | None = None
    """None for a metric that is not 0 or 1 of every document. [document]"""
    choices: tuple[object, ...] | None = None
    """The choice or text that was scored; None where a task has neither. [document]"""

    def to_json(self) -> dict[str, Any]:
        """The part of comparison.json's TASK that one model alone decides."""
        return {
            "task": self.task,
            "metric": self.metric,
            "filter": self.filter,
            "value": self.value,
            "stderr": self.stderr,
            "higher_is_better": self.higher_is_better,
            "n_documents": len(self.documents),
        }


class Tasks(Protocol):
    """What asks a model questions; divergent_tokens.tasks has the one that runs lm-eval."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The harness's version and what it was told, for the record."""

    def __call__(self, model: "Model") -> Sequence[Answers]:
        """A model's answers, in the same order for every model."""


@dataclass(frozen=True)
class Flips:
    """Answers that are right in one of two models and wrong in the other (Dutta et al. 2024)."""

    share: Estimate
    """Of documents; these are what is resampled."""
    to_wrong: int
    """Right in the base, wrong in the candidate."""
    to_right: int
    changed: float | None
    """Share of documents whose answer is another, flipped or not; None where there is no choice or
    text to compare."""
    p_value: float
    """McNemar's exact test: with no difference in accuracy a flip goes either way like a coin."""

    def to_json(self) -> dict[str, Any]:
        """The FLIPS of comparison.json."""
        return vars(self) | {"share": self.share.to_json()}


@dataclass(frozen=True)
class TaskResult:
    """A model's answers, held against the base's."""

    answers: Answers
    flips: Flips | None
    """None where the metric is not 0 or 1 of every document."""

    def to_json(self) -> dict[str, Any]:
        """The TASK of comparison.json."""
        flips = None if self.flips is None else self.flips.to_json()
        return self.answers.to_json() | {"flips": flips}


def compare_answers(
    base: Sequence[Answers], candidate: Sequence[Answers], *, level: float = 0.95, seed: int = 0
) -> tuple[TaskResult, ...]:
    """The candidate's answers with their flips, in the order given.

    Raises DivergentTokensError where the two were not asked the same.
    """
    return tuple(
        TaskResult(theirs, find_flips(ours, theirs, level=level, seed=seed))
        for ours, theirs in zip(base, candidate, strict=True)
    )


def find_flips(
    base: Answers, candidate: Answers, *, level: float = 0.95, seed: int = 0
) -> Flips | None:
    """What became of the base's right and wrong answers; None where they are neither.

    Base right, wrong, right, right and candidate right, right, wrong, right: one flip to wrong, one
    to right, a share of ½.
    """
    if base.documents != candidate.documents:
        raise DivergentTokensError(
            f"the base and a candidate were not asked the same in the task {base.task}; expected "
            "the same documents and prompts: do their tokenizers hold the same chat template?"
        )
    if base.right is None or candidate.right is None or not len(base.documents):
        return None
    flipped = base.right != candidate.right
    to_wrong = int((flipped & base.right).sum())
    to_right = int((flipped & candidate.right).sum())
    return Flips(
        share=estimate_ratio(flipped, np.ones(len(flipped)), unit="share", level=level, seed=seed),
        to_wrong=to_wrong,
        to_right=to_right,
        changed=_changed(base.choices, candidate.choices),
        p_value=mcnemar_p_value(to_wrong, to_right),
    )


def mcnemar_p_value(to_wrong: int, to_right: int) -> float:
    """Two-sided, exact: how often would as many coins fall as unevenly? 1 without any flip."""
    n = to_wrong + to_right
    return float(stats.binomtest(to_right, n, 0.5).pvalue) if n else 1.0


def _changed(ours: tuple[object, ...] | None, theirs: tuple[object, ...] | None) -> float | None:
    if ours is None or theirs is None:
        return None
    return sum(a != b for a, b in zip(ours, theirs, strict=True)) / len(ours)
