"""`dtm sweep`, from the command line to the file and the table."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
import tiny
from divergent_tokens.sensitivities import read_sensitivities

DTM = Path(sys.executable).with_name("dtm")
SETTINGS = ["--n-prompts", 5, "--prefix", 8, "--new-tokens", 10]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    for name, seed in (("base", 0), ("other", 1)):
        runs.model(seed=seed).network.save_pretrained(place / name)
        runs.model().tokenizer.save_pretrained(place / name)
    rows = [{"text": f"{sentence} {i}"} for i, sentence in enumerate(tiny.SENTENCES * 2)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "text.txt").write_text("\n".join(tiny.SENTENCES * 20))
    return place


@pytest.fixture
def sweep(dtm, place, tmp_path):
    """`dtm sweep BASE ... --out sweep.db` on the prompts and with the cache of `place`."""

    def run(*arguments, base="base"):
        return dtm("sweep", place / base, *common(place), "--out", tmp_path / "s.db", *arguments)

    return run


def common(place):
    return [*SETTINGS, "--prompts", place / "prompts.jsonl", "--cache", place / "cache"]


def test_auto_probes_all_and_measures_what_the_plan_for_a_budget_hangs_on(sweep, tmp_path):
    left = sweep("--scheme", "int8", "--scheme", "int3", "--method", "auto", "--bits", 6)
    assert (left.code, left.err) == (0, "")
    words = " ".join(left.out.split())
    assert "with 1 draw a prompt, and measured where a plan for --bits 6 hangs on it, on 5" in words
    found = read_sensitivities(tmp_path / "s.db")
    n_measured = sum(row.method == "measure" for row in found.rows)
    assert 0 < n_measured < 28
    assert f"{n_measured} rows measured, which changed " in words
    assert "4.00 passes for the probe" in words


def test_auto_wants_a_budget_and_the_other_methods_none(sweep, tmp_path):
    assert sweep("--scheme", "int8", "--method", "auto").code == 2
    left = sweep("--scheme", "int8", "--bits", 6)
    assert (left.code, left.out) == (2, "")
    assert "a sweep by --method probe is for any budget" in left.err
    assert not (tmp_path / "s.db").exists()


def test_a_probe_of_two_schemes_in_a_table_and_in_the_file(sweep, tmp_path):
    left = sweep("--scheme", "int8", "--scheme", "int4:g8", "--draws", 2)
    assert (left.code, left.err) == (0, "")
    lines = [line.rstrip() for line in left.out.splitlines()]
    words = " ".join(left.out.split())
    assert "probed with 2 draws a prompt on 5 prompts of 8 tokens from" in words
    table = lines[lines.index("Schemes") + 1 :]
    assert re.split(r"  +", table[0]) == ["scheme", "components", "bytes", "sum of KL", "seconds"]
    assert [line.split()[:2] for line in table[1:3]] == [["int8", "14"], ["int4:g8", "14"]]
    worst = lines[lines.index("Most KL under int4:g8") + 1 :]
    assert re.split(r"  +", worst[0]) == ["component", "KL", "of the sum"]
    number = r"[\d.e-]+"
    shape = re.compile(rf"model\.layers\S+ +{number} +± {number} +[\d.]+%")
    assert all(shape.fullmatch(line) for line in worst[1:6])
    assert not worst[6]
    assert f"Rows are kept in {tmp_path / 's.db'}; dtm search" in words
    assert max(map(len, lines)) <= 80
    found = read_sensitivities(tmp_path / "s.db")
    assert len(found.rows) == 28
    assert found.run["n_draws"] == 2
    assert found.run["command"][:2] == ["dtm", "sweep"]
    assert found.draws(found.rows[0].component, "int8").shape == (5, 2)


def test_json_names_the_five_worst_and_adds_up(sweep, tmp_path):
    left = sweep("--scheme", "int4", "--method", "measure", "--format", "json")
    record = json.loads(left.out)
    (scheme,) = record["schemes"]
    rows = read_sensitivities(tmp_path / "s.db").rows
    assert scheme["n_components"] == len(rows) == 14
    assert scheme["kl_sum"] == pytest.approx(sum(row.kl for row in rows))
    assert scheme["seconds"] == pytest.approx(sum(row.seconds for row in rows))
    worst = sorted(rows, key=lambda row: -row.kl)[:5]
    assert [one["component"] for one in scheme["worst"]] == [row.component for row in worst]
    assert record["method"] == "measure"
    assert 0 < record["rounding_kl"] < worst[0].kl
    assert record["passes"] == "from the changed layer on"
    markdown = sweep("--scheme", "int4", "--method", "measure", "--format", "markdown").out
    assert "**Most KL under int4**" in markdown
    assert "| scheme | components | bytes | sum of KL | seconds |" in markdown


def test_a_kl_below_the_rounding_floor_is_marked(sweep, tmp_path):
    sweep("--scheme", "int8", "--method", "measure")
    connection = sqlite3.connect(tmp_path / "s.db")
    connection.execute("UPDATE run SET value = '1000.0' WHERE key = 'rounding_kl'")
    connection.commit()
    connection.close()
    left = sweep("--scheme", "int8", "--method", "measure")
    assert left.out.count("≈") == 6
    words = " ".join(left.out.split())
    assert "≈ 14 of 14 KLs under int8 were measured below three times the rounding floor" in words


def test_further_schemes_and_the_other_method_go_into_the_same_file(sweep, place, tmp_path):
    sweep("--scheme", "int8", "--include", "*.q_proj")
    sweep("--scheme", "int4", "--include", "*.q_proj")
    text = ["--text", place / "text.txt"]
    left = sweep("--scheme", "int4", "--include", "*.q_proj", "--method", "measure", *text)
    assert left.code == 0
    rows = read_sensitivities(tmp_path / "s.db").rows
    assert [(row.scheme, row.method) for row in rows] == [
        ("int8", "probe"),
        ("int8", "probe"),
        ("int4", "probe"),
        ("int4", "probe"),
        ("int4", "measure"),
        ("int4", "measure"),
    ]
    assert all((row.ppl is not None) == (row.method == "measure") for row in rows)


def test_embeddings_are_swept_only_if_they_are_named(sweep, tmp_path):
    sweep("--scheme", "int8", "--include", "lm_head", "--include", "*.o_proj")
    found = read_sensitivities(tmp_path / "s.db")
    assert [component.kind for component in found.components] == ["o", "o", "head"]


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n-prompts", 4], "prompts.n_prompts is 5 in the file and 4 now"),
        (["--new-tokens", 9], "new_tokens is 10 in the file and 9 now"),
        (["--seed", 1], "seed is 0 in the file and 1 now"),
        (["--dtype", "bfloat16"], 'dtype is "float32" in the file and "bfloat16" now'),
        (["--draws", 3], "n_draws is 1 in the file and 3 now"),
    ],
)
def test_a_file_of_another_run_is_refused_and_says_what_differs(sweep, tmp_path, arguments, said):
    assert sweep("--scheme", "int8").code == 0
    before = (tmp_path / "s.db").read_bytes()
    left = sweep("--scheme", "int8", *arguments)
    assert (left.code, left.out) == (2, "")
    assert said in left.err
    assert "Give the same settings again, or another --out" in left.err
    assert (tmp_path / "s.db").read_bytes() == before


def test_a_file_of_another_base_is_refused(sweep):
    assert sweep("--scheme", "int8").code == 0
    left = sweep("--scheme", "int8", base="other")
    assert left.code == 2
    assert "base.fingerprint is " in left.err


def test_a_foreign_file_is_refused_before_the_model_is_loaded(sweep, tmp_path):
    (tmp_path / "s.db").write_text("notes that somebody needs")
    left = sweep("--scheme", "int8", base="nowhere")
    assert left.code == 2
    assert "s.db is no SQLite file; expected one that `dtm sweep` wrote" in left.err
    assert (tmp_path / "s.db").read_text() == "notes that somebody needs"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheme", "int9"], "dtm: 'int9' asks for 9 bits"),
        (["--scheme", "int4:g7"], "groups of 7 do not divide"),
        (["--scheme", "int8", "--text", "text.txt"], "a probe reads no text"),
        (["--scheme", "int8", "--method", "measure", "--draws", 2], "--draws belongs to"),
        (["--scheme", "int8", "--method", "guess"], "Invalid value for '--method'"),
        (["--scheme", "int8", "--include", "nothing"], "matches no component"),
        ([], "Missing option '--scheme'"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_file(sweep, tmp_path, arguments, said):
    left = sweep(*arguments)
    assert (left.code, left.out) == (2, "")
    assert said in left.err
    assert left.err.count("\n") == 1
    assert not (tmp_path / "s.db").exists()


def test_out_must_not_be_what_is_read(dtm, place):
    left = dtm(
        "sweep",
        place / "base",
        *common(place),
        "--scheme",
        "int8",
        "--out",
        place / "prompts.jsonl",
    )
    assert left.code == 2
    assert "which is read; name another file" in left.err


# --- interrupts ---


def test_an_interrupt_ends_with_130_and_the_next_run_goes_on(sweep, place, tmp_path):
    arguments = ["--scheme", "int8", "--scheme", "int4", "--method", "measure"]
    whole = tmp_path / "s.db"
    assert sweep(*arguments).code == 0
    expected = {(r.component, r.scheme): (r.kl, r.fdt) for r in read_sensitivities(whole).rows}
    whole.unlink()
    command = [DTM, "sweep", place / "base", *common(place), "--out", whole, *arguments]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not whole.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.wait() in (130, 0)  # on a quick machine it was done
    assert process.stderr.read() in ("dtm: interrupted; nothing was left half written\n", "")
    process.stderr.close()
    assert sweep(*arguments).code == 0
    rows = read_sensitivities(whole).rows
    assert len(rows) == len(expected)
    assert {(r.component, r.scheme): (r.kl, r.fdt) for r in rows} == expected
