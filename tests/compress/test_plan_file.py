"""plan.json: there and back, against its schema, and everything that can be wrong with one."""

import copy
import json
import re
from importlib import resources
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import runs
from divergent_tokens.compress.plan_file import (
    SCHEMA,
    PlanFile,
    check_base,
    read_plan,
    write_plan,
)
from divergent_tokens.errors import DivergentTokensError, RecordError, SchemeError

FILE = resources.files("divergent_tokens") / "data" / "schemas" / "plan-1.json"
VALIDATOR = Draft202012Validator(json.loads(FILE.read_text(encoding="utf-8")))

BASE = {
    "reference": "demo",
    "fingerprint": "ab" * 32,
    "model_type": "llama",
    "config": {"model_type": "llama"},
}
PLAN = PlanFile(
    BASE, {"b": "int8", "a": "int4:g64:asym"}, 60, 100, ({"step": "by hand", "why": 1},)
)


@pytest.fixture
def written(tmp_path):
    write_plan(tmp_path / "plan.json", PLAN)
    return tmp_path / "plan.json"


def test_there_and_back(written):
    record = json.loads(written.read_text())
    assert record["schema"] == SCHEMA
    assert not list(VALIDATOR.iter_errors(record))
    found = read_plan(written)
    assert found == PLAN
    assert list(found.components) == ["b", "a"]
    assert {name: str(scheme) for name, scheme in found.plan().schemes.items()} == PLAN.components
    assert [path.name for path in written.parent.iterdir()] == ["plan.json"]


def test_the_bytes_of_the_format(written):
    start = b'{\n "schema": "divergent-tokens/plan/1",\n "base": {\n  "reference": "demo",\n'
    assert written.read_bytes().startswith(start)


def test_nothing_is_written_where_there_is_no_room(tmp_path):
    with pytest.raises(RecordError, match="could not write"):
        write_plan(tmp_path / "gone" / "plan.json", PLAN)


def test_the_schema_describes_every_field():
    Draft202012Validator.check_schema(VALIDATOR.schema)
    assert VALIDATOR.schema["properties"]["schema"]["const"] == SCHEMA
    for each in (VALIDATOR.schema, *VALIDATOR.schema["$defs"].values()):
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])
        for name, field in each["properties"].items():
            assert field["description"].endswith("."), name


def write(path: Path, change) -> Path:
    record = PLAN.to_json()
    record = copy.deepcopy(record)
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda r: r.update(schema="x/2"), RecordError, "has the schema 'x/2'; expected 'diverg"),
        (lambda r: r.pop("schema"), RecordError, "has the schema None"),
        (lambda r: r.pop("base"), RecordError, "base is None; expected an object with reference"),
        (lambda r: r["base"].pop("config"), RecordError, "base is .*; expected an object with"),
        (lambda r: r["base"].update(fingerprint=3), RecordError, r"base\.fingerprint is 3"),
        (lambda r: r.update(components=[]), RecordError, r"components is \[\]"),
        (lambda r: r["components"].update(a=8), RecordError, "the scheme of a is 8; expected a te"),
        (lambda r: r["components"].update(a="imt8"), SchemeError, "a: unknown scheme 'imt8'; did"),
        (lambda r: r.update(size_bytes=-1), RecordError, "size_bytes is -1; expected a number of"),
        (lambda r: r.update(base_size_bytes=True), RecordError, "base_size_bytes is True"),
        (lambda r: r.update(trail={}), RecordError, "trail is {}; expected a list of steps"),
        (lambda r: r.update(trail=[{"what": 1}]), RecordError, "expected steps with a name"),
    ],
)
def test_a_plan_that_does_not_hold_what_it_should(change, kind, message, tmp_path):
    path = write(tmp_path / "odd plan.json", change)
    with pytest.raises(kind, match=message) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b'{"schema": ', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[1, 2]", "holds a list; expected a plan.json"),
        (b"SQLite format 3\x00\xff", "is a sweep, and no plan yet"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_file_that_is_no_plan(content, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_plan(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecordError, match=r"plan\.json does not exist; check the path"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(RecordError, match=r"is a folder; expected a file such as .*plan\.json"):
        read_plan(tmp_path)


def test_a_component_that_is_named_twice(written):
    text = written.read_text().replace('"b": "int8",', '"b": "int8", "b": "int4",')
    written.write_text(text)
    with pytest.raises(RecordError, match="names 'b' twice, as 'int8' and as 'int4'; each name"):
        read_plan(written)


def test_another_base(written):
    model = runs.model()
    mine = PlanFile({**BASE, "fingerprint": model.fingerprint}, {}, 1, 1)
    check_base(mine, model, written)
    with pytest.raises(DivergentTokensError) as caught:
        check_base(PLAN, model, written)
    assert re.search(
        r"plan\.json was made for demo \(fingerprint abababababab…\), and llama is another model",
        str(caught.value),
    )
