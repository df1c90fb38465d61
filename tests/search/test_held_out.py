"""Plans measured as a whole on prompts that did not choose them."""

import json
from importlib import resources

import pytest
from jsonschema import Draft202012Validator

import runs
from divergent_tokens.candidates import scheme_candidates
from divergent_tokens.compress.plan_file import PlanFile, write_plan
from divergent_tokens.errors import RecordError, SchemeError
from divergent_tokens.measure.comparison import compare
from divergent_tokens.measure.flips import Reading
from divergent_tokens.search.held_out import measure_plans, readings_of

FILE = resources.files("divergent_tokens") / "data" / "schemas" / "plan-1.json"
VALIDATOR = Draft202012Validator(json.loads(FILE.read_text(encoding="utf-8")))
MLP = [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def base():
    return runs.changed(runs.model(), lambda network: None, "base")


def plan(base, scheme, names=MLP, trail=()):
    identity = {"reference": "base", "model_type": "llama", "config": {}}
    identity["fingerprint"] = "ab" * 32
    return PlanFile(identity, dict.fromkeys(names, scheme), 1, 2, tuple(trail))


def test_the_numbers_are_those_of_a_comparison(base, tmp_path):
    prompts = runs.prompts(8)
    seen = {prompts.prompts[i].digest for i in (1, 4)} | {"another"}
    plans = {"mild": plan(base, "int8"), "hard": plan(base, "int4:g8")}
    steps = measure_plans(base, plans, prompts, chosen_on=seen, new_tokens=12)
    assert list(steps) == ["mild", "hard"]
    lent = scheme_candidates(base, "int8", "int4:g8", include=["*.mlp.*"])
    found = compare(base, lent, prompts, new_tokens=12)
    for step, result in zip(steps.values(), found.candidates, strict=True):
        assert step["metrics"] == result.metrics.to_json()
        assert step["overlap"] == 2
        assert step["rounding_kl"] == found.rounding.kl.value
        assert step["prompts"]["n_prompts"] == 8
        file = plan(base, "int8", trail=[step])
        write_plan(tmp_path / "plan.json", file)
        record = json.loads((tmp_path / "plan.json").read_text())
        assert not list(VALIDATOR.iter_errors(record))


def test_readings_come_back_from_the_trail(base, tmp_path):
    steps = measure_plans(
        base,
        {"plan": plan(base, "int4:g8")},
        runs.prompts(8),
        chosen_on=(),
        new_tokens=12,
    )
    step = steps["plan"]
    rounding = {**step, "rounding_kl": step["metrics"]["kl"]["value"]}
    other = {"step": "search", "reading": "of nothing"}
    path = tmp_path / "plan.json"
    write_plan(path, plan(base, "int4:g8", trail=[other, step, rounding]))
    (reading,) = readings_of(path, fingerprint="ab" * 32)
    assert reading == Reading(**step["reading"])
    assert reading.sdt > 0
    assert reading.n_flips > reading.n_first > 0


def test_trails_that_are_not_ours(base, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, plan(base, "int8", trail=[{"step": "measured"}]))
    with pytest.raises(RecordError, match=r"plan\.json: a step 'measured' of its trail does not"):
        readings_of(path, fingerprint="ab" * 32)
    with pytest.raises(RecordError, match="made for base, another base than the sweep's"):
        readings_of(path, fingerprint="cd" * 32)


def test_a_plan_that_does_not_fit_is_refused_before_any_work(base):
    wrong = plan(base, "int8", names=["model.layers.9.mlp.up_proj"])
    with pytest.raises(SchemeError, match=r"'model\.layers\.9\.mlp\.up_proj' \(1 of 1 names\)"):
        measure_plans(base, {"wrong": wrong}, runs.prompts(2), chosen_on=(), new_tokens=4)
