"""Codes made ready for schemes and plans: from which text, and from no other than was measured."""

from dataclasses import replace
from functools import partial

import pytest

import runs
from divergent_tokens.calibrated import read_calibration, ready_plan, ready_schemes
from divergent_tokens.candidates import lent_candidates
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import check_plan, uniform_plan
from divergent_tokens.compress.plan_file import read_plan, write_plan
from divergent_tokens.compress.quantize import quantize
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import PromptError, SchemeError
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.search import search
from divergent_tokens.sweep import sweep


def test_a_plan_is_carried_out_with_the_codes_that_it_was_chosen_with(tmp_path, monkeypatch):
    """Sweep, search, and then another text: what would be written is not what was measured."""
    model = runs.model()
    components = find_components(model.network, include=["*.mlp.*"])
    (tmp_path / "other.txt").write_text("some other text than the one before\n")
    monkeypatch.setattr("divergent_tokens.compress.gptq.check_llm_compressor", lambda *_: None)
    monkeypatch.setattr(
        "divergent_tokens.compress.gptq.round_by_gptq",
        lambda weight, _moment, grid: quantize(weight, bits=grid.bits),
    )
    make = partial(ready_schemes, model, components, [parse_scheme("gptq:int4")], cache=tmp_path)
    swept = sweep(model, components, make(), runs.prompts(), tmp_path / "sweep.db", new_tokens=8)
    found = search(swept, Budget(Unit.share, 0.6))
    write_plan(tmp_path / "plan.json", found.plan_file())
    plan = read_plan(tmp_path / "plan.json").plan()
    assert plan.sources == {"gptq:int4": make()[0].source}
    ready = ready_plan(model, components, plan, cache=tmp_path)
    with lent_plan(model, ready, components=components):
        pass
    other = str(tmp_path / "other.txt")
    with pytest.raises(SchemeError, match="give --calibration as they were for dtm sweep"):
        ready_plan(model, components, plan, source=other, cache=tmp_path)
    (scheme,) = make(source=other)
    changed = replace(plan, schemes=dict.fromkeys(plan.schemes, scheme))
    with pytest.raises(SchemeError, match="made from other data now"):
        check_plan(changed, components)
    assert changed.digest != ready.digest


def test_what_the_base_draws_is_not_calibrated_on():
    with pytest.raises(PromptError, match="expected --calibration builtin, a file"):
        read_calibration("self", runs.model())


def test_a_plan_whose_codes_are_at_hand_keeps_them(tmp_path, monkeypatch):
    """Whoever lends it reads no text again, and takes no other codes from another place."""
    model = runs.model()
    components = find_components(model.network, include=["*.mlp.*"])
    monkeypatch.setattr("divergent_tokens.compress.gptq.check_llm_compressor", lambda *_: None)
    monkeypatch.setattr(
        "divergent_tokens.compress.gptq.round_by_gptq",
        lambda weight, _moment, grid: quantize(weight, bits=grid.bits),
    )
    plan = uniform_plan(components, parse_scheme("gptq:int4"))
    ready = ready_plan(model, components, plan, cache=tmp_path)
    monkeypatch.setattr("divergent_tokens.calibrated.read_calibration", None)
    schemes = list(ready.schemes.values())
    assert ready_plan(model, components, ready, cache=tmp_path / "elsewhere") is ready
    assert ready_schemes(model, components, schemes, cache=tmp_path / "elsewhere") == tuple(schemes)
    with lent_candidates(model, {"ready": ready}, components)["ready"]:
        pass
    assert not (tmp_path / "elsewhere").exists()
