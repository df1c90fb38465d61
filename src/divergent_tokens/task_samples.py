"""What lm-eval logged of every document, as Answers."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from divergent_tokens.measure.answers import Answers

_LENGTHS: dict[str, Callable[[str], int]] = {
    "acc": lambda _text: 1,
    "acc_norm": len,
    "acc_bytes": lambda text: len(text.encode()),
}
"""What a choice's log-likelihood is divided by before the largest is taken, by metric."""


def answers_of(results: Mapping[str, Any], loaded: Mapping[str, Any]) -> tuple[Answers, ...]:
    """Each task's Answers by each of its metrics, then each group's, in the harness's order."""
    found = [
        answers
        for name, task in loaded["tasks"].items()
        for answers in _of_task(name, task, results)
    ]
    by_task = {(a.task, a.metric, a.filter): a for a in found}
    for name, group in loaded["groups"].items():
        found += _of_group(name, group, results, by_task)
    return tuple(found)


def _of_task(name: str, task: Any, results: Mapping[str, Any]) -> Iterator[Answers]:
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    for metric, filter, value, stderr in _metrics(results["results"][name]):
        mine = [s for s in samples if s["filter"] == filter and metric in s]
        scored = [s[metric] for s in mine]
        higher = results["higher_is_better"][name].get(metric)
        best = 0 if higher is False else 1
        yield Answers(
            task=name,
            metric=metric,
            filter=filter,
            value=value,
            stderr=stderr,
            higher_is_better=higher,
            documents=tuple(
                f"{name} {s['doc_id']} {s['doc_hash']} {s['prompt_hash']}" for s in mine
            ),
            right=np.array([s == best for s in scored]) if all(map(_is_binary, scored)) else None,
            choices=_choices(task, metric, mine),
        )


def _of_group(
    name: str,
    group: Any,
    results: Mapping[str, Any],
    by_task: Mapping[tuple[str, str, str], Answers],
) -> Iterator[Answers]:
    """A group's value is the harness's; its documents are those of all its tasks."""
    for metric, filter, value, stderr in _metrics(results["results"][name]):
        keys = [(task.task_name, metric, filter) for task in group.get_all_tasks()]
        parts = [by_task[key] for key in keys if key in by_task]
        rights = [part.right for part in parts if part.right is not None]
        choices = [part.choices for part in parts if part.choices is not None]
        yield Answers(
            task=name,
            metric=metric,
            filter=filter,
            value=value,
            stderr=stderr,
            higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
            documents=tuple(document for part in parts for document in part.documents),
            right=np.concatenate(rights) if parts and len(rights) == len(parts) else None,
            choices=(
                tuple(choice for part in choices for choice in part)
                if parts and len(choices) == len(parts)
                else None
            ),
        )


def _metrics(
    found: Mapping[str, Any],
) -> Iterator[tuple[str, str, float | None, float | None]]:
    """Metric, filter, value and standard error of keys such as `acc,none`."""
    for key, value in found.items():
        metric, comma, filter = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filter, _number(value), _number(found.get(f"{metric}_stderr,{filter}"))


def _number(value: Any) -> float | None:
    """None for the harness's "N/A", and for what is not finite."""
    if isinstance(value, int | float | np.number) and math.isfinite(value):
        return float(value)
    return None


def _is_binary(score: Any) -> bool:
    return isinstance(score, bool | int | float | np.bool_ | np.number) and score in (0, 1)


def _choices(task: Any, metric: str, samples: list[Mapping[str, Any]]) -> tuple[object, ...] | None:
    """The index of the choice taken, or the text written; None where a task has neither."""
    kind = task.OUTPUT_TYPE
    if kind == "generate_until":
        return tuple(str(sample["filtered_resps"][0]) for sample in samples)
    if kind != "multiple_choice" or metric not in _LENGTHS or task.config.process_results:
        return None
    return tuple(_taken(task, metric, sample) for sample in samples)


def _taken(task: Any, metric: str, sample: Mapping[str, Any]) -> int:
    """As the harness takes it: the first of the largest log-likelihoods."""
    texts = task.doc_to_choice(sample["doc"])
    nats = [response[0] for response in sample["filtered_resps"]][: len(texts)]
    return int(np.argmax([n / _LENGTHS[metric](t) for n, t in zip(nats, texts, strict=True)]))
