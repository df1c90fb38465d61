"""Forecasts of chosen plans: what is promised on the prompts that chose, and on others."""

import dataclasses
from functools import partial

import numpy as np
import pytest

import sweeps
from divergent_tokens.measure.flips import UNFITTED
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.forecasts import forecast, measured_readings, sureness
from divergent_tokens.search.options import read_options
from divergent_tokens.search.selections import select
from divergent_tokens.search.settings import RankBy


def again(options, budget, harm):
    return select(options, budget, harm).options


def found(sweep, budget, **settings):
    """The forecast of what the budget chooses, and its true KL."""
    options = read_options(sweep, **settings)
    chosen = select(options, budget).options
    truth = sum(sweep.true_kl[pair] for pair in options.schemes_of(chosen).items())
    select_again = partial(again, options, budget)
    return forecast(options, chosen, select_again, sweep.margins, UNFITTED, seed=0), truth


def test_chosen_sums_are_optimistic_and_cross_fitted_ones_are_not():
    """Sixteen prompts, one noisy draw each: a budget between int8 and int4 for many components."""
    optimistic, honest, joint, n = [], [], [], 60
    for i in range(n):
        sweep = sweeps.sweep(n_layers=8, n_prompts=16, prompt_seed=i, scale=2e-7, seed=1)
        one, truth = found(sweep, Budget(Unit.share, 0.4))
        assert one.cross_fitted
        optimistic.append(one.optimistic_kl / truth)
        honest.append(one.kl / truth)
        joint.append(one.kl_joint / truth)
    assert np.mean(optimistic) < 0.8
    for values in (honest, joint):
        assert abs(np.mean(values) - 1) < 0.05 + 2 * np.std(values) / np.sqrt(n)


def test_the_standard_error_is_that_of_the_kl():
    """Its distance to the truth, over many sets of prompts."""
    distances, errors = [], []
    for i in range(60):
        sweep = sweeps.sweep(n_prompts=64, prompt_seed=i, scale=2e-6, noise=0.3)
        one, truth = found(sweep, Budget(Unit.components, 14), schemes=["int8"])
        distances.append(one.kl / truth - 1)
        errors.append(one.kl_se / truth)
    assert 0.75 < np.sqrt(np.mean(np.square(distances)) / np.mean(np.square(errors))) < 1.25


def test_an_order_that_is_not_by_kl_keeps_its_choice():
    sweep = sweeps.sweep(scale=1e-6)
    one, _ = found(sweep, Budget(Unit.share, 0.4), rank_by=RankBy.weight_error)
    assert not one.cross_fitted
    assert one.kl == pytest.approx(one.optimistic_kl)


def test_too_few_prompts_to_part():
    one, _ = found(sweeps.sweep(n_prompts=2, scale=1e-6), Budget(Unit.share, 0.4))
    assert not one.cross_fitted
    assert one.kl_se > 0
    alone, _ = found(sweeps.sweep(n_prompts=1, scale=1e-6), Budget(Unit.share, 0.4))
    assert alone.kl is not None
    assert alone.kl_se is None


def test_measured_rows_have_no_interactions():
    one, _ = found(sweeps.sweep(methods=("measure",), scale=1e-6), Budget(Unit.share, 0.4))
    assert one.kl_joint is None
    assert one.kl is not None


def test_interactions_are_seen():
    """Two components that do the very same: their joint KL is four times one's, not twice."""
    sweep = sweeps.sweep(n_layers=1, schemes=("int8",), scale=1e-6)
    first, second, *_ = sweep.components
    draws = {key: np.zeros_like(value) for key, value in sweep.all_draws.items()}
    draws[first.name, "int8"] = draws[second.name, "int8"] = sweep.all_draws[first.name, "int8"]
    one, _ = found(dataclasses.replace(sweep, all_draws=draws), Budget(Unit.components, 7))
    assert one.kl_joint == pytest.approx(2 * one.kl, rel=1e-5)


def test_above_the_limit_nothing_is_promised():
    one, truth = found(sweeps.sweep(scale=1e-3), Budget(Unit.share, 0.3))
    assert truth > 0.3
    record = one.to_json()
    for name in ("kl", "kl_se", "kl_joint", "optimistic_kl", "fdt", "sdt"):
        assert record[name] is None
    assert "above 0.3" in record["reason"]


def test_how_sure_a_pick_is():
    sweep = sweeps.sweep(n_layers=6, schemes=("int8",), noise=0.5)
    options, budget = read_options(sweep), Budget(Unit.components, 20)
    chosen = select(options, budget).options
    shares = sureness(options, chosen, partial(again, options, budget), seed=0)
    assert list(shares) == list(options.names)
    # Far from the border there is no doubt, at it there is.
    order = np.argsort(options.harm[:, 1])
    values = np.array(list(shares.values()))[order]
    assert (values[:8] == 1).all()
    assert (values[-8:] > 0.95).all()
    assert values[17:23].min() < 0.9


def test_members_of_a_group_are_as_sure_as_each_other():
    sweep = sweeps.sweep(n_layers=2, schemes=("int8",))
    options = read_options(sweep)
    together = dataclasses.replace(options, groups=tuple((i, i + 7) for i in range(7)))
    together = dataclasses.replace(together, harm=options.harm[:7], size=2 * options.size[:7])
    together = dataclasses.replace(together, nats=options.nats[:7], draws=None)
    budget = Budget(Unit.components, 6)
    chosen = select(together, budget).options
    shares = list(sureness(together, chosen, partial(again, together, budget), seed=0).values())
    assert shares[:7] == shares[7:]


def test_nothing_is_known_of_picks_by_other_orders_or_by_one_prompt():
    for sweep, order in (
        (sweeps.sweep(), RankBy.weight_error),
        (sweeps.sweep(n_prompts=1), RankBy.kl),
    ):
        options = read_options(sweep, rank_by=order)
        assert sureness(options, np.zeros(28, int), lambda harm: harm, seed=0) == {}


def test_readings_come_from_measured_rows_above_rounding():
    sweep = sweeps.sweep(methods=("probe", "measure"), n_prompts=64, scale=1e-4)
    found = measured_readings(sweep)
    assert len(found) == 56
    values = [reading.sdt for reading in found if reading.sdt is not None]
    assert np.median(values) == pytest.approx(sweeps.LAW, rel=0.1)
    floor = dataclasses.replace(sweep, rounding_kl=max(row.kl for row in sweep.rows) / 3)
    assert len(measured_readings(floor)) == 1
    assert measured_readings(sweeps.sweep()) == ()
