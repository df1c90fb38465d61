"""Small tasks of lm-eval in a folder, of each kind that it has, with their data beside them."""

import json
from pathlib import Path

import yaml

import tiny

EXAMPLE = Path(__file__).parents[1] / "examples" / "tasks"
WORDS = [word for sentence in tiny.SENTENCES[:2] for word in sentence.split()]
CHOICES = [
    {
        "question": " ".join(WORDS[i : i + 5]),
        "choices": [WORDS[i + 5], WORDS[i - 7], f"{WORDS[i]} and {WORDS[i + 2]}"],
        "answer": i % 3,
    }
    for i in range(12)
]
TEXTS = [{"text": " ".join(WORDS[i : i + 4]), "target": f" {WORDS[i + 4]}"} for i in range(10)]


def write(folder: Path, name: str, rows: list, **definition) -> Path:
    """The definition's file; what is said of the data is the same in all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(common | definition, sort_keys=False))
    return file


def metrics(*names: str) -> dict:
    return {
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names
        ]
    }


def multiple_choice(folder: Path, name: str = "choices", rows: list = CHOICES, **other) -> Path:
    return write(
        folder,
        name,
        rows,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        **metrics("acc", "acc_norm"),
        **other,
    )


def loglikelihood(folder: Path, name: str = "last_word", rows: list = TEXTS) -> Path:
    """As lambada is: the last word's perplexity, and whether it would have been written."""
    return write(
        folder,
        name,
        rows,
        output_type="loglikelihood",
        doc_to_text="{{text}}",
        doc_to_target="{{target}}",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    )


def generate_until(folder: Path, rows: list, name: str = "writes", **other) -> Path:
    return write(
        folder,
        name,
        rows,
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{target}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 6},
        **metrics("exact_match"),
        **other,
    )


def group(folder: Path, name: str, *tasks: str) -> Path:
    file = folder / f"{name}.yaml"
    definition = {
        "group": name,
        "task": list(tasks),
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
    }
    file.write_text(yaml.safe_dump(definition))
    return file
