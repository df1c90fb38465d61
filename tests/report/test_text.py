import copy
import io
import re

import pytest
from rich.console import Console

from divergent_tokens.report.text import (
    comparison_markdown,
    comparison_text,
    indistinguishable,
    notes,
    ordered,
)

LENGTH = 64.0
HOSTILE = "[bold]x[/bold] \x1b[31mred\x1b[0m \x07| `code` <b>*_\r\x9b2J\u202e\nnext [link=file:///]"


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "level": 0.95, "n_prompts": 20, "seed": 0}


def metrics(fdt=30.0, sdt=0.1, kl=0.02, dppl=2.5, **changes):
    whole = {
        "fdt": estimate(fdt, fdt * 0.8, min(fdt * 1.2, LENGTH)),
        "median_fdt": estimate(fdt, fdt * 0.7, None),
        "sdt": estimate(sdt, sdt * 0.7, sdt * 1.3),
        "dppl": dppl and estimate(dppl, dppl * 0.95, dppl * 1.1),
        "base_dppl": 2.0,
        "ppl": None,
        "kl": None if kl is None else estimate(kl, kl * 0.9, kl * 1.15),
        "kl_p99": kl,
        "acceptance": None if kl is None else estimate(0.97, 0.96, 0.98),
        "near_ties": 0.1,
        "identical": 0.25,
        "n_tokens": 1280,
        "mean_length": LENGTH,
        "survival": [[0, 0.9, 0.8, 1.0], [30, 0.4, 0.2, 0.6]],
        "sdt_by_quarter": [sdt] * 4,
        "repeated": 0.05,
        "by_domain": {},
        "by_language": {},
    }
    return whole | changes


def candidate(name, *, examples=(), **values):
    return {"name": name, "metrics": metrics(**values), "rows": [], "examples": list(examples)}


def example(text="words", margin=0.5):
    texts = ("prompt_text", "shared_text", "base_text", "candidate_text")
    return dict.fromkeys(texts, text) | {"prompt": 3, "fdt": 7, "margin": margin}


def pair(a, b):
    difference = estimate(5.0, -2.5, 12.0)
    return {"a": a, "b": b, "fdt_difference": difference, "p_value": 0.04, "p_holm": 0.08}


def record(*candidates, reference="org/model", pairs=(), groups=None, **prompts):
    made = {
        "base": {"reference": reference, "dtype": "float32", "device": "cpu"},
        "prompts": {
            "source": "builtin",
            "n_prompts": 20,
            "left_out": 0,
            "prefix": 32,
            "new_tokens": 64,
            "texts": [f"text {i}" for i in range(20)],
        }
        | prompts,
        "noise_floor": metrics(fdt=LENGTH, sdt=0.0, kl=0.0, identical=1.0, near_ties=None),
        "rounding": metrics(fdt=60.0, sdt=0.001, kl=1e-6),
        "candidates": list(candidates),
        "pairs": list(pairs),
    }
    for name, members in (groups or {}).items():
        for each in (made["noise_floor"], *(c["metrics"] for c in candidates)):
            each[name] = {member: metrics() for member in members}
    return made


def shown(made, width=80):
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=False)
    console.print(comparison_text(made, width=width))
    return stream.getvalue()


def first_cells(text):
    """What stands first in the main table's rows."""
    table = text.split("\n\n")[1].splitlines()[1:]
    return [line.split("  ")[0].strip() for line in table if not line.startswith(" ")]


THREE = (
    candidate("int4", fdt=12.0, kl=0.2),
    candidate("int8", fdt=50.0, kl=0.002),
    candidate("prune", fdt=12.0, kl=0.1),
)


def test_floors_first_then_the_best():
    text = shown(record(*THREE))
    assert first_cells(text) == ["noise floor", "rounding", "int8", "prune", "int4"]
    lines = text.splitlines()
    (row,) = [i for i, line in enumerate(lines) if line.startswith("int8")]
    assert lines[row].split()[1:5] == ["50.0", "10.0%", "0.00200", "2.50"]
    assert lines[row + 1].split()[:4] == ["40–60", "7.0–13%", "0.0018–0.0023", "2.4–2.8"]


def test_ties_in_fdt_go_by_kl_and_a_missing_kl_comes_last():
    unknown = candidate("engine", fdt=12.0, kl=None, sdt=0.01)
    assert [c["name"] for c in ordered(record(unknown, *THREE))] == [
        "int8",
        "prune",
        "int4",
        "engine",
    ]


def test_the_title_says_what_was_compared_on_what():
    assert shown(record(*THREE)).startswith(
        "org/model (float32, cpu) on 20 prompts of 32 tokens from builtin, 64 new tokens\n"
    )
    assert "on 20 prompts of whole chat turns from self" in " ".join(
        shown(record(*THREE, prefix=None, source="self")).split()
    )


def test_what_lies_under_three_times_rounding_is_marked():
    mild, strong = candidate("mild", kl=3e-6), candidate("strong", kl=3.1e-6)
    text = shown(record(mild, strong))
    assert re.search(r"^mild ≈ ", text, re.MULTILINE)
    assert re.search(r"^strong  ", text, re.MULTILINE)
    assert "≈ mild cannot be told from rounding" in text
    assert text.count("cannot be told") == 1
    # Without a KL, by SDT.
    engine = metrics(kl=None, sdt=0.003)
    assert indistinguishable(engine, metrics(kl=1e-6, sdt=0.001))
    assert not indistinguishable(engine, metrics(kl=1e-6, sdt=0.0009))


def test_missing_values_are_dashes():
    text = shown(record(candidate("engine", kl=None, dppl=None)), width=120)
    (line,) = [line for line in text.splitlines() if line.startswith("engine")]
    assert line.split()[1:5] == ["30.0", "10.0%", "–", "–"]
    assert line.split()[6] == "–"
    lines = comparison_markdown(record(candidate("engine", kl=None))).splitlines()
    (line,) = [line for line in lines if line.startswith("| engine")]
    assert line.split(" | ")[3] == "–"


def test_few_and_equal_prompts_are_said():
    assert "prompts were asked for" not in " ".join(notes(record(candidate("int8"))))
    made = record(candidate("int8"), texts=["one", "two", "one", "one"], wanted=300)
    text = " ".join(notes(made))
    assert "300 prompts were asked for; the source has 20 that fit" in text
    assert "2 of the prompts are the same as another one" in text


def test_perplexity_is_shown_where_it_was_measured():
    made = record(candidate("int8"), candidate("engine"))
    ppl = {"conventional": estimate(20.0, 18.0, 22.5), "context_aware": estimate(15.0, 14.0, 16.5)}
    for m in (made["noise_floor"], made["candidates"][0]["metrics"]):
        m["ppl"] = ppl
    for text in (shown(made), comparison_markdown(made)):
        assert "Perplexity of the text" in text
        assert "20.0  18–22" in text
        assert "15.0  14–16" in text
    assert "Perplexity" not in shown(record(candidate("int8")))


def test_notes_say_what_a_reader_must_know():
    made = record(candidate("int4:g64", near_ties=0.5), reference="demo:smollm2", left_out=3)
    made["noise_floor"]["repeated"] = 0.42
    text = " ".join(notes(made))
    assert "at most 64.0 here" in text
    assert "95% intervals" in text
    assert "50.0% of the first divergences of int4:g64 are near ties (margin under 0.1)" in text
    assert "42.0% of the base's tokens lie in repeated passages" in text
    assert "not fitting: 3 of the documents read (too short for the prefix)" in text
    assert "stored in 4 bits" in text
    assert "longer than the positions" in " ".join(notes(made | record(left_out=1, prefix=None)))
    made["noise_floor"]["fdt"]["level"] = 0.999
    assert "99.9% intervals" in " ".join(notes(made))
    assert len(list(notes(record(candidate("int8"))))) == 1


def test_breakdowns_where_there_is_more_than_one_group():
    groups = {"by_domain": ["code", "news"], "by_language": ["en"]}
    text = shown(record(*THREE, groups=groups))
    assert "SDT by domain" in text
    assert "SDT by language" not in text
    assert re.search(r"^code +20 +10\.0% +10\.0% +10\.0%", text, re.MULTILINE)


def test_pairs_with_their_interval_and_p_values():
    text = shown(record(*THREE, pairs=[pair("int8", "int4")]))
    assert re.search(r"^int8 − int4 +5\.00  -2\.5 to 12 +0\.040 +0\.080", text, re.MULTILINE)


def test_examples_say_whether_it_was_a_near_tie():
    examples = [example("some words", 0.05), example("two\nlines", 2.0)]
    text = shown(record(candidate("int8", examples=examples)))
    assert "Where int8 parts from the base" in text
    joined = " ".join(text.split())
    assert "after 7 tokens; the base's margin there is 0.0500 logits: a near tie" in joined
    assert "2.00 logits: no near tie" in joined
    assert "two⏎lines" in text


# --- names and texts that somebody else wrote ---


def hostile_record():
    groups = {"by_domain": [HOSTILE, "news"]}
    named = candidate(HOSTILE, kl=1e-7, near_ties=0.9, examples=[example(HOSTILE)])
    pairs = [pair(HOSTILE, "int8")]
    made = record(named, candidate("int8"), reference=HOSTILE, source=HOSTILE, groups=groups)
    return made | {"pairs": pairs}


def commands(text):
    """Characters that a terminal obeys, beside the end of a line."""
    return {c for c in text if not c.isprintable() and c != "\n"}


def test_hostile_texts_command_no_terminal_and_no_markup():
    made = hostile_record()
    before = copy.deepcopy(made)
    for width in (30, 80, 200):
        text = shown(made, width)
        assert not commands(text)
        assert max(map(len, text.splitlines())) <= width
    assert "[bold]x[/bold]" in text
    assert made == before


def test_hostile_texts_break_no_markdown():
    text = comparison_markdown(hostile_record())
    assert not commands(text)
    outside = re.sub(r"^~~~text\n.*?\n~~~$", "", text, flags=re.MULTILINE | re.DOTALL)
    bare = re.sub(r"\\.", "", outside)
    assert not re.search(r"[`<>~\[\]]|\*(?!\*)(?<!\*\*)|[^\W_]_", bare.replace("**", ""))
    tables = [line for line in outside.splitlines() if line.startswith("|")]
    blocks = {}
    for line in tables:
        blocks.setdefault(line.count("|") - line.count("\\|"), []).append(line)
    assert set(blocks) == {9, 5}
    assert text.count("~~~") == 2


def test_a_text_cannot_end_its_block():
    text = comparison_markdown(record(candidate("int8", examples=[example("~~~\n~~~text\n# x")])))
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("~~~")] == ["~~~text", "~~~"]
    assert not [line for line in lines if line.startswith("#")]


# --- widths ---

PATH = "/home/somebody/models/compressed/llama-2-7b-gptq-4bit-g128/checkpoint-1000"
WIDE = [candidate("meta-llama/Llama-3.1-8B-Instruct"), candidate(PATH), *THREE]


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal(width):
    groups = {"by_domain": ["code", "encyclopedia"], "by_language": ["en", "de"]}
    pairs = [pair(PATH, "int8"), pair("int8", "meta-llama/Llama-3.1-8B-Instruct")]
    many = [candidate(f"int4:g{2**i}:asym") for i in range(9)]
    for candidates in (WIDE, [*WIDE, *many]):
        text = shown(record(*candidates, groups=groups, pairs=pairs), width)
        assert max(map(len, text.splitlines())) <= width
        header = text.split("\n\n")[1].splitlines()[0].split()
        assert header[:2] == ["FDT", "SDT"][: len(header)]


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (40, "FDT SDT"),
        (80, "FDT SDT KL DPPL survival"),
        (120, "FDT SDT KL DPPL survival acceptance identical"),
    ],
)
def test_columns_are_left_out_from_the_right(width, columns):
    assert shown(record(*THREE), width).split("\n\n")[1].splitlines()[0].split() == columns.split()


def test_numbers_are_never_broken():
    made = record(candidate("a-long-name-without-any-slash", kl=2.8e-12), *THREE)
    for width in range(30, 130):
        text = shown(made, width)
        assert "40–60" in text, width
        assert "7.0–13%" in text or width < 40
        assert "2.5e-12–3.2e-12" in text or width < 60


def test_long_paths_are_shortened_to_their_end_and_take_two_lines():
    text = shown(record(candidate(PATH), *THREE))
    main = text.split("\n\n")[1]
    assert "/home/somebody" not in text
    assert "checkpoint-1000" in main
    assert len(main.splitlines()) == 1 + 2 * (2 + 4)
    assert PATH in comparison_markdown(record(candidate(PATH))).replace("\\", "")


def test_names_that_would_be_shortened_alike_stay_whole():
    twins = [candidate(f"/data/{i}/a-model-with-a-name/and-a-checkpoint-10") for i in "ab"]
    text = "".join(shown(record(*twins)).split())
    assert "/data/a/" in text
    assert "/data/b/" in text


def test_many_candidates_make_several_breakdowns():
    many = [candidate(f"int4:g{2**i}:asym") for i in range(9)]
    text = shown(record(*many, groups={"by_domain": ["code", "news"]}))
    assert text.count("SDT by domain") == 3
    for each in many:
        assert each["name"] in text
