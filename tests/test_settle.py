"""Probing all and measuring what a plan hangs on, against measuring all."""

import numpy as np
import pytest

import runs
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.options import read_options
from divergent_tokens.search.selections import select
from divergent_tokens.search.settings import Method, Settings
from divergent_tokens.settle import settle
from divergent_tokens.sweep import sweep

SCHEMES = [parse_scheme("int8"), parse_scheme("int3")]
BUDGET = Budget(Unit.bits, 6.0)
OPTIONS = {"new_tokens": 10, "batch_size": 4}


def prompts():
    return runs.prompts(n=8, length=8)


def settled(model, out, budget=BUDGET, **options):
    components = find_components(model.network)
    given = (model, components, SCHEMES, prompts(), out, budget, Settings())
    return settle(*given, **{**OPTIONS, **options})


def measured(model, out):
    components = find_components(model.network)
    return sweep(model, components, SCHEMES, prompts(), out, method="measure", **OPTIONS)


def chosen(sensitivities, method):
    options = read_options(sensitivities, method=method)
    return options.schemes_of(select(options, BUDGET).options)


@pytest.mark.parametrize("seed", range(4))
def test_its_plan_is_as_good_as_that_of_measuring_everything(tmp_path, seed):
    """What it chooses otherwise costs no more than what the prompts leave open."""
    model = runs.model(seed=seed)
    found = settled(model, tmp_path / "auto.db")
    truth = measured(model, tmp_path / "all.db")
    rows = {(row.component, row.scheme): row for row in truth.rows}
    ours, best = chosen(found, Method.auto), chosen(truth, Method.measure)
    sums = [sum(rows[pair].kl for pair in plan.items()) for plan in (ours, best)]
    errors = [rows[pair].kl_se for plan in (ours, best) for pair in plan.items() ^ best.items()]
    assert sums[0] <= sums[1] + 2 * np.sqrt(np.square(errors).sum()) + 1e-9
    n_measured = sum(row.method == "measure" for row in found.rows)
    assert 0 < n_measured < len(truth.rows)


def test_what_is_measured_are_the_rows_of_a_whole_sweep(tmp_path):
    model = runs.model()
    found = settled(model, tmp_path / "auto.db")
    truth = {(r.component, r.scheme): r for r in measured(model, tmp_path / "all.db").rows}
    for row in found.rows:
        if row.method == "measure":
            assert row.kl == truth[row.component, row.scheme].kl


def test_how_it_went_stands_in_the_file(tmp_path):
    found = settled(runs.model(), tmp_path / "auto.db")
    kept = found.run["settled"]
    assert kept["budget"] == "--bits 6"
    looks = kept["looks"]
    assert looks[0]["n_changed"] is None
    assert looks[-1]["pairs"] == []
    assert all(0 <= look["sureness"] <= 1 for look in looks)
    pairs = {tuple(pair) for look in looks for pair in look["pairs"]}
    assert pairs == {(r.component, r.scheme) for r in found.rows if r.method == "measure"}
    # One draw: a forward pass, a backward pass, and the products of two schemes.
    assert kept["passes"]["probe"] == 4
    n_tokens = 8 * 8 + int(found.lengths.sum())
    assert kept["forward_tokens"] == round(sum(kept["passes"].values()) * n_tokens)


def test_stopped_while_it_measures_it_goes_on_and_ends_the_same(tmp_path):
    model = runs.model()
    whole = settled(model, tmp_path / "whole.db")

    class StopError(Exception):
        pass

    def stop_after(n):
        def progress(stage, done, _total, _unit):
            nonlocal n
            n -= stage == "sweep"
            if n < 0:
                raise StopError

        return progress

    stops = 0
    for n in range(1, 9):
        try:
            found = settled(model, tmp_path / "part.db", progress=stop_after(n))
        except StopError:
            stops += 1
        else:
            break
    assert stops >= 2
    assert [(r.component, r.scheme, r.method, r.kl) for r in found.rows] == [
        (r.component, r.scheme, r.method, r.kl) for r in whole.rows
    ]
    again = settled(model, tmp_path / "part.db")
    assert (
        again.run["settled"]["looks"]
        == settled(model, tmp_path / "whole.db").run["settled"]["looks"]
    )


def test_another_budget_goes_on_from_what_there_is(tmp_path):
    model, out = runs.model(), tmp_path / "auto.db"
    first = settled(model, out)
    second = settled(model, out, budget=Budget(Unit.bits, 5.0))
    assert {(r.component, r.scheme, r.method) for r in first.rows} <= {
        (r.component, r.scheme, r.method) for r in second.rows
    }
    assert settled(model, out, budget=Budget(Unit.bits, 5.0)).run["settled"]["budget"] == "--bits 5"


def test_below_the_rounding_floor_nothing_is_measured(tmp_path, monkeypatch):
    """A floor above all KLs, as bfloat16 has it for int8."""
    monkeypatch.setattr("divergent_tokens.settle.ROUNDING_FACTOR", 1e12)
    found = settled(runs.model(), tmp_path / "auto.db")
    assert all(row.method == "probe" for row in found.rows)


def test_a_budget_that_cannot_be_met_is_said_and_the_probe_is_kept(tmp_path):
    with pytest.raises(DivergentTokensError, match="--bits 1 cannot be met"):
        settled(runs.model(), tmp_path / "auto.db", budget=Budget(Unit.bits, 1.0))
    assert settled(runs.model(), tmp_path / "auto.db").rows
