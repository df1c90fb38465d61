"""`dtm verify` from the command line: its verdict, its exit codes, and what is bad input."""

import json
import shutil

import pytest

import runs
import tiny
from divergent_tokens.compress.checkpoint import write_checkpoint
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import size_bytes, uniform_plan
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.models import outline_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, its checkpoint in int8, and prompts."""
    place = tmp_path_factory.mktemp("verify")
    runs.model().network.save_pretrained(place / "base")
    runs.model().tokenizer.save_pretrained(place / "base")
    rows = [{"text": f"{sentence} {i}"} for i, sentence in enumerate(tiny.SENTENCES * 2)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outline = outline_model(place / "base")
    plan = uniform_plan(find_components(outline.network), parse_scheme("int8"))
    components = find_components(outline.network)
    base = {
        "reference": str(place / "base"),
        "fingerprint": outline.fingerprint,
        "model_type": "llama",
        "config": {},
    }
    whole = sum(component.base_size_bytes for component in components)
    texts = dict.fromkeys(plan.schemes, "int8")
    file = PlanFile(base, texts, size_bytes(plan, components), whole)
    write_checkpoint(outline, file, place / "int8")
    return place


@pytest.fixture
def verify(dtm, place, tmp_path):
    prompts = ("--n-prompts", 4, "--prefix", 8, "--new-tokens", 6)
    settings = (*prompts, "--prompts", place / "prompts.jsonl", "--cache", tmp_path / "cache")

    def run(folder, *more):
        return dtm("verify", folder, *settings, *more)

    return run


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place / "int8", tmp_path / "copy")


def test_it_holds_what_its_plan_says(verify, copy, place, tmp_path):
    moved = shutil.copytree(place / "base", tmp_path / "moved")
    plan = json.loads((copy / "plan.json").read_text())
    plan["base"]["reference"] = str(tmp_path / "where it was")
    (copy / "plan.json").write_text(json.dumps(plan))
    left = verify(copy)
    assert (left.code, left.out) == (2, "")
    assert "where it was does not exist" in left.err
    left = verify(copy, "--base", moved, "--out", tmp_path / "verification.json")
    assert (left.code, left.err) == (0, "")
    assert "is what its plan says" in " ".join(left.out.split())
    assert "By rule vllm loads such a checkpoint rightly." in " ".join(left.out.split())
    record = json.loads((tmp_path / "verification.json").read_text())
    assert (record["passed"], record["command"][:2]) == (True, ["dtm", "verify"])


def test_its_record_may_lie_beside_the_checkpoint(verify, copy):
    out = copy / "verification.json"
    assert verify(copy, "--out", out).code == 0
    first = out.read_text()
    assert verify(copy, "--out", out).code == 0
    assert json.loads(out.read_text())["passed"]
    assert json.loads(first)["checks"] == json.loads(out.read_text())["checks"]


def test_a_byte_that_changed(verify, copy, tmp_path):
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 64
    file.write_bytes(content)
    left = verify(copy, "--format", "json", "--out", tmp_path / "verification.json")
    assert left.code == 1
    assert f"{copy} is not as its plan says: weights: " in left.err
    record = json.loads(left.out)
    assert record == json.loads((tmp_path / "verification.json").read_text())
    assert record["passed"] is False
    assert record["worst"]["component"] in left.err


def test_a_dense_checkpoint_whose_config_names_another_dtype(verify, place, copy):
    """The base is loaded as the config says, and every rounded weight would be as expected."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    left = verify(copy)
    assert left.code == 1
    assert "config: dtype is bfloat16, and the weights are float32" in left.err


def test_a_plan_that_is_not_this_models(verify, copy):
    plan = json.loads((copy / "plan.json").read_text())
    named = plan | {"components": {"model.layers.7.mlp.up_proj": "int8"}}
    (copy / "plan.json").write_text(json.dumps(named))
    left = verify(copy)
    assert (left.code, left.out) == (2, "")
    assert "'model.layers.7.mlp.up_proj'" in left.err
    (copy / "plan.json").write_text(
        json.dumps(plan | {"base": plan["base"] | {"fingerprint": "0"}})
    )
    left = verify(copy)
    assert (left.code, left.out) == (2, "")
    assert "is another model" in left.err


def test_bad_input(verify, place, tmp_path):
    for folder, options, said in (
        (tmp_path / "nowhere", (), "is no folder; name one that `dtm compress` wrote"),
        (place / "base", (), "plan.json does not exist"),
        (place / "int8", ("--out", tmp_path), "is a folder; name the file to write"),
        (place / "int8", ("--out", place / "int8" / "plan.json"), "which is read; name another"),
        (place / "int8", ("--prefix", 400), "no room in the 256 positions"),
    ):
        left = verify(folder, *options)
        assert (left.code, left.out) == (2, ""), said
        assert said in left.err
