"""Every part of what a search prints, from records that no search made."""

import copy

import pytest
from rich.console import Console

from divergent_tokens.report.search import notes, search_markdown, search_text, title


def estimate(value, low, high):
    return {
        "value": value,
        "low": low,
        "high": high,
        "level": 0.95,
        "n_prompts": 128,
        "seed": 0,
    }


PREDICTED = {
    "kl": 0.0123,
    "kl_se": 0.0011,
    "kl_joint": 0.0125,
    "cross_fitted": True,
    "optimistic_kl": 0.011,
    "sdt": estimate(0.031, 0.02, 0.04),
    "fdt": estimate(41.2, 35.0, 50.0),
    "survival": [],
    "reason": None,
}
UNKNOWN = dict.fromkeys(PREDICTED) | {
    "cross_fitted": True,
    "survival": [],
    "reason": "the KL is above 0.3: sums fall short there",
}
LAW = {
    "sdt": {"value": 2.31, "spread": 0.08, "n_measured": 210},
    "fdt": {"value": 2.4, "spread": 0.12, "n_measured": 200},
}
UNFITTED = {name: {"value": 2.4, "spread": 0.3, "n_measured": 0} for name in ("sdt", "fdt")}
MEASURED = {
    "step": "measured",
    "prompts": {
        "source": "held.txt",
        "n_prompts": 256,
        "prefix": 64,
        "new_tokens": 128,
        "skipped": 0,
    },
    "overlap": 0,
    "rounding_kl": 1e-6,
    "metrics": {
        "kl": estimate(0.0131, 0.012, 0.0142),
        "sdt": estimate(0.033, 0.029, 0.037),
        "fdt": estimate(39.9, 33.0, 47.0),
    },
}


def offer(unit="budget", value=0.6, predicted=PREDICTED, schemes=None):
    return {
        "budget": {"unit": unit, "value": value},
        "n_components": 120,
        "schemes": schemes or {"int8": 80, "int4:g64": 40},
        "size_bytes": 1,
        "share": 0.598,
        "bits": 9.57,
        "gap": 0.0,
        "predicted": predicted,
    }


def record(**changes):
    around = changes.pop("around", [offer(value=0.5, predicted=UNKNOWN), offer()])
    return {
        "base": {"reference": "demo:smollm2", "fingerprint": "ab" * 32},
        "rank_by": "kl",
        "budget": {"unit": "budget", "value": 0.6},
        "gap": 0.0,
        "law": LAW,
        "picks": {"a": 1.0, "b": 0.9},
        "n_below_rounding": 0,
        "around": around,
        "measured": None,
        "curve": None,
        "refit": None,
        **changes,
    }


def shown(found, width=80):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(search_text(found))
    return captured.get()


def said(found):
    return " ".join(notes(found))


def test_a_plan_and_its_neighbours():
    text = shown(record())
    assert text.startswith("demo:smollm2: 80 x int8, 40 x int4:g64; 59.8% of the bytes, 9.57 bits")
    rows = text.split("\n\n")[1].splitlines()
    assert rows[0] == "What may be expected on other prompts"
    assert rows[1].split() == ["budget", "changed", "bytes", "bits", "KL", "SDT", "FDT"]
    assert rows[2].split() == ["50.0%", "120", "59.8%", "9.57", ">", "0.3", "–", "–"]
    assert rows[3].split() == ["▸", "60.0%", "120", "59.8%", "9.57", "0.0123", "3.10%", "41.2"]
    assert rows[4].split() == ["±", "0.0011", "2.0–4.0%", "35–50"]


@pytest.mark.parametrize(
    ("unit", "value", "words"),
    [("count", 84, "▸ 84 components"), ("bits", 5.5, "▸ 5.5 bits"), ("budget", 0.6, "▸ 60.0%")],
)
def test_budgets_in_their_units(unit, value, words):
    found = record(around=[offer(unit, value)], budget={"unit": unit, "value": value})
    assert words in shown(found)


def test_what_the_numbers_rest_on():
    words = said(record())
    assert "σ/√KL = 2.31 for SDT (spread 8.0%, 210 measured)" in words
    assert "Above a KL of 0.3" in words
    assert "KL is cross-fitted" in words
    assert "All 2 decisions are made alike by 75% or more of resamples." in words
    assert "Above" not in said(record(around=[offer()]))
    assert "not fitted on this base" in said(record(law=UNFITTED))
    summed = {**PREDICTED, "cross_fitted": False}
    assert "summed over the prompts that the sweep used" in said(
        record(around=[offer(predicted=summed)])
    )


def test_unsure_picks_are_named_the_least_sure_first():
    picks = {"a": 0.7, "b": 0.5, "c": 1.0, "d": 0.6, "e": 0.74}
    words = said(record(picks=picks))
    assert "4 of 5 decisions" in words
    assert "b (50%), d (60%), a (70%) and 1 more" in words
    assert "decisions" not in said(record(picks={}))


def test_a_gap_and_rounding_are_said():
    assert "not proven" not in said(record())
    assert "by more than 0.00012" in said(record(gap=0.00012))
    assert "7 KLs were measured below three times the rounding" in said(record(n_below_rounding=7))


def test_the_measured_plan_stands_beside_the_prediction():
    found = record(measured=MEASURED, refit=LAW)
    text = shown(found)
    start = text.index("The plan, predicted and measured on 256 prompts of 64 tokens from held.txt")
    part = text[start:].split("\n\n")[0].splitlines()
    assert part[-6].split() == ["KL", "0.0123", "0.0131"]
    assert part[-2].split() == ["FDT", "41.2", "39.9"]
    assert part[-1].split() == ["35–50", "33–47"]
    words = said(found)
    assert "None of the prompts measured on" in words
    assert "With these measurements the flip law has σ/√KL = 2.31" in words
    overlapping = copy.deepcopy(MEASURED) | {"overlap": 12}
    assert "12 of the 256 prompts measured on chose" in said(record(measured=overlapping))


def test_a_curve_alone():
    points = [
        {**offer("count", n), "rank_by": order, "n_components": n, "measured": MEASURED}
        for order in ("kl", "weight-error")
        for n in (42, 84)
    ]
    found = record(around=[], budget=None, picks={}, curve=points)
    assert title(found) == "demo:smollm2: no plan was asked for"
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if line.startswith("weight-error")]
    assert rows[1][:3] == ["weight-error", "84", "59.8%"]
    assert rows[1][3:6] == ["0.0123", "→", "0.0131"]
    assert "cross-fitted" not in said(found)


def test_whole_chat_turns():
    chat = copy.deepcopy(MEASURED)
    chat["prompts"]["prefix"] = None
    assert "256 prompts of whole chat turns" in " ".join(shown(record(measured=chat)).split())


def test_nothing_is_changed_by_an_empty_plan():
    empty = {**offer(), "schemes": {}}
    assert "demo:smollm2: nothing;" in title(record(around=[empty]))


def test_markdown():
    text = search_markdown(record(measured=MEASURED))
    assert "| budget | changed | bytes | bits | KL | SDT | FDT |" in text
    assert r"| 0.0123 (± 0.0011) | 3.10% (2.0–4.0%) | 41.2 (35–50) |" in text
    assert "|  | predicted | measured |" in text
    assert "- FDT and SDT by the flip law" in text


def test_names_cannot_command_the_terminal():
    found = record(picks={"evil\x1b[31m\nname": 0.1})
    for text in (shown(found), search_markdown(found)):
        assert "\x1b[31m" not in text
        assert "evil" in text
