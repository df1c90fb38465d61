"""The sweep's file: what it holds, what it refuses, and that no kill or full disk harms it."""

import math
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from divergent_tokens.errors import RecordError
from divergent_tokens.sensitivities import (
    ComponentRow,
    PromptRow,
    Sensitivity,
    open_sensitivities,
    read_sensitivities,
    resumed_run,
)

GOLDEN = {
    "component": "name kind layer out_features in_features n_parameters base_size_bytes",
    "sensitivity": "component scheme method kl kl_se fdt sdt dppl acceptance ppl weight_error "
    "n_prompts size_bytes seconds",
    "draws": "component scheme array",
    "prompt_kl": "component scheme method array",
    "margins": "prompt array",
    "prompt": "idx digest domain language",
    "run": "key value",
}
RUN = {
    "base": {
        "reference": "tiny",
        "fingerprint": "ab" * 32,
        "model_type": "llama",
        "config": {"hidden_size": 32},
    },
    "dtype": "float32",
    "device": "cpu",
    "versions": {"torch": "2.9", "numpy": "2.3"},
    "prompts": {"source": "a.txt", "digest": "cd" * 32, "prefix": 8, "n_prompts": 2},
    "new_tokens": 4,
    "ignore_eos": False,
    "seed": 0,
    "batch_size": 16,
    "command": ["dtm", "sweep"],
}
COMPONENTS = (
    ComponentRow("layers.0.q_proj", "q", 0, 8, 4, 32, 64),
    ComponentRow("lm_head", "head", None, 9, 4, 36, 72),
)
PROMPTS = (PromptRow(0, "d0", "code", "en"), PromptRow(1, "d1", None, None))
MARGINS = ([0.5, 1.5, -0.25], [2.0])


def row(component="layers.0.q_proj", scheme="int8", method="measure", **changes):
    values = {
        "kl": 0.25,
        "kl_se": 0.125,
        "fdt": 2.0,
        "sdt": 0.5,
        "dppl": 3.5,
        "acceptance": 0.875,
        "ppl": None,
        "weight_error": 1 / 3,
        "n_prompts": 2,
        "size_bytes": 40,
        "seconds": 0.5,
    }
    return Sensitivity(component, scheme, method, **{**values, **changes})


def opened(path, run=RUN, components=COMPONENTS):
    return open_sensitivities(path, run, components, PROMPTS, MARGINS)


def filled(path):
    with opened(path) as writer:
        writer.add(row(), prompt_kl=[0.75, 0.25])
        writer.add_all([(row(method="probe", fdt=None), [[0.5, 1.0], [2.0, 0.0]])])
    return path


# --- what it holds ---


def test_the_tables_are_those_of_the_design(tmp_path):
    filled(tmp_path / "sweep.db")
    connection = sqlite3.connect(tmp_path / "sweep.db")
    tables = [n for (n,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")]
    columns = {
        table: " ".join(column[1] for column in connection.execute(f"PRAGMA table_info({table})"))
        for table in tables
    }
    (blob,) = connection.execute("SELECT array FROM prompt_kl").fetchone()
    (seed,) = connection.execute("SELECT value FROM run WHERE key = 'seed'").fetchone()
    (schema,) = connection.execute("SELECT value FROM run WHERE key = 'schema'").fetchone()
    connection.close()
    assert columns == GOLDEN
    assert (seed, schema) == ("0", '"divergent-tokens/sweep/1"')
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }"
    expected = b"\x93NUMPY\x01\x00v\x00" + header.ljust(117).encode() + b"\n"
    assert blob == expected + np.array([0.75, 0.25]).tobytes()


def test_what_was_written_is_read(tmp_path):
    found = read_sensitivities(filled(tmp_path / "sweep.db"))
    assert found.components == COMPONENTS
    assert found.prompts == PROMPTS
    assert found.rows == (row(), row(method="probe", fdt=None))
    assert found.run == {"schema": "divergent-tokens/sweep/1", **RUN}
    assert [margins.tolist() for margins in found.margins] == list(MARGINS)
    assert found.lengths.tolist() == [3, 1]
    draws = found.draws("layers.0.q_proj", "int8")
    assert (draws.dtype, draws.tolist()) == (np.float32, [[0.5, 1.0], [2.0, 0.0]])
    assert found.prompt_kl("layers.0.q_proj", "int8").tolist() == [0.75, 0.25]
    assert found.prompt_kl("layers.0.q_proj", "int8", "probe").tolist() == [0.3125, 1.0]


def test_numbers_of_numpy_are_kept_and_what_is_none_is_null(tmp_path):
    given = row(kl=np.float32(0.1), kl_se=math.nan, fdt=np.float64(2), n_prompts=np.int64(2))
    with opened(tmp_path / "sweep.db") as writer:
        writer.add(given)
    (found,) = read_sensitivities(tmp_path / "sweep.db").rows
    assert found.kl == float(np.float32(0.1))
    assert found.kl_se is None
    assert (found.fdt, found.n_prompts) == (2.0, 2)


def test_a_measured_kl_under_three_times_the_floor_is_below_rounding(tmp_path):
    path = filled(tmp_path / "sweep.db")
    before = read_sensitivities(path)
    assert before.rounding_kl is None
    assert not before.below_rounding(before.rows[0])
    with opened(path) as writer:
        writer.set(rounding_kl=0.1)
    found = read_sensitivities(path)
    assert [found.below_rounding(one) for one in found.rows] == [True, False]
    assert not found.below_rounding(row(kl=0.31))


def test_an_array_that_is_not_there_is_named(tmp_path):
    found = read_sensitivities(filled(tmp_path / "sweep.db"))
    with pytest.raises(RecordError, match=r"no draws of lm_head under int8; run `dtm sweep`"):
        found.draws("lm_head", "int8")


# --- going on ---


def test_a_second_run_keeps_what_there_is_and_adds(tmp_path):
    path = filled(tmp_path / "sweep.db")
    more = ComponentRow("layers.1.q_proj", "q", 1, 8, 4, 32, 64)
    with opened(path, components=(*COMPONENTS, more)) as writer:
        assert writer.done("measure") == writer.done("probe") == {("layers.0.q_proj", "int8")}
        writer.add(row(kl=99.0), prompt_kl=[1.0, 1.0])  # it is there already
        writer.add(row("layers.1.q_proj"))
    found = read_sensitivities(path)
    assert found.components == (*COMPONENTS, more)
    assert [(one.component, one.method, one.kl) for one in found.rows] == [
        ("layers.0.q_proj", "measure", 0.25),
        ("layers.0.q_proj", "probe", 0.25),
        ("layers.1.q_proj", "measure", 0.25),
    ]
    assert found.prompt_kl("layers.0.q_proj", "int8").tolist() == [0.75, 0.25]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed is 0 in the file and 1 now"),
        ({"new_tokens": 8}, "new_tokens is 4 in the file and 8 now"),
        ({"dtype": "bfloat16"}, 'dtype is "float32" in the file and "bfloat16" now'),
        ({"base": {**RUN["base"], "fingerprint": "ee" * 32}}, 'base.fingerprint is "abab'),
        ({"versions": {"torch": "3.0", "numpy": "2.3"}}, 'versions.torch is "2.9" in the file'),
        (
            {"prompts": {**RUN["prompts"], "digest": "00", "n_prompts": 9}},
            "prompts.n_prompts is 2 in the file and 9 now",
        ),
    ],
)
def test_another_run_is_refused_and_says_what_differs(tmp_path, change, said):
    path = filled(tmp_path / "sweep.db")
    before = path.read_bytes()
    with pytest.raises(RecordError) as refused, opened(path, {**RUN, **change}):
        pass
    assert said in str(refused.value)
    assert path.read_bytes() == before


def test_what_rows_do_not_depend_on_may_differ(tmp_path):
    path = filled(tmp_path / "sweep.db")
    change = {
        "base": {**RUN["base"], "reference": "../tiny"},
        "prompts": {**RUN["prompts"], "source": "/elsewhere/a.txt"},
        "batch_size": 4,
        "command": ["dtm"],
    }
    with opened(path, {**RUN, **change}) as writer:
        assert writer.run["batch_size"] == 16  # the file's own is reused
    assert resumed_run(path, {"seed": 0})["batch_size"] == 16


def test_a_text_counts_once_something_was_measured_and_draws_once_something_was_probed(tmp_path):
    path = tmp_path / "sweep.db"
    with opened(path, {**RUN, "n_draws": 1}) as writer:
        writer.add(row(method="probe"), draws=[[1.0]])
    with opened(path, {**RUN, "text": None}):  # nothing was measured: still free
        pass
    with opened(path, {**RUN, "text": "ff"}) as writer:
        writer.add(row())
    with pytest.raises(RecordError, match='text is "ff" in the file and null now'):
        resumed_run(path, {**RUN, "text": None})
    with pytest.raises(RecordError, match="n_draws is 1 in the file and 4 now"):
        resumed_run(path, {**RUN, "n_draws": 4})
    assert resumed_run(path, RUN)["text"] == "ff"  # a probe says nothing about a text


def test_what_a_scheme_reads_besides_the_base_must_stay_and_further_schemes_add_theirs(tmp_path):
    path = tmp_path / "sweep.db"
    with opened(path, {**RUN, "sources": {"from:a.gguf": "11"}}) as writer:
        writer.add(row(scheme="from:a.gguf"))
    with opened(path, RUN), opened(path, {**RUN, "sources": {"from:b.gguf": "22"}}) as writer:
        assert writer.run["sources"] == {"from:a.gguf": "11", "from:b.gguf": "22"}
    with pytest.raises(
        RecordError, match=r'sources\.from:a\.gguf is "11" in the file and "33" now'
    ):
        resumed_run(path, {**RUN, "sources": {"from:a.gguf": "33"}})


# --- files that are no sweep ---


def other_database(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE sensitivity (kl REAL)")
    connection.commit()
    connection.close()


FOREIGN = {
    "no SQLite file": lambda path: path.write_text("a text that somebody needs\n"),
    "a SQLite file of another program": other_database,
}


@pytest.mark.parametrize("said", FOREIGN)
def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path, said):
    path = tmp_path / "sweep.db"
    FOREIGN[said](path)
    before = path.read_bytes()
    with pytest.raises(RecordError, match=f"is {said}; expected one that `dtm sweep` wrote"):
        read_sensitivities(path)
    with pytest.raises(RecordError, match=f"is {said}"), opened(path):
        pass
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.db"]


def test_a_missing_an_empty_and_a_folder(tmp_path):
    with pytest.raises(RecordError, match="does not exist; check the path"):
        read_sensitivities(tmp_path / "none.db")
    (tmp_path / "empty.db").touch()
    with pytest.raises(RecordError, match="stopped at the start; run it again"):
        read_sensitivities(tmp_path / "empty.db")
    with opened(tmp_path / "empty.db") as writer:
        writer.add(row())
    assert read_sensitivities(tmp_path / "empty.db").rows == (row(),)
    with pytest.raises(RecordError, match="a folder or a device"):
        read_sensitivities(tmp_path)
    with pytest.raises(RecordError, match="cannot be written to"), opened(tmp_path / "no" / "a.db"):
        pass


@pytest.mark.parametrize("where", ["head", "middle", "tail"])
def test_a_damaged_file_is_refused_or_read_in_full(tmp_path, where):
    path = filled(tmp_path / "sweep.db")
    whole = path.read_bytes()
    damaged = {
        "head": whole[:100] + bytes(800) + whole[900:],
        "middle": whole[:4096] + b"\xff" * 8192 + whole[12288:],
        "tail": whole[: len(whole) // 2],
    }[where]
    path.write_bytes(damaged)
    with pytest.raises(RecordError, match="damaged"):
        read_sensitivities(path)
    with pytest.raises(RecordError, match="damaged"), opened(path):
        pass
    assert path.read_bytes() == damaged


def changed(path, statement, *values):
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def test_contents_that_make_no_sense_are_refused(tmp_path):
    path = filled(tmp_path / "sweep.db")
    changed(path, "UPDATE draws SET array = ?", b"\x93NUMPY nonsense")
    with pytest.raises(RecordError, match="damaged"):
        read_sensitivities(path).draws("layers.0.q_proj", "int8")
    changed(path, "UPDATE run SET value = '\"divergent-tokens/sweep/9\"' WHERE key = 'schema'")
    with pytest.raises(RecordError, match="sweep/9"):
        read_sensitivities(path)
    changed(path, "UPDATE run SET value = '{' WHERE key = 'schema'")
    with pytest.raises(RecordError, match="damaged"):
        read_sensitivities(path)
    changed(path, "DROP TABLE margins")
    changed(path, "UPDATE run SET value = '\"divergent-tokens/sweep/1\"' WHERE key = 'schema'")
    with pytest.raises(RecordError, match="damaged, or no sweep of this version"):
        read_sensitivities(path)


# --- whatever happens ---


def test_an_interrupt_within_a_transaction_leaves_nothing_of_it(tmp_path, monkeypatch):
    path = filled(tmp_path / "sweep.db")
    before = read_sensitivities(path)
    with opened(path) as writer:
        add = writer._add
        calls = iter(range(3))

        def interrupted(*arguments):
            if next(calls) == 1:
                raise KeyboardInterrupt
            add(*arguments)

        monkeypatch.setattr(writer, "_add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.add_all([(row(scheme="a"), [[1.0]]), (row(scheme="b"), [[1.0]])])
        assert read_sensitivities(path).rows == before.rows
        writer.add(row(scheme="c"))
    assert [one.scheme for one in read_sensitivities(path).rows] == ["int8", "int8", "c"]


def test_a_full_disk_is_said_and_finished_rows_are_safe(tmp_path):
    path = filled(tmp_path / "sweep.db")
    with opened(path) as writer:
        (n_pages,) = writer._connection.execute("PRAGMA page_count").fetchone()
        writer._connection.execute(f"PRAGMA max_page_count = {n_pages}")
        with pytest.raises(RecordError, match=r"every finished row is safe in it. Free some room"):
            writer.add(row(scheme="big"), draws=np.zeros((1000, 100)))
    assert len(read_sensitivities(path).rows) == 2


def test_it_is_read_while_it_is_written(tmp_path):
    path = filled(tmp_path / "sweep.db")
    stop = threading.Event()
    seen = []

    def read():
        while not stop.is_set():
            found = read_sensitivities(path)
            seen.append(len(found.rows))
            assert found.draws(found.rows[-1].component, found.rows[-1].scheme).size

    reader = threading.Thread(target=read)
    reader.start()
    with opened(path) as writer:
        for i in range(40):
            writer.add(row(scheme=f"s{i}", method="probe"), draws=[[1.0], [2.0]])
    stop.set()
    reader.join()
    assert seen == sorted(seen)
    assert len(read_sensitivities(path).rows) == 42


def test_several_that_begin_the_same_file_at_once_all_add_their_rows(tmp_path):
    path, n = tmp_path / "sweep.db", 6
    together = threading.Barrier(n)

    def begin(i):
        together.wait()
        with opened(path) as writer:
            writer.add(row(scheme=f"s{i}"))

    with ThreadPoolExecutor(n) as threads:
        list(threads.map(begin, range(n)))  # raises what any of them raised
    assert {one.scheme for one in read_sensitivities(path).rows} == {f"s{i}" for i in range(n)}


WRITES_FOREVER = """
import sys
sys.path.insert(0, {tests!r})
import test_sensitivities as t
with t.opened(sys.argv[1]) as writer:
    known = writer.done("probe")
    print("ready", flush=True)
    for i in range(len(known), 10**6):
        writer.add(t.row(scheme=f"s{{i}}", method="probe"), draws=[[i]] * 300)
"""


def test_a_kill_at_any_moment_leaves_whole_rows_and_no_hole(tmp_path):
    path = tmp_path / "sweep.db"
    code = WRITES_FOREVER.format(tests=str(Path(__file__).parent))
    rng = random.Random(0)
    before = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = read_sensitivities(path)
        assert [one.scheme for one in found.rows] == [f"s{i}" for i in range(len(found.rows))]
        assert len(found.rows) >= before
        before = len(found.rows)
        for i, one in enumerate(found.rows):
            assert (found.draws(one.component, one.scheme) == i).all()
    assert before > 0


def test_many_rows_are_quick(tmp_path):
    path = tmp_path / "sweep.db"
    started = time.perf_counter()
    with opened(path) as writer:
        writer.add_all(
            [(row(f"c{i}", method="probe"), np.ones((32, 1), np.float32)) for i in range(20000)]
        )
    found = read_sensitivities(path)
    total = sum(found.draws(one.component, one.scheme).sum() for one in found.rows)
    assert total == 20000 * 32
    assert time.perf_counter() - started < 20  # seconds, on a busy machine
