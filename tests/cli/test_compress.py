"""`dtm compress` and `dtm verify`, from a plan to a folder that is what it says."""

import json
import os
import signal
import sys

import pytest

import runs
import tiny
from divergent_tokens.compress import checkpoint
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import size_bytes, uniform_plan
from divergent_tokens.compress.plan_file import PlanFile, write_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.models import outline_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("compress")
    runs.model().network.save_pretrained(place / "base")
    runs.model().tokenizer.save_pretrained(place / "base")
    rows = [{"text": f"{sentence} {i}"} for i, sentence in enumerate(tiny.SENTENCES * 2)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outline = outline_model(place / "base")
    components = find_components(outline.network)
    names = [component.name for component in components]
    whole = sum(component.base_size_bytes for component in components)
    base = {
        "reference": str(place / "base"),
        "fingerprint": outline.fingerprint,
        "model_type": "llama",
        "config": {},
    }
    for scheme in ("int8", "int6", "w8a8"):
        plan = uniform_plan(components, parse_scheme(scheme))
        size = size_bytes(plan, components)
        write_plan(
            place / f"{scheme}.json", PlanFile(base, dict.fromkeys(names, scheme), size, whole)
        )
    return place


@pytest.fixture
def settings(place):
    return [
        "--n-prompts",
        4,
        "--prefix",
        8,
        "--new-tokens",
        6,
        "--prompts",
        place / "prompts.jsonl",
    ]


def test_a_plan_is_written_and_verified(dtm, place, settings, tmp_path):
    out = tmp_path / "out"
    left = dtm("compress", place / "base", place / "int8.json", "--out", out)
    assert (left.code, left.err) == (0, "")
    words = " ".join(left.out.split())
    assert "MB of weights in 1 file" in words
    assert "int8 14" in words
    assert "By rule vllm loads it too." in words
    record = tmp_path / "verification.json"
    left = dtm("verify", out, *settings, "--cache", tmp_path / "cache", "--out", record)
    assert (left.code, left.err) == (0, "")
    assert "is what its plan says (14 components of" in " ".join(left.out.split())
    assert json.loads(record.read_text())["passed"] is True


def test_json_and_markdown(dtm, place, tmp_path):
    arguments = ("compress", place / "base", place / "int6.json")
    left = dtm(*arguments, "--out", tmp_path / "a", "--format", "json")
    found = json.loads(left.out)
    assert found["elsewhere"]["target"] == "vllm"
    assert found["elsewhere"]["n_problems"] == 14
    left = dtm(*arguments, "--out", tmp_path / "b", "--format", "markdown")
    assert "| int6 | 14 |" in left.out
    assert "vLLM loads integers of 4 and 8 bits" in left.out


def test_a_plan_of_nothing_is_said_to_be_one(dtm, place, tmp_path):
    plan = json.loads((place / "int8.json").read_text()) | {"components": {}}
    (tmp_path / "nothing.json").write_text(json.dumps(plan))
    left = dtm("compress", place / "base", tmp_path / "nothing.json", "--out", tmp_path / "out")
    assert left.code == 0
    assert "names no component: this is the base as it was" in " ".join(left.out.split())


def test_a_checkpoint_that_is_not_as_planned_ends_with_1(dtm, place, settings, tmp_path):
    out = tmp_path / "out"
    dtm("compress", place / "base", place / "int8.json", "--out", out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    left = dtm("verify", out, *settings, "--cache", tmp_path / "cache")
    assert left.code == 1
    assert "is not as its plan says: " in left.err
    assert "config: rms_norm_eps is 0.1" in left.err
    assert "is NOT what its plan says" in " ".join(left.out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["int8.json", "--dtype", "int4"], "--dtype is 'int4'; expected one of"),
        (["int6.json", "--target", "vllm"], "vllm would not load this plan rightly"),
        (["w8a8.json", "--dense"], "which dense weights cannot say"),
        (["missing.json"], "does not exist"),
    ],
)
def test_bad_input(dtm, place, tmp_path, arguments, said):
    name, *options = arguments
    left = dtm("compress", place / "base", place / name, "--out", tmp_path / "out", *options)
    assert (left.code, left.out) == (2, "")
    assert said in left.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused_before_the_base_is_read(dtm, place, tmp_path):
    (tmp_path / "kept").write_text("")
    left = dtm("compress", "no base at all", place / "int8.json", "--out", tmp_path)
    assert (left.code, left.out) == (2, "")
    assert "is not empty; name another" in left.err


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(dtm, place, tmp_path, monkeypatch, number):
    def interrupted(*_arguments):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    left = dtm("compress", place / "base", place / "int8.json", "--out", tmp_path / "out")
    assert left.code == 128 + number
    assert "nothing was left half written" in left.err
    assert list(tmp_path.iterdir()) == []


def test_bad_input_to_verify(dtm, place, tmp_path):
    assert "is no folder" in dtm("verify", tmp_path / "nowhere").err
    assert "plan.json does not exist" in dtm("verify", place / "base").err
    assert dtm("verify", place / "base").code == 2


@pytest.mark.parametrize("method", ["probe", "measure"])
def test_zeros_by_wanda_and_fisher_go_from_the_sweep_to_the_checkpoint(
    dtm, place, settings, tmp_path, method
):
    """Made once, and the same wherever they are taken; another text is refused."""
    texts = {"seen": " ".join(tiny.SENTENCES), "other": tiny.SENTENCES[0]}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    seen = ("--calibration", tmp_path / "seen.txt")
    schemes = ("wanda:0.5+int4:g8", "fisher:2:4+int8")
    asked = [part for scheme in schemes for part in ("--scheme", scheme)]
    cache = ("--cache", tmp_path / "cache")
    base, swept, plan = place / "base", tmp_path / "s.db", tmp_path / "plan.json"
    done = dtm("sweep", base, *asked, "--method", method, *settings, *seen, *cache, "--out", swept)
    assert done.code == 0, done.err
    made = sorted(path.parent for path in (tmp_path / "cache").rglob("mask.npy"))
    assert len(made) == 2 * 14
    done = dtm("search", swept, "--bits", 9, "--out", plan, *cache)
    assert done.code == 0, done.err
    chosen = set(json.loads(plan.read_text())["components"].values())
    assert chosen <= set(schemes)
    out = tmp_path / "out"
    other = dtm(
        "compress", base, plan, "--calibration", tmp_path / "other.txt", *cache, "--out", out
    )
    assert other.code == 2
    assert "give --calibration as they were for dtm sweep" in " ".join(other.err.split())
    assert not out.exists()
    done = dtm("compress", base, plan, *seen, *cache, "--out", out)
    assert done.code == 0, done.err
    done = dtm("verify", out, *settings, *seen, *cache)
    assert done.code == 0, done.out + done.err
    assert sorted(path.parent for path in (tmp_path / "cache").rglob("mask.npy")) == made
