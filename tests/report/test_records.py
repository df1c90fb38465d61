import json
from importlib import resources

import pytest
from jsonschema import Draft202012Validator

import page_records
from divergent_tokens.errors import RecordError
from divergent_tokens.report.records import WRITERS, read_source, read_sources


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
