import re

import pytest

import page_records
import sweeps
from divergent_tokens.report.chapters import chapters
from divergent_tokens.report.page import page
from divergent_tokens.report.records import read_source, read_sources
from divergent_tokens.report.verdict import headline, verdicts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("records")
    page_records.folder(path)
    return path


def test_the_verdict_says_who_drifts_and_who_does_not(folder):
    sources = read_sources([folder / "comparison.json"])
    found = {one.name: one for one in verdicts(sources)}
    assert [one.status for one in found.values()] == ["same", "drifts", "drifts"]
    assert found["candidate 0"].word == "as good as the base"
    assert "under 3 times what rounding alone does" in found["candidate 0"].sentence
    assert headline(sources).startswith("candidate 0 is indistinguishable from rounding; ")
    assert "candidate 2 drifts most" in headline(sources)


def test_a_domain_is_named_where_its_interval_lies_above(tmp_path):
    record = page_records.comparison(n_prompts=40)
    candidate = record["candidates"][2]
    candidate["metrics"]["by_domain"]["code"]["sdt"] |= {"value": 0.9, "low": 0.8, "high": 0.95}
    source = read_source(page_records.write(tmp_path / "c.json", record))
    (found,) = [one for one in verdicts([source]) if one.name == "candidate 2"]
    assert "More than elsewhere in code (90.0%)." in found.details


def test_a_checkpoint_that_is_not_as_planned_is_said_to_be(tmp_path):
    record = page_records.comparison()
    bad = page_records.verification(record, record["candidates"][1]["metrics"])
    bad |= {"passed": False}
    bad["checks"].append({"name": "weights", "passed": False, "found": "one differs"})
    source = read_source(page_records.write(tmp_path / "v.json", bad))
    (found,) = verdicts([source])
    assert (found.status, found.details) == ("bad", ["weights: one differs"])
    assert "NOT what its plan says" in headline([source])


def test_all_names_of_figures_differ_with_several_records_of_a_kind(folder):
    comparison = read_source(folder / "comparison.json")
    sweep = read_source(folder / "sweep.db")
    found = chapters([comparison, comparison, sweep, sweep])
    names = [figure.name for chapter in found for part in chapter.parts for figure in part.figures]
    assert len(names) == len(set(names)) == 2 * (2 + 1 + 1 + 2 + 2)


def test_a_chapter_without_a_record_is_left_out(folder):
    found = chapters(read_sources([folder / "pruning.json"]))
    assert [chapter.name for chapter in found] == ["map", "pruning"]


def test_a_figure_shows_the_numbers_of_its_record(folder):
    source = read_source(folder / "comparison.json")
    (part,) = chapters([source])[0].parts
    survival, distributions = part.figures
    worst = max(source.record["candidates"], key=lambda c: c["metrics"]["sdt"]["value"])
    (line,) = [t for t in survival.data if t.get("name") == worst["name"]]
    curve = {row[0]: row[1] for row in worst["metrics"]["survival"]}
    drawn = dict(zip(line["x"], line["y"], strict=True))  # of two at one t the lower, later one
    assert all(drawn[t] == share for t, share in curve.items())
    (bars,) = [t for t in distributions.data if t["name"] == worst["name"]]
    assert sum(bars["y"]) == pytest.approx(1)
    assert bars["y"][-1] == worst["metrics"]["identical"]


def test_plotly_takes_every_figure(folder):
    from plotly.graph_objects import Figure

    files = ("comparison.json", "sweep.db", "plan.json", "curve.json", "pruning.json")
    for chapter in chapters(read_sources([folder / name for name in files])):
        for part in chapter.parts:
            for figure in part.figures:
                Figure({"data": list(figure.data), "layout": dict(figure.layout)})


def test_a_candidate_without_kl_is_shown_too(tmp_path):
    """As a scores file with argmaxes only has it."""
    record = page_records.comparison()
    for candidate in record["candidates"][1:2]:
        candidate["metrics"] |= {"kl": None, "dppl": None, "acceptance": None, "kl_p99": None}
        for group in ("by_domain", "by_language"):
            for part in candidate["metrics"][group].values():
                part |= {"kl": None, "dppl": None, "acceptance": None, "kl_p99": None}
        for row in candidate["rows"]:
            row |= {"kl": None, "nats": None, "acceptance": None, "base_token_q": None}
    text = page([read_source(page_records.write(tmp_path / "c.json", record))])
    assert "candidate 1" in text


def test_a_sweep_that_was_stopped_midway_is_shown(tmp_path):
    from dataclasses import replace

    whole = sweeps.sweep()
    sweeps.written(tmp_path / "sweep.db", replace(whole, rows=whole.rows[:5]))
    text = page([read_source(tmp_path / "sweep.db")])
    assert "Map of the model" in text


def test_no_text_of_a_record_reaches_the_page_as_markup(tmp_path):
    record = page_records.comparison(names=("<b>bold</b>", "a & b"))
    record["prompts"]["texts"][0] = "</script><script>"
    text = page([read_source(page_records.write(tmp_path / "c.json", record))])
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text
    assert len(re.findall("</script>", text)) == len(re.findall("<script", text)) == 7


def test_a_thousand_prompts_and_ten_candidates_stay_under_15_megabytes(tmp_path):
    record = page_records.comparison(n_prompts=1000, n_candidates=10, n_tokens=128, examples=100)
    path = page_records.write(tmp_path / "c.json", record)
    size = len(page([read_source(path)]).encode())
    assert size < 15e6
    assert size > 6e6  # plotly is in it, and so are ten thousand rows
