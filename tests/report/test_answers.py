import copy

import pytest

from divergent_tokens.report.answers import task_notes, task_sections

SHARE = {"value": 0.15, "low": 0.057, "high": 0.29, "level": 0.95, "n_prompts": 40, "seed": 0}
FLIPS = {"share": SHARE, "to_wrong": 5, "to_right": 1, "changed": 0.2, "p_value": 0.21875}


def task(value, flips=None, **other):
    made = {"task": "everyday", "metric": "acc", "filter": "none", "value": value, "stderr": 0.0734}
    return made | {"higher_is_better": True, "n_documents": 40, "flips": flips} | other


SETTINGS = {"harness": "lm-eval 0.4.13", "num_fewshot": None, "limit": None, "chat": False}
PERPLEXITY = task(12.25, metric="perplexity", stderr=None)
CANDIDATES = [
    {"name": "int4", "tasks": [task(0.6, FLIPS), PERPLEXITY]},
    {"name": "engine", "tasks": None},
]
RECORD = {
    "tasks": {
        "settings": SETTINGS,
        "base": [task(0.7), PERPLEXITY],
        "rounding": [task(0.7, FLIPS | {"share": SHARE | {"value": 0.0}}), PERPLEXITY],
    },
    "candidates": CANDIDATES,
}
LABELS = {"int4": "int4", "engine": "engine"}


def test_a_table_for_each_candidate_that_was_asked():
    ((columns, rows, heading),) = task_sections(RECORD, CANDIDATES, LABELS)
    assert heading == "Tasks: int4"
    assert dict(zip(columns, rows[0], strict=True)) == {
        "task": "everyday",
        "metric": "acc",
        "base": "0.700\n± 0.073",
        "here": "0.600\n± 0.073",
        "flips": "15.0%\n5.7–29%",
        "wrong": "5",
        "right": "1",
        "other": "20.0%",
        "p": "0.22",
    }
    assert rows[1][1:] == ["perplexity", "12.2", "12.2", "–", "–", "–", "–", "–"]


def test_a_filter_stands_beside_its_metric():
    record = copy.deepcopy(RECORD)
    for each in (record["tasks"]["base"], record["candidates"][0]["tasks"]):
        each[0]["filter"] = "strict-match"
    ((_, rows, _),) = task_sections(record, record["candidates"], LABELS)
    assert rows[0][1] == "acc (strict-match)"


@pytest.mark.parametrize("older", [{}, {"tasks": None}])
def test_records_without_tasks_say_nothing_of_them(older):
    record = {"candidates": [{"name": "int4"}]} | older
    assert list(task_sections(record, record["candidates"], LABELS)) == []
    assert list(task_notes(record)) == []


def test_notes_say_what_was_told_and_what_rounding_does():
    first, engine = task_notes(RECORD)
    assert first.startswith("Tasks by lm-eval 0.4.13. ±")
    assert engine.startswith("Another engine's scores have no tasks")
    record = copy.deepcopy(RECORD)
    record["tasks"]["settings"] = SETTINGS | {"num_fewshot": 2, "limit": 0.5, "chat": True}
    record["tasks"]["rounding"][0]["flips"]["share"]["value"] = 0.025
    first, rounding, _ = task_notes(record)
    assert first.startswith(
        "Tasks by lm-eval 0.4.13, 2 examples in the prompt, 50.0% of each task's documents, "
        "in the chat template. "
    )
    assert rounding == "Rounding alone flips up to 2.50% of a task's answers."
