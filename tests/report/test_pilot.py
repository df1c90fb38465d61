"""What a trial says in words."""

import io
import subprocess

import pytest
from rich.console import Console

from divergent_tokens.report.pilot import next_command, notes, pilot_markdown, pilot_text


def estimate(value):
    return {"value": value, "low": value / 2, "high": value * 2, "level": 0.95, "n_prompts": 32}


def needed(n, low=None, high=None):
    return {"n_prompts": n, "low": low, "high": high}


def candidate(name, kl=0.01, censored=0.25, needs=None):
    found = {"fdt": needed(30.2, 20.0, 41.0), "kl": needed(301.0, 140.0, 1234.0)} | (needs or {})
    return {
        "name": name,
        "fdt": estimate(20.0),
        "sdt": estimate(0.1),
        "kl": estimate(kl),
        "needed": found,
        "censored": censored,
        "near_ties": 0.5,
    }


def contrast(metric, **changes):
    found = {
        "metric": metric,
        "difference": estimate(3.0),
        "paired": needed(12.0, 7.0, 55.0),
        "unpaired": 120.0,
    }
    return found | changes


def cell(new_tokens=64, n_prompts=310, candidates=None, pairs=None, **changes):
    both = [candidate("int8"), candidate("int4:g64")] if candidates is None else candidates
    pair = {
        "a": "int8",
        "b": "int4:g64",
        "contrasts": [
            contrast("fdt", paired=needed(40.0, 9.0, None)),
            contrast("sdt"),
            contrast("kl", paired=needed(None), unpaired=None),
        ],
    }
    tokens = n_prompts and {"completions": 39680, "each_pass": 39680, "all": 198400}
    found = {
        "prefix": 64,
        "new_tokens": new_tokens,
        "sequence_length": 128.0,
        "repeated": 0.1,
        "rounding_kl": 1e-6,
        "candidates": both,
        "pairs": [pair] if pairs is None else pairs,
        "n_prompts": n_prompts,
        "n_prompts_high": n_prompts and 1300,
        "spoiled_by": [],
        "forward_tokens": tokens,
    }
    return found | changes


COMMAND = ["dtm", "compare", "demo:smollm2", "--scheme", "int8", "--n-prompts", "310"]


def record(cells=None, trial=None, **changes):
    found = {
        "level": 0.95,
        "base": {"reference": "demo:smollm2", "dtype": "float32", "device": "cpu"},
        "trial": {
            "source": "builtin",
            "n_prompts": 32,
            "left_out": 0,
            "wanted": None,
            "available": 203,
            "prefix": 64,
        }
        | (trial or {}),
        "widths": [
            {"metric": "fdt", "size": 10.0, "relative": False},
            {"metric": "kl", "size": 0.25, "relative": True},
        ],
        "cells": cells or [cell()],
        "recommended": {"prefix": 64, "new_tokens": 64, "n_prompts": 310, "command": COMMAND},
    }
    return found | changes


def text(found, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(pilot_text(found))
    return console.file.getvalue()


def said(found):
    return " ".join(notes(found))


def test_title_numbers_with_their_ranges_and_the_next_command():
    lines = text(record()).splitlines()
    assert lines[0].startswith("demo:smollm2 (float32, cpu) and int8, int4:g64: a trial of 32 prom")
    rows = [line.split() for line in lines]
    at = rows.index(["prefix", "new", "fdt=10", "kl=25%", "prompts", "censored", "loops", "tokens"])
    assert rows[at + 1] == ["▸", "64", "64", "31", "310", "310", "25.0%", "10.0%", "198k"]
    assert rows[at + 2] == ["20–41", "140–1,300"]
    assert lines[-1] == "dtm compare demo:smollm2 --scheme int8 --n-prompts 310"


def test_pairs_on_the_same_prompts_beside_prompts_of_their_own():
    rows = [line.split() for line in text(record()).splitlines()]
    at = rows.index(["prefix", "new", "by", "FDT", "by", "SDT", "by", "KL"])
    assert rows[at + 1] == ["64", "64", "40", "(120)", "12", "(120)", "–"]
    assert rows[at + 2] == ["9–?", "7–55"]


def test_the_candidate_that_needs_most_is_shown_and_one_that_cannot_tell_before_all():
    more = candidate("int4:g64", needs={"fdt": needed(500.0, 400.0, 700.0), "kl": needed(None)})
    shown = text(record([cell(candidates=[candidate("int8"), more])]))
    assert "400–700" in shown
    assert "140–1,300" not in shown


def test_markdown_has_the_same_and_the_command_in_a_block():
    page = pilot_markdown(record())
    assert "| ▸ 64 | 64 | 31 (20–41) | 310 (140–1,300) | 310 | 25.0% | 10.0% | 198k |" in page
    assert page.endswith(f"~~~\n{' '.join(COMMAND)}\n~~~\n")
    assert "~~~" not in pilot_markdown(record(recommended=None))


def test_long_commands_go_on_over_lines_that_a_shell_joins():
    words = ["dtm", "compare", "base with blanks", *["--scheme", "int4:g64"] * 12, "it's"]
    command = next_command(record(recommended=record()["recommended"] | {"command": words}))
    lines = command.split("\n")
    assert len(lines) > 2
    assert max(map(len, lines)) <= 80
    assert all(line.endswith(" \\") for line in lines[:-1])
    echo = command.replace("dtm", "printf '%s\\n' dtm", 1)
    read = subprocess.run(["sh", "-c", echo], capture_output=True, text=True, check=True)
    assert read.stdout.splitlines() == words


def test_the_recommendation_says_its_doubt():
    assert (
        "The cheapest row that nothing spoils: prefix 64, 64 new tokens, 310 prompts (up to "
        in (said(record()))
    )
    sure = cell(n_prompts_high=310)
    assert "310 prompts." in said(record([sure]))
    turns = cell(prefix=None)
    chosen = record()["recommended"] | {"prefix": None}
    assert "spoils: 64 new tokens, 310 prompts" in said(record([turns], recommended=chosen))


def test_what_spoils_rows_is_explained():
    spoilt = cell(spoiled_by=["loops"], repeated=0.5)
    found = record([spoilt, cell(128, spoiled_by=["loops", "censored"])])
    words = said(found)
    assert "No row is unspoiled; the cheapest of the least spoiled (loops)" in words
    assert "✗ loops, 2 of 2 rows" in words
    assert "✗ censored, 1 of 2 rows: more than half of the prompts never part" in words
    assert "50.0% ✗" in text(found)
    assert "✗" not in said(record())


def test_nothing_known():
    empty = cell(n_prompts=None, candidates=[candidate("int8", needs={"fdt": needed(None)})])
    words = said(record([empty], recommended=None))
    assert "No number of prompts can be given" in words
    assert text(record([empty], recommended=None)).splitlines()[-1].strip() != ""


def test_metrics_that_are_others_at_another_length():
    short = cell(32, candidates=[candidate("int8", kl=0.02)], pairs=[])
    long = cell(64, candidates=[candidate("int8", kl=0.01)], pairs=[])
    assert "int8 has KL 0.0100 to 0.0200 from row to row" in said(record([short, long]))
    assert "another quantity" not in said(record())
    assert "Telling apart" not in said(record([short, long]))


def test_under_the_rounding_floor():
    low = cell(rounding_kl=0.005)
    assert "≈ int8 cannot be told from rounding, with however many prompts" in said(record([low]))
    assert "≈" not in said(record())


@pytest.mark.parametrize(
    ("trial", "expected"),
    [
        ({"left_out": 3}, "Left out as too short for the longest prefix, 64 tokens: 3 of the doc"),
        ({"wanted": 40}, "40 prompts were asked for; the source has 32 that fit."),
        ({"available": 203}, "builtin has 203 prompts of the longest prefix: for more use"),
    ],
)
def test_the_prompts(trial, expected):
    assert expected in said(record(trial=trial))


def test_enough_prompts_and_unknown_sources_say_nothing_of_more():
    assert "for more use" not in said(record(trial={"available": 400}))
    assert "for more use" not in said(record(trial={"available": None}))


def test_what_names_hold_does_nothing():
    odd = candidate("\x1b[31mred|`name`\n# x")
    found = record([cell(candidates=[odd], pairs=[])])
    assert "\x1b" not in text(found)
    assert "\\|\\`name\\`⏎\\# x" in pilot_markdown(found)
