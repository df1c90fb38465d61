"""`dtm pilot`."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import runs
import tiny

DTM = Path(sys.executable).with_name("dtm")
SMALL = ["--n-prompts", 8, "--prefix", 4, "--prefix", 8, "--new-tokens", 4, "--new-tokens", 10]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("pilot")
    for name, model in (("base", runs.model()), ("noisy", runs.noisy(runs.model(), 0.1))):
        model.network.save_pretrained(place / name)
        model.tokenizer.save_pretrained(place / name)
    lines = [f"{sentence} {i}" for i, sentence in enumerate(tiny.SENTENCES * 8)]
    (place / "prompts.txt").write_text("\n".join(["short", *lines]))
    return place


@pytest.fixture
def pilot(dtm, place):
    def run(*arguments):
        common = ["--prompts", place / "prompts.txt", "--cache", place / "cache"]
        return dtm("pilot", place / "base", *common, *arguments)

    return run


def test_a_whole_trial_and_the_comparison_that_it_names(pilot, dtm, place, tmp_path):
    out = tmp_path / "pilot.json"
    widths = ["--width", "kl=80%", "--width", "sdt=80%"]
    left = pilot(place / "noisy", "--scheme", "int4:g8", *SMALL, *widths, "--out", out)
    assert (left.code, left.err) == (0, "")
    record = json.loads(out.read_text())
    assert record["command"][:2] == ["dtm", "pilot"]
    assert [(c["prefix"], c["new_tokens"]) for c in record["cells"]] == [
        (4, 4),
        (4, 10),
        (8, 4),
        (8, 10),
    ]
    names = [candidate["name"] for candidate in record["cells"][0]["candidates"]]
    assert names == [str(place / "noisy"), "int4:g8"]
    assert record["trial"]["left_out"] == 1
    assert record["trial"]["available"] is None
    words = " ".join(left.out.split())
    assert "Prompts needed for intervals as narrow as wanted" in words
    assert "prefix new kl=80% sdt=80% prompts" in words
    chosen = record["recommended"]["command"]
    printed = left.out[left.out.index("dtm compare") :]
    assert shlex.split(printed.replace("\\\n", "")) == chosen
    assert dtm(*chosen[1:], "--quiet").code == 0


def test_json_and_markdown_print_the_same_record(pilot, place):
    arguments = ["--scheme", "int4:g8", *SMALL]
    record = json.loads(pilot(*arguments, "--format", "json").out)
    assert record["widths"][0] == {"metric": "fdt", "size": 10.0, "relative": False}
    assert pilot(*arguments, "--format", "markdown").out.startswith(
        str(place / "base").split("_")[0]
    )


def test_the_next_command_repeats_what_was_asked_for(pilot, place):
    more = ["--dtype", "float32", "--ignore-eos", "--seed", "3", "--exclude", "*.mlp.*"]
    more += ["--level", "0.9", "--max-memory", "4GiB", "--skip-prompts", "2"]
    left = pilot("--scheme", "int4:g8", *SMALL, *more, "--format", "json")
    assert left.code == 0, left.err
    command = json.loads(left.out)["recommended"]["command"]
    assert command[:3] == ["dtm", "compare", str(place / "base")]
    text = " ".join(command)
    for said in ("--dtype float32", "--seed 3", "--exclude *.mlp.*", "--level 0.9"):
        assert said in text
    assert f"--max-memory {4 * 2**30}B" in text
    assert "--skip-prompts 2" in text
    assert command.count("--ignore-eos") == 1
    assert "--batch-size" not in text
    assert "--chat" not in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "there is no candidate to try"),
        (["--scheme", "int8", "--width", "ppl=3"], "expected one of fdt, sdt, kl"),
        (["--scheme", "int8", "--width", "fdt=128"], "no narrower than all that FDT can be"),
        (["--scheme", "int8", "--width", "kl=1%", "--width", "kl=2%"], "names kl twice"),
        (["--scheme", "int8", "--level", "1"], "--level is 1.0"),
        (["--scheme", "int9"], "int9"),
        (["--include", "*.mlp.*", "nowhere"], "no --scheme is given"),
        (["--scheme", "int8", "--chat", "--prefix", "4"], "give one of the two"),
        (["--scheme", "int8", "--scheme", "int8"], "two candidates are called 'int8'"),
        (["--scheme", "int8", "--n-prompts", "4", "--prefix", "4"], "the trial has 4 prompts"),
        (["--scheme", "int8", "--prefix", "200"], "use a smaller --prefix"),
        (["nowhere"], "nowhere"),
        (["--plan", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_input_is_one_message(pilot, arguments, said, tmp_path):
    out = tmp_path / "pilot.json"
    left = pilot(*arguments, "--out", out)
    assert left.code == 2
    assert said in left.err
    assert left.err.count("\n") == 1
    assert not out.exists()


def test_too_few_prompts_of_the_longest_prefix(pilot, place, tmp_path):
    """Most documents are too short for it, and that is said."""
    lines = (place / "prompts.txt").read_text().splitlines()
    few = tmp_path / "few.txt"
    few.write_text("\n".join(["a b"] * 20 + lines[1:5]))
    left = pilot("--scheme", "int8", *SMALL, "--prompts", few)
    assert left.code == 2
    assert "the trial has 4 prompts" in left.err
    assert "20 documents are too short for a prefix of 8" in left.err


def test_what_is_read_is_not_replaced(pilot, place):
    before = (place / "prompts.txt").read_bytes()
    left = pilot("--scheme", "int8", *SMALL, "--out", place / "prompts.txt")
    assert left.code == 2
    assert (place / "prompts.txt").read_bytes() == before


@pytest.mark.demo
def test_the_demo_model(tmp_path):
    out = tmp_path / "pilot.json"
    settings = ["--n-prompts", "8", "--prefix", "16", "--new-tokens", "8", "--new-tokens", "24"]
    schemes = ["--scheme", "int8", "--scheme", "magnitude:0.5"]
    widths = ["--width", "fdt=4", "--width", "kl=50%"]
    left = subprocess.run(
        [DTM, "pilot", "demo:smollm2", *schemes, *settings, *widths, "--out", out],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    record = json.loads(out.read_text())
    short, long = record["cells"]
    for cell in (short, long):
        int8, pruned = cell["candidates"]
        assert pruned["fdt"]["value"] < int8["fdt"]["value"] <= cell["new_tokens"]
        assert pruned["kl"]["value"] > 10 * int8["kl"]["value"]
        by_kl = cell["pairs"][0]["contrasts"][2]
        assert by_kl["paired"]["n_prompts"] < 8  # halving the weights is easily told from int8
    # The same candidate parts no later within 8 tokens than within 24.
    assert short["candidates"][0]["fdt"]["value"] <= long["candidates"][0]["fdt"]["value"]
    assert record["trial"]["available"] == 203
    assert "dtm compare demo:smollm2 --scheme int8 --scheme magnitude:0.5" in left.stdout
