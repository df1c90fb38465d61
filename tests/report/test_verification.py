"""What a verification says in words."""

import io

import pytest
from rich.console import Console

from divergent_tokens.report.verification import notes, verification_markdown, verification_text


def estimate(value):
    return {"value": value, "low": value / 2, "high": value * 2, "level": 0.95, "n_prompts": 4}


METRICS = {"fdt": estimate(20.0), "sdt": estimate(0.1), "kl": estimate(0.01), "dppl": estimate(2.0)}
MEASURED = {
    "prompts": {"source": "builtin", "n_prompts": 4, "prefix": 8, "new_tokens": 6},
    "rounding": METRICS,
    "candidates": {"in memory": METRICS, "reloaded": METRICS},
    "overlap": None,
}


def record(**changes):
    found = {
        "folder": "out",
        "base": {"reference": "base", "dtype": "float32"},
        "plan": {"n_components": 14, "size_bytes": 30, "base_size_bytes": 60},
        "passed": True,
        "checks": [
            {"name": "loads", "passed": True, "found": "by transformers"},
            {"name": "keys", "passed": False, "found": "1 missing: a|b"},
        ],
        "measured": MEASURED,
        "servers": {"vllm": [], "transformers": ["q (int4:asym): it would not", "k: nor this"]},
    }
    return found | changes


def text(found):
    console = Console(file=io.StringIO(), width=100)
    console.print(verification_text(found))
    return console.file.getvalue()


def test_verdict_checks_and_metrics():
    said = text(record())
    assert said.startswith("out is what its plan says (14 components of base, float32)")
    assert "✗" in said
    assert "1 missing: a|b" in said
    assert "on 4 prompts of 8 tokens from builtin, 6 new tokens" in " ".join(said.split())
    assert "10.0%" in said
    assert "The plan takes 50.0% of the bytes" in said
    assert text(record(passed=False)).startswith("out is NOT what its plan says")


def test_markdown_is_the_same():
    said = verification_markdown(record())
    assert "| keys | ✗ | 1 missing: a\\|b |" in said
    assert "| reloaded | 20.0 (10–40) | 10.0% (5.0–20%) |" in said
    assert "- By rule vllm loads such a checkpoint rightly." in said


def test_nothing_was_measured_and_a_plan_without_sizes():
    """A plan.json edited by hand may promise nothing of nothing."""
    plan = {"n_components": 0, "size_bytes": 0, "base_size_bytes": 0}
    said = list(notes(record(plan=plan, measured=None)))
    assert said == [
        "By rule vllm loads such a checkpoint rightly.",
        "By rule transformers would not load 2 components rightly, the first of them q "
        "(int4:asym): it would not",
    ]


@pytest.mark.parametrize(
    ("overlap", "said"),
    [
        (None, ""),
        (0, "None of the prompts measured on was among those that chose the plan."),
        (3, "3 of the 4 prompts measured on chose the plan too, which flatters both"),
    ],
)
def test_prompts_that_chose_the_plan(overlap, said):
    found = " ".join(notes(record(measured=MEASURED | {"overlap": overlap})))
    assert said in found
    assert ("chose the plan" in found) == bool(said)
