import json
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest

import browser
import page_records
import runs
import sweeps
from divergent_tokens.report import page as page_module
from divergent_tokens.report import pictures


@pytest.fixture
def files(tmp_path):
    return page_records.folder(tmp_path)


def test_a_page_of_every_kind_of_record(dtm, files, tmp_path):
    out = tmp_path / "page.html"
    left = dtm("report", *files.values(), "--out", out)
    assert (left.code, left.err) == (0, "")
    assert left.out.startswith(f"{out}: 1 comparison, 1 plan, 1 curve, 1 pruning, 1 sweep, 1 ")
    text = out.read_text()
    assert text.startswith("<!doctype html>")
    assert "candidate 2 drifts most" in text
    assert dtm("report", *files.values(), "--out", out).code == 0  # again, over the old one


def test_a_folder_stands_for_the_record_in_it(dtm, files, tmp_path):
    left = dtm("report", tmp_path, "--out", tmp_path / "page.html")
    assert "1 pruning, 1 verification" in left.out  # a plan beside a pruning is for what came of it
    (tmp_path / "pruning.json").unlink()
    left = dtm("report", tmp_path, "--out", tmp_path / "another.html")
    assert "1 plan, 1 verification" in left.out


def refused(left, *parts):
    assert left.code == 2
    assert left.err.count("\n") == 1
    for part in parts:
        assert part in left.err
    return True


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "has the schema None; expected a file that one of dtm compare, dtm sweep"),
        ("[1]", "holds a list"),
        ("no json", "is no JSON"),
        ('{"schema": "divergent-tokens/comparison/2"}', "reads 'divergent-tokens/comparison/1'"),
        ('{"schema": "divergent-tokens/comparison/1"}', "is no whole comparison: $: '"),
        ('{"schema": "divergent-tokens/comparison/1", "candidates": []}', "holds no candidate"),
        ('{"schema": "divergent-tokens/curve/1", "points": []}', "holds no point"),
    ],
)
def test_a_file_that_is_none_of_ours(dtm, tmp_path, content, said):
    file, out = tmp_path / "a.json", tmp_path / "page.html"
    file.write_text(content)
    refused(dtm("report", file, "--out", out), str(file), said)
    assert not out.exists()


def test_a_file_that_is_not_there_and_bytes(dtm, tmp_path):
    out = tmp_path / "page.html"
    refused(dtm("report", tmp_path / "none.json", "--out", out), "does not exist")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    refused(dtm("report", tmp_path / "b", "--out", out), "is no JSON")
    (tmp_path / "d").mkdir()
    refused(dtm("report", tmp_path / "d", "--out", out), "holds no pruning.json, plan.json or")


def test_an_empty_sweep(dtm, tmp_path):
    empty = replace(sweeps.sweep(), rows=())
    sweeps.written(tmp_path / "sweep.db", empty)
    out = tmp_path / "page.html"
    refused(dtm("report", tmp_path / "sweep.db", "--out", out), "holds no finished row")


def test_records_of_two_bases(dtm, files, tmp_path):
    record = json.loads(files["comparison"].read_text())
    record["base"]["fingerprint"] = "00" * 32
    other = page_records.write(tmp_path / "other.json", record)
    left = dtm("report", files["comparison"], other, "--out", tmp_path / "page.html")
    refused(left, "a page is about one base", "abababababab…", "000000000000…")


def test_where_it_cannot_be_written(dtm, files, tmp_path):
    file = files["comparison"]
    refused(dtm("report", file), "give --out page.html, or --figures DIR")
    refused(dtm("report", file, "--out", tmp_path / "no" / "page.html"), "no")
    refused(dtm("report", file, "--out", file), "would replace")


def test_without_the_extra(dtm, files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    out = tmp_path / "page.html"
    left = dtm("report", files["comparison"], "--out", out)
    refused(left, "pip install 'divergent-tokens[report]'")


def test_figures_without_a_browser(dtm, files, tmp_path, monkeypatch):
    monkeypatch.setenv(pictures.BROWSER, str(tmp_path / "nothing"))
    left = dtm("report", files["comparison"], "--figures", tmp_path / "figures")
    refused(left, "Chromium or Chrome", "apt-get install chromium")
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize(("form", "start"), [("svg", b"<svg"), ("png", b"\x89PNG")])
def test_figures_for_papers(dtm, files, tmp_path, form, start):
    if pictures.browser() is None:
        browser.missing("no Chromium is installed")
    folder = tmp_path / "figures"
    left = dtm(
        "report", files["comparison"], files["plan"], "--figures", folder, "--figure-format", form
    )
    assert (left.code, left.err) == (0, "")
    names = sorted(path.name for path in folder.iterdir())
    assert f"{folder}: {len(names)} figures as {form}" in left.out
    assert f"survival.{form}" in names
    assert f"groups-1-sdt-by-domain.{form}" in names
    assert f"map.{form}" in names
    for path in folder.iterdir():
        assert path.read_bytes().startswith(start)


def test_compare_writes_the_same_page(dtm, tmp_path, monkeypatch):
    """From real tiny models: the record that compare writes makes the page that it writes."""
    from divergent_tokens import noise
    from divergent_tokens.measure.comparison import compare
    from divergent_tokens.report.records import Source, read_sources

    base = runs.model()
    noisy = runs.noisy(base)
    found = compare(
        base, {"noisy": nullcontext(noisy)}, runs.prompts(), new_tokens=16, n_examples=2
    ).to_json()
    path = page_records.write(tmp_path / "comparison.json", found)
    (source,) = read_sources([path])
    assert source.record == json.loads(json.dumps(found))
    again = Source(path, "comparison", found, noise.noise(found))
    assert page_module.page([again]) == page_module.page([source])
