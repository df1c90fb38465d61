"""The flip law against sums written out, noise that is drawn, and what it must do at its ends."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from divergent_tokens.measure.flips import (
    KL_LIMIT,
    UNFITTED,
    Constant,
    FlipLaw,
    Reading,
    expected,
    fit,
    predict,
    readings,
)
from divergent_tokens.measure.intervals import survival

margin_rows = st.lists(st.lists(st.floats(-0.5, 8), min_size=1, max_size=9), min_size=1, max_size=5)
sigmas = st.floats(1e-3, 50)


def draw_margins(n_prompts=120, n_tokens=60, seed=0):
    """Like a language model's: many tokens are certain, the density near zero is constant."""
    rng = np.random.default_rng(seed)
    return list(rng.gamma(1.0, 3.0, (n_prompts, n_tokens)))


def slowly(margins, sigma):
    """SDT, FDT and the squared FDT of each prompt, written out."""
    flips = [[float(norm.cdf(-m / sigma)) for m in row] for row in margins]
    sdt = sum(map(sum, flips)) / sum(map(len, flips))
    fdt, squared = [], []
    for row in flips:
        chances = [math.prod(1 - p for p in row[:t]) * row[t] for t in range(len(row))]
        ends = [*enumerate(chances), (len(row), math.prod(1 - p for p in row))]
        fdt.append(sum(t * p for t, p in ends))
        squared.append(sum(t * t * p for t, p in ends))
    return sdt, fdt, squared


@given(margin_rows, sigmas)
def test_the_sums_written_out(margins, sigma):
    found = expected(margins, sigma)
    sdt, fdt, squared = slowly(margins, sigma)
    assert found.sdt == pytest.approx(sdt, abs=1e-12)
    assert found.fdt == pytest.approx(np.mean(fdt), abs=1e-9)
    within = np.mean([s - f * f for f, s in zip(fdt, squared, strict=True)])
    between = np.var(fdt, ddof=1) if len(fdt) > 1 else 0
    assert found.fdt_variance == pytest.approx(within + between, abs=1e-8)
    assert found.fdt_variance_between == pytest.approx(between, abs=1e-8)


@given(st.lists(st.lists(st.floats(0, 8), min_size=1, max_size=9), min_size=1), sigmas, sigmas)
def test_more_noise_flips_more(margins, one, other):
    less, more = (expected(margins, sigma) for sigma in sorted((one, other)))
    assert less.sdt <= more.sdt + 1e-12
    assert less.fdt >= more.fdt - 1e-9
    assert (less.survival >= more.survival - 1e-12).all()


@given(margin_rows, sigmas)
def test_curves_fall_within_their_range(margins, sigma):
    found = expected(margins, sigma)
    assert 0 <= found.sdt <= 1
    assert 0 <= found.fdt <= max(map(len, margins))
    assert found.survival[0] <= 1
    assert (np.diff(found.survival) <= 1e-12).all()
    assert found.sdt_variance >= found.sdt_variance_between >= 0


def test_the_example_of_the_docstring():
    found = expected([[0, 1]], 1.0)
    assert (found.sdt, found.fdt) == (
        pytest.approx(0.329, abs=1e-3),
        pytest.approx(0.921, abs=1e-3),
    )
    assert found.survival == pytest.approx([0.5, 0.5 * (1 - 0.158655)])


def test_the_ends():
    margins = [[1.0, -0.5, 2.0], [0.0, 3.0]]
    still = expected(margins, 0)
    assert still.sdt == (1 + 0.5) / 5
    assert still.fdt == (1 + 1.0) / 2  # flips at 1; at 0 or never, which is 2
    assert expected(margins, 1e-9).sdt == pytest.approx(still.sdt)
    assert expected(margins, 1e9).sdt == pytest.approx(0.5)
    assert expected([[np.inf, 5.0]], 0).fdt == 2
    # Certain tokens hold for good, whatever the others do.
    assert expected([[40.0] * 3 + [0.0]], 0.1).fdt == 3.5
    with pytest.raises(ValueError, match="no margins"):
        expected([[], []], 1.0)


def test_an_empty_completion_changes_no_share():
    assert expected([[1.0], []], 1.0).sdt == expected([[1.0]], 1.0).sdt


def test_survival_is_what_kaplan_and_meier_find():
    """Completions of different lengths, noise drawn a few thousand times."""
    rng = np.random.default_rng(0)
    margins = [rng.gamma(1, 2, length) for length in (3, 9, 9, 14, 20)]
    found = expected(margins, 1.5)
    fdt, censored = [], []
    for row in margins:
        flipped = rng.normal(0, 1.5, (4000, len(row))) > row  # [draw, token]
        any_flip = flipped.any(1)
        fdt += list(np.where(any_flip, flipped.argmax(1), len(row)))
        censored += list(~any_flip)
    measured = survival(fdt, censored).share
    assert found.survival == pytest.approx(measured, abs=0.015)
    assert found.fdt == pytest.approx(np.mean(fdt), abs=0.1)


# --- constants ---


def measured(margins, kl, a, rng):
    """SDT and mean FDT of one drawing of the law itself, on these margins."""
    flipped = rng.normal(0, a * math.sqrt(kl), np.shape(margins)) > margins
    n_tokens = flipped.shape[1]
    fdt = np.where(flipped.any(1), flipped.argmax(1), n_tokens)
    return float(flipped.mean()), float(fdt.mean())


@given(st.floats(1e-4, 0.2), st.floats(0.5, 6))
def test_a_reading_inverts_the_law(kl, a):
    margins = draw_margins(10, 20)
    exact = expected(margins, a * math.sqrt(kl))
    (found,) = readings(margins, [(kl, exact.sdt, exact.fdt)])
    assert found.sdt == pytest.approx(a, rel=1e-3)
    assert found.fdt == pytest.approx(a, rel=1e-3)
    usual = expected(margins, 2.4 * math.sqrt(kl))
    assert found.n_flips == pytest.approx(usual.sdt * 200, rel=1e-2)
    assert found.n_first == pytest.approx(usual.n_first, rel=1e-2)


def test_what_no_noise_gives():
    margins = [[1.0, 2.0, -1.0], [3.0, 4.0, 5.0]]

    def constants(**changes):
        given = {"kl": 0.01, "sdt": 0.2, "fdt": 2.0} | changes
        (found,) = readings(margins, [tuple(given.values())])
        return found.sdt, found.fdt

    assert min(constants()) > 0
    assert constants(sdt=0.0)[0] == 0  # nothing diverged
    assert constants(sdt=1 / 7)[0] == 0  # fewer than have a negative margin
    assert constants(sdt=0.7)[0] is None
    assert constants(fdt=3.0)[1] == 0  # the first prompt ends at 2 without any noise
    assert constants(fdt=0.0)[1] is None
    assert constants(kl=0.0) == (None, None)


def test_fitted_constants_find_what_was_planted():
    rng = np.random.default_rng(1)
    margins, planted = draw_margins(), rng.lognormal(math.log(1.8), 0.1, 30)
    kls = 10 ** rng.uniform(-3.5, -1, 30)
    rows = [(kl, *measured(margins, kl, a, rng)) for kl, a in zip(kls, planted, strict=True)]
    law = fit(readings(margins, rows))
    assert law.sdt.value == pytest.approx(1.8, rel=0.06)
    assert law.fdt.value == pytest.approx(1.8, rel=0.08)
    assert 0.07 < law.sdt.spread < 0.16
    assert law.sdt.n_measured == law.fdt.n_measured == 30


def test_candidates_that_hardly_diverge_do_not_bend_the_constant():
    """Many have no divergent token; where there is one it was luck."""
    rng = np.random.default_rng(3)
    margins = draw_margins(40, 20)
    rows = [(kl, *measured(margins, kl, 2.0, rng)) for kl in 10 ** rng.uniform(-6, -3.5, 1500)]
    assert np.mean([sdt == 0 for _, sdt, _ in rows]) > 0.3
    law = fit(readings(margins, rows))
    assert law.sdt.value == pytest.approx(2.0, rel=0.08)
    assert law.fdt.value == pytest.approx(2.0, rel=0.08)


def test_without_readings_other_bases_speak():
    assert fit([]) == UNFITTED
    assert fit([Reading(None, None, 0.0, 0.0)]) == UNFITTED
    assert fit([Reading(0.0, 0.0, 0.1, 0.1)]) == UNFITTED  # nothing was seen to diverge
    one = fit([Reading(1.5, None, 400.0, 0.0)])
    assert one.sdt.value == pytest.approx(1.5)
    assert one.sdt.spread == UNFITTED.sdt.spread  # one reading has none of its own
    assert one.fdt == UNFITTED.fdt


def test_a_reading_counts_by_what_it_rests_on():
    law = fit([Reading(2.0, 2.0, 900.0, 90.0), Reading(4.0, 4.0, 3.0, 0.3)])
    assert 2.0 < law.sdt.value < 2.01
    assert law.sdt.n_measured == 2


# --- predictions ---


def test_the_intervals_hold_what_is_measured_on_other_prompts():
    rng = np.random.default_rng(2)
    law = FlipLaw(Constant(2.0, 0.15, 9), Constant(2.0, 0.15, 9))
    held = {"sdt": 0, "fdt": 0}
    n = 300
    for i in range(n):
        kl = 10 ** rng.uniform(-3.5, -1)
        seen_kl = kl * math.exp(rng.normal(0, 0.1))
        a = 2.0 * math.exp(rng.normal(0, 0.15))
        sdt, fdt = measured(draw_margins(seed=1000 + i), kl, a, rng)
        found = predict(draw_margins(seed=i), seen_kl, law, kl_se=0.1 * seen_kl)
        held["sdt"] += found.sdt.low <= sdt <= found.sdt.high
        held["fdt"] += found.fdt.low <= fdt <= found.fdt.high
    assert 0.91 < held["sdt"] / n < 0.99
    assert 0.91 < held["fdt"] / n < 0.99


def test_what_widens_an_interval():
    margins = draw_margins()

    def width(**settings):
        found = predict(margins, 0.01, **settings)
        return found.fdt.high - found.fdt.low, found.sdt.high - found.sdt.low

    plain = width()
    sharp = FlipLaw(Constant(2.4, 0.1, 9), Constant(2.4, 0.1, 9))
    for other in (width(kl_se=0.005), width(n_prompts=10), width(level=0.99)):
        assert all(one < more for one, more in zip(plain, other, strict=True))
    assert all(one > less for one, less in zip(plain, width(law=sharp), strict=True))
    assert predict(margins, 0.01, n_prompts=10).fdt.n_prompts == 10


@pytest.mark.parametrize("kl", [0.0, 1e-8, 0.01, 0.29])
def test_a_prediction_stays_in_range_and_goes_to_json(kl):
    margins = [*draw_margins(8, 20), np.array([0.5])]
    found = predict(margins, kl, kl_se=kl)
    for part, top in ((found.sdt, 1), (found.fdt, 20)):
        assert 0 <= part.low <= part.value <= part.high <= top
    for t, share, low, high in found.survival:
        assert 0 <= low <= share <= high <= 1, t
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["reason"] is None
    assert record["fdt"]["level"] == 0.95
    assert len(record["survival"]) == 20


def test_nothing_is_expected_of_an_unchanged_model():
    found = predict(draw_margins(5, 9), 0.0)
    assert (found.sdt.value, found.fdt.value) == (0, 9)
    assert all(share == 1 for _, share, *_ in found.survival)


def test_that_nothing_diverges_is_within_the_interval_where_it_is_likely_enough():
    found = predict([[0.05, *[9.0] * 19]] * 4, 1e-4)  # one chance in sixty for every prompt
    assert found.sdt.low == 0 < found.sdt.value
    assert found.fdt.value < found.fdt.high == 20
    assert predict([[0.05, *[9.0] * 19]] * 40, 1e-2).sdt.low > 0


def test_above_the_limit_there_is_a_reason_and_no_number():
    found = predict(draw_margins(5, 9), KL_LIMIT * 1.01)
    assert (found.sdt, found.fdt, found.survival) == (None, None, ())
    assert "0.3" in found.reason
    assert predict(draw_margins(5, 9), KL_LIMIT).reason is None


def test_above_the_limit_nothing_is_read_off():
    # A plan that wrecks the model would count for most: it has the most divergences.
    margins = draw_margins()
    fine, wrecked = readings(margins, [(KL_LIMIT, 0.2, 5.0), (KL_LIMIT * 1.01, 0.2, 5.0)])
    assert fine.sdt is not None
    assert wrecked == Reading(None, None, 0.0, 0.0)
    assert fit([fine, wrecked]) == fit([fine])


def test_predictions_fall_as_the_kl_rises():
    margins = draw_margins(20, 30)
    found = [predict(margins, kl) for kl in (1e-4, 1e-3, 1e-2, 1e-1)]
    for less, more in itertools.pairwise(found):
        assert less.fdt.value > more.fdt.value
        assert less.sdt.value < more.sdt.value
