"""A whole search on a sweep that no model made, and the plan that comes out."""

import json
from importlib import resources

import pytest
from jsonschema import Draft202012Validator

import sweeps
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.compress.plan_file import read_plan, write_plan
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.flips import UNFITTED, Reading
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.search import offers, search
from divergent_tokens.search.settings import Method, RankBy, Settings

FILE = resources.files("divergent_tokens") / "data" / "schemas" / "plan-1.json"
VALIDATOR = Draft202012Validator(json.loads(FILE.read_text(encoding="utf-8")))
HALF = Budget(Unit.share, 0.45)


def test_a_plan_with_its_trail(tmp_path):
    sweep = sweeps.sweep(scale=2e-7)
    found = search(sweep, HALF)
    offer = found.offer
    assert offer.size_bytes <= 0.45 * offer.base_size_bytes
    assert offer.gap == 0
    assert set(offer.components.values()) == {"int8", "int4"}
    file = found.plan_file({"step": "by hand"})
    write_plan(tmp_path / "plan.json", file)
    record = json.loads((tmp_path / "plan.json").read_text())
    assert not list(VALIDATOR.iter_errors(record))
    step, last = record["trail"]
    assert last == {"step": "by hand"}
    assert step["rank_by"] == "kl"
    assert step["schemes"] == ["int8", "int4"]
    assert step["budget"] == {"unit": "budget", "value": 0.45}
    assert step["predicted"]["kl"] > step["predicted"]["optimistic_kl"] > 0
    assert step["law"]["sdt"]["n_measured"] == 0
    assert list(step["picks"]) == [component.name for component in sweep.components]
    assert read_plan(tmp_path / "plan.json").components == offer.components


def test_the_offers_around_it_are_in_order():
    found = search(sweeps.sweep(scale=2e-7), HALF)
    assert [offer.budget.value for offer in found.around] == [0.35, 0.4, 0.45, 0.5, 0.55]
    assert found.around[2] is found.offer
    kls = [offer.forecast.kl for offer in found.around]
    assert kls == sorted(kls, reverse=True)
    fdts = [offer.forecast.prediction.fdt.value for offer in found.around]
    assert fdts == sorted(fdts)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [row["n_components"] for row in record["around"]][2] == len(found.offer.components)
    assert record["around"][2]["schemes"].keys() == {"int8", "int4"}


def test_the_same_search_gives_the_same():
    one, two = (search(sweeps.sweep(), HALF).to_json() for _ in range(2))
    assert one == two
    assert search(sweeps.sweep(), HALF, Settings(seed=1)).to_json() != one


def test_every_order_makes_a_plan_that_fits_the_schema(tmp_path):
    sweep = sweeps.sweep(methods=("probe", "measure"), scale=2e-7)
    for order in RankBy:
        if order is RankBy.ppl:
            continue
        found = search(sweep, HALF, Settings(rank_by=order))
        write_plan(tmp_path / "plan.json", found.plan_file())
        record = json.loads((tmp_path / "plan.json").read_text())
        assert not list(VALIDATOR.iter_errors(record)), order
        assert found.offer.forecast.cross_fitted == (order is RankBy.kl)
        assert found.law.sdt.n_measured > 0


def test_settings_reach_the_choice():
    sweep = sweeps.sweep(schemes=("int8", "int6", "int4"), methods=("probe", "measure"))
    found = search(sweep, HALF, Settings(schemes=("int8", "int4"), method=Method.probe))
    assert set(found.offer.components.values()) <= {"int8", "int4"}
    coupled = search(sweep, HALF, Settings(coupling=Coupling.vllm))
    for layer in range(4):
        block = f"model.layers.{layer}.self_attn"
        schemes = {coupled.offer.components.get(f"{block}.{part}_proj") for part in "qkv"}
        assert len(schemes) == 1
    assert coupled.to_json()["couple"] == "vllm"


def test_further_readings_move_the_constants():
    sweep = sweeps.sweep()
    assert search(sweep, HALF).law == UNFITTED
    found = search(sweep, HALF, readings=[Reading(1.7, 1.8, 500.0, 50.0)] * 3)
    assert found.law.sdt.value == pytest.approx(1.7)
    assert found.law.fdt.value == pytest.approx(1.8)


def test_above_the_limit_the_plan_is_made_and_nothing_is_promised():
    found = search(sweeps.sweep(scale=1e-2), HALF)
    assert found.offer.components
    record = found.step()["predicted"]
    assert record["fdt"] is None
    assert "above 0.3" in record["reason"]


def test_offers_for_several_counts():
    sweep = sweeps.sweep(schemes=("int8",))
    counts = [Budget(Unit.components, n) for n in (7, 14, 28)]
    found = offers(sweep, counts, Settings(), UNFITTED)
    assert [len(offer.components) for offer in found] == [7, 14, 28]
    assert found[0].components.items() <= found[1].components.items()


def test_a_budget_out_of_reach_is_refused():
    with pytest.raises(DivergentTokensError, match="cannot be met"):
        search(sweeps.sweep(), Budget(Unit.bits, 2))


def test_the_schema_of_a_search_is_strict():
    record = search(sweeps.sweep(), HALF).plan_file().to_json()
    assert not list(VALIDATOR.iter_errors(record))
    for name in record["trail"][0]:
        part = {**record, "trail": [{k: v for k, v in record["trail"][0].items() if k != name}]}
        assert list(VALIDATOR.iter_errors(part)), name
