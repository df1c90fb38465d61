import json
from importlib import resources

import pytest
from jsonschema import Draft202012Validator

import page_records
from divergent_tokens.errors import RecordError
from divergent_tokens.report.records import WRITERS, read_source, read_sources
from divergent_tokens.report.text_view import text_view


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "sweep"])
def test_the_schema_of_each_kind_is_one(kind):
    file = resources.files("divergent_tokens") / "data" / "schemas" / f"{kind}-1.json"
    Draft202012Validator.check_schema(json.loads(file.read_text(encoding="utf-8")))


def test_each_file_is_known_by_what_it_holds(tmp_path):
    files = page_records.folder(tmp_path)
    for kind, path in files.items():
        renamed = path.rename(tmp_path / f"file of {kind}")
        assert read_source(renamed).kind == kind


def test_a_file_that_is_named_twice_counts_once(tmp_path):
    path = page_records.write(tmp_path / "c.json", page_records.comparison())
    assert len(read_sources([path, path])) == 1


def test_what_is_wrong_in_a_record_is_named(tmp_path):
    record = page_records.comparison()
    record["candidates"][1]["rows"][3]["fdt"] = "many"
    path = page_records.write(tmp_path / "c.json", record)
    with pytest.raises(RecordError, match=r"candidates\[1\].rows\[3\].fdt: 'many' is not of type"):
        read_source(path)


@pytest.mark.parametrize("name", ["texts", "margins", "completions"])
def test_parts_that_contradict_each_other_are_refused(tmp_path, name):
    record = page_records.comparison()
    record["prompts"][name] = record["prompts"][name][:-1]
    path = page_records.write(tmp_path / "comparison.json", record)
    with pytest.raises(RecordError, match=f"24 prompts and 23 {name}; expected as many"):
        read_source(path)


def test_groups_of_another_comparison_are_refused(tmp_path):
    record = page_records.comparison()
    record["candidates"][0]["metrics"]["by_domain"].popitem()
    path = page_records.write(tmp_path / "comparison.json", record)
    with pytest.raises(RecordError, match="has other groups in by_domain"):
        read_source(path)


def test_older_files_go_without_texts(tmp_path):
    record = page_records.comparison()
    del record["prompts"]["completions"]
    source = read_source(page_records.write(tmp_path / "comparison.json", record))
    assert text_view([source])["comparisons"] == []


def test_two_plans_of_one_name_are_told_apart(tmp_path):
    for folder in ("a/run", "b/run"):
        (tmp_path / folder).mkdir(parents=True)
        page_records.write(tmp_path / folder / "comparison.json", page_records.comparison())
    files = [tmp_path / folder / "comparison.json" for folder in ("a/run", "b/run")]
    assert [s.name for s in read_sources(files)] == [
        "a/run/comparison.json",
        "b/run/comparison.json",
    ]
