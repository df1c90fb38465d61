"""Intervals: hand-worked cases, exact bounds where nothing happened, and slow obvious versions."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from divergent_tokens.measure import intervals
from divergent_tokens.measure.intervals import (
    estimate_difference,
    estimate_mean,
    estimate_ratio,
    holm,
    median_fdt,
    pooled,
    sign_flip_p_value,
    survival,
)

LENGTH = 32


def some_rows(n, seed=0):
    """Counts of divergent tokens, lengths, nats and FDT of n made-up prompts."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(n) < 0.3, rng.integers(5, LENGTH, n), LENGTH)
    divergent = rng.binomial(lengths, rng.beta(0.5, 5, n))
    nats = rng.gamma(1.0, 1.0, n) * lengths
    fdt = np.minimum(rng.geometric(0.05, n) - 1, lengths)
    return divergent, lengths, nats, fdt


def every_estimate(n, seed=0, order=slice(None), **settings):
    divergent, lengths, nats, fdt = (row[order] for row in some_rows(n, seed))
    return {
        "fdt": estimate_mean(fdt, ceiling=lengths, **settings),
        "sdt": estimate_ratio(divergent, lengths, unit="share", **settings),
        "kl": estimate_ratio(nats / 100, lengths, unit="nats", **settings),
        "dppl": estimate_ratio(nats, lengths, unit="perplexity", **settings),
        "difference": estimate_difference(fdt, divergent, ceiling=lengths, **settings),
    }


def clopper_pearson(k, n, level=0.95):
    found = stats.binomtest(k, n).proportion_ci(level, method="exact")
    return found.low, found.high


# Values


def test_values_by_hand():
    assert estimate_mean([0, 3, 8], ceiling=8).value == pytest.approx(11 / 3)
    assert estimate_ratio([1, 0, 3], [8, 4, 8], unit="share").value == pytest.approx(4 / 20)
    assert estimate_ratio([1.5, 0.5], [2, 3], unit="nats").value == pytest.approx(0.4)
    assert estimate_ratio([1.5, 0.5], [2, 3], unit="perplexity").value == pytest.approx(
        math.exp(0.4)
    )
    assert estimate_difference([3, 1], [1, 2], ceiling=8).value == 0.5


def test_a_ratio_is_pooled_and_not_a_mean_of_ratios():
    assert estimate_ratio([1, 0], [1, 99], unit="share").value == pytest.approx(0.01)


def test_perplexity_is_exp_of_nats_at_the_end():
    _, lengths, nats, _ = some_rows(40)
    plain = estimate_ratio(nats, lengths, unit="nats")
    perplexity = estimate_ratio(nats, lengths, unit="perplexity")
    for side in ("value", "low", "high"):
        assert getattr(perplexity, side) == pytest.approx(math.exp(getattr(plain, side)))


# Intervals


@pytest.mark.parametrize("n", [2, 3, 20, 300])
def test_an_interval_holds_its_value(n):
    for name, e in every_estimate(n).items():
        assert e.low < e.value < e.high, name
        assert (e.level, e.n_prompts, e.seed) == (0.95, n, 0)


def test_a_higher_level_is_wider():
    narrow, middle, wide = (every_estimate(60, level=level) for level in (0.5, 0.9, 0.99))
    for name in narrow:
        assert wide[name].low < middle[name].low < narrow[name].low, name
        assert narrow[name].high < middle[name].high < wide[name].high, name


def test_more_prompts_are_narrower_by_the_root_of_their_number():
    divergent, lengths, _, fdt = some_rows(100)
    for n_times, at_least, at_most in ((4, 1.8, 2.7), (16, 3.6, 5.5)):
        for estimate in (
            lambda k: estimate_mean(np.tile(fdt, k), ceiling=np.tile(lengths, k)),
            lambda k: estimate_ratio(np.tile(divergent, k), np.tile(lengths, k), unit="share"),
        ):
            once, often = estimate(1), estimate(n_times)
            ratio = (once.high - once.low) / (often.high - often.low)
            assert once.value == pytest.approx(often.value)
            assert at_least < ratio < at_most


def test_the_order_of_prompts_changes_nothing():
    shuffled = np.random.default_rng(1).permutation(60)
    assert every_estimate(60)["fdt"].low == every_estimate(60, order=shuffled)["fdt"].low
    for name, e in every_estimate(60, order=shuffled).items():
        expected = every_estimate(60)[name]
        assert e.value == pytest.approx(expected.value, rel=1e-14), name
        assert (e.low, e.high) == pytest.approx((expected.low, expected.high), rel=1e-12), name


def test_a_seed_repeats_and_another_seed_hardly_matters():
    assert every_estimate(60, seed=0) == every_estimate(60, seed=0)
    divergent, lengths, _, _ = some_rows(60)
    a, b = (estimate_ratio(divergent, lengths, unit="share", seed=seed) for seed in (0, 1))
    assert a != b
    assert (a.low, a.high) == pytest.approx((b.low, b.high), rel=0.1)


def test_many_prompts_come_in_blocks_of_bounded_size(monkeypatch):
    divergent, lengths, _, _ = some_rows(60)
    at_once = estimate_ratio(divergent, lengths, unit="share")
    monkeypatch.setattr(intervals, "_BLOCK", 500)
    in_blocks = estimate_ratio(divergent, lengths, unit="share")
    assert (in_blocks.low, in_blocks.high) == pytest.approx((at_once.low, at_once.high), rel=1e-12)


def test_many_prompts_give_the_normal_interval():
    """With thousands of prompts and no heavy tail every sound method agrees with the textbook's."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(20, 129, 20_000)
    sums = rng.binomial(lengths, 0.3)
    e = estimate_ratio(sums, lengths, unit="share")
    residual = sums - e.value * lengths
    half = 1.96 * residual.std(ddof=1) / math.sqrt(len(sums)) / lengths.mean()
    assert e.low == pytest.approx(e.value - half, abs=0.1 * half)
    assert e.high == pytest.approx(e.value + half, abs=0.1 * half)


def test_swapping_the_candidates_mirrors_the_difference():
    divergent, lengths, _, fdt = some_rows(200)
    there = estimate_difference(fdt, divergent, ceiling=lengths)
    back = estimate_difference(divergent, fdt, ceiling=lengths)
    assert back.value == -there.value
    width = there.high - there.low
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=0.1 * width)


@pytest.mark.parametrize(("scheme", "at_least"), [("mild", 0.90), ("strong", 0.92)])
def test_intervals_cover(scheme, at_least):
    """400 samples of 50 prompts of a skewed share, where the percentile bootstrap covers 0.86."""
    rng = np.random.default_rng(7)
    rates = rng.lognormal(-5.5, 1.3, 4000) if scheme == "mild" else rng.beta(4, 10, 4000)
    population = rng.binomial(128, np.minimum(rates, 0.9))
    truth = population.sum() / (128 * 4000)
    hits = 0
    for trial in range(400):
        sample = rng.choice(population, 50)
        e = estimate_ratio(sample, np.full(50, 128), unit="share", seed=trial)
        hits += e.low <= truth <= e.high
    assert at_least < hits / 400 < 0.99


# Nothing happened


@pytest.mark.parametrize("n", [2, 10, 50])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_no_divergent_prompt_gives_the_exact_binomial_bound(n, level):
    _, unseen = clopper_pearson(0, n, level)
    lengths = np.full(n, LENGTH)
    sdt = estimate_ratio(np.zeros(n), lengths, unit="share", level=level)
    assert (sdt.value, sdt.low) == (0, 0)
    assert sdt.high == pytest.approx(unseen)
    fdt = estimate_mean(lengths, ceiling=lengths, level=level)
    assert (fdt.value, fdt.high) == (LENGTH, LENGTH)
    assert fdt.low == pytest.approx(LENGTH * (1 - unseen))
    acceptance = estimate_ratio(lengths, lengths, unit="share", level=level)
    assert (acceptance.value, acceptance.high) == (1, 1)
    assert acceptance.low == pytest.approx(1 - unseen)
    difference = estimate_difference(lengths, lengths, ceiling=lengths, level=level)
    assert difference.value == 0
    assert (difference.low, difference.high) == pytest.approx((-LENGTH * unseen, LENGTH * unseen))


def test_zero_nats_have_no_high_bound():
    kl = estimate_ratio(np.zeros(50), np.full(50, LENGTH), unit="nats")
    assert (kl.value, kl.low, kl.high) == (0, 0, None)
    dppl = estimate_ratio(np.zeros(50), np.full(50, LENGTH), unit="perplexity")
    assert (dppl.value, dppl.low, dppl.high) == (1, 1, None)


def test_every_prompt_diverging_at_once_gives_the_exact_binomial_bound():
    _, unseen = clopper_pearson(0, 20)
    fdt = estimate_mean(np.zeros(20), ceiling=LENGTH)
    assert (fdt.value, fdt.low) == (0, 0)
    assert fdt.high == pytest.approx(LENGTH * unseen)
    sdt = estimate_ratio(np.full(20, LENGTH), np.full(20, LENGTH), unit="share")
    assert (sdt.low, sdt.high) == pytest.approx((1 - unseen, 1))


def test_equal_values_that_are_not_at_an_end_get_room_on_both_sides():
    _, unseen = clopper_pearson(0, 10)
    fdt = estimate_mean(np.full(10, 8), ceiling=LENGTH)
    assert fdt.low == pytest.approx(8 * (1 - unseen))
    assert fdt.high == pytest.approx(8 * (1 - unseen) + LENGTH * unseen)


def test_values_that_differ_by_rounding_are_equal():
    _, unseen = clopper_pearson(0, 15)
    lengths = np.array([10, 20, 30, 49, 7] * 3)
    sdt = estimate_ratio((0.1 * lengths).astype(np.float32), lengths, unit="share")
    assert sdt.method == "exact binomial"
    assert sdt.low == pytest.approx(0.1 * (1 - unseen))
    ones = lengths * (1 + np.linspace(-3e-7, 3e-7, 15))
    acceptance = estimate_ratio(ones, lengths, unit="share")
    assert (acceptance.low, acceptance.high) == pytest.approx((1 - unseen, 1))
    assert acceptance.value <= acceptance.high <= 1


def test_whole_completions_of_unequal_length_leave_room_for_a_divergence():
    lengths = np.array([LENGTH] * 40 + [LENGTH - 1] * 10)
    fdt = estimate_mean(lengths, ceiling=lengths)
    assert fdt.low < LENGTH * 0.95
    assert LENGTH - 0.3 < fdt.high <= LENGTH


@pytest.mark.parametrize("k", [2, 5, 25, 48])
def test_yes_or_no_values_give_a_beta_interval(k, monkeypatch):
    """The weights are Dirichlet, so their share of the ones is Beta: known without drawing."""
    monkeypatch.setattr(intervals, "N_DRAWS", 20_000)
    fdt = np.array([0] * (50 - k) + [LENGTH] * k)
    for extra in (0.5, 0.75, 1.0):
        monkeypatch.setattr(intervals, "EXTRA_PROMPT", extra)
        e = estimate_mean(fdt, ceiling=LENGTH)
        low = stats.beta.ppf(0.025, k, 50 - k + extra)
        high = stats.beta.ppf(0.975, k + extra, 50 - k)
        assert (e.low / LENGTH, e.high / LENGTH) == pytest.approx((low, high), abs=0.003)
    assert (low, high) == pytest.approx(clopper_pearson(k, 50))


def test_few_draws_at_a_low_level_still_hold_the_value(monkeypatch):
    monkeypatch.setattr(intervals, "N_DRAWS", 3)
    divergent, lengths, _, _ = some_rows(50)
    for seed in range(20):
        e = estimate_ratio(divergent, lengths, unit="share", level=0.01, seed=seed)
        assert e.low <= e.value <= e.high


@pytest.mark.parametrize(("n_equal", "decided"), [(1, False), (4, False), (6, True)])
def test_a_few_differences_in_one_direction_decide_no_sooner_than_the_sign_flips(n_equal, decided):
    a = np.array([3] * n_equal + [0] * 40)
    e = estimate_difference(a, np.zeros_like(a), ceiling=LENGTH)
    assert (e.low > 0) == decided
    assert (sign_flip_p_value(a, np.zeros_like(a)) < 0.05) == decided


def test_one_prompt_has_a_value_and_no_interval():
    for name, e in every_estimate(1).items():
        assert e.value is not None, name
        assert (e.low, e.high, e.n_prompts, e.method) == (None, None, 1, "none"), name
    median = median_fdt([3], [False])
    assert (median.value, median.low, median.high) == (3, None, None)


def test_no_prompt_has_no_number():
    for name, e in every_estimate(0).items():
        assert (e.value, e.low, e.high, e.n_prompts) == (None, None, None, 0), name
    median = median_fdt([], [])
    assert (median.value, median.low, median.high, median.n_prompts) == (None, None, None, 0)
    assert survival([], []).to_json() == []
    assert sign_flip_p_value([], []) is None
    assert holm([]) == []


def test_prompts_without_a_token_are_left_out():
    with_empty = estimate_ratio([1, 0, 2, 0], [4, 0, 5, 6], unit="share")
    assert with_empty == estimate_ratio([1, 2, 0], [4, 5, 6], unit="share")
    assert with_empty.n_prompts == 3
    assert estimate_ratio([0, 0], [0, 0], unit="share").value is None


def test_json_is_as_in_the_design():
    e = estimate_ratio([1, 2, 0], [4, 5, 6], unit="share", seed=5)
    assert json.loads(json.dumps(e.to_json())) == {
        "value": e.value,
        "low": e.low,
        "high": e.high,
        "level": 0.95,
        "n_prompts": 3,
        "seed": 5,
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: estimate_mean([1, np.nan], ceiling=3), "NaN"),
        (lambda: estimate_mean([1, 5], ceiling=[3, 4]), r"values\[1\] is 5; .* from 0 to 4"),
        (lambda: estimate_mean([1, -1], ceiling=3), r"values\[1\] is -1"),
        (lambda: estimate_mean([[1, 2]], ceiling=3), "shape"),
        (lambda: estimate_mean([1, 2], ceiling=3, level=95), "level is 95"),
        (lambda: estimate_ratio([1, 2], [3], unit="share"), "2 sums and 1 counts"),
        (lambda: estimate_ratio([1, 9], [3, 4], unit="share"), r"sums\[1\] is 9"),
        (lambda: estimate_difference([1, 2], [3], ceiling=3), "same prompts"),
        (lambda: estimate_difference([1, 2], [3, 9], ceiling=3), r"b\[1\] is 9"),
        (lambda: sign_flip_p_value([1, 2], [3]), "same prompts"),
        (lambda: survival([1, 2], [True]), "expected as many"),
        (lambda: median_fdt([1, -2], [True, True]), r"fdt\[1\] is -2"),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def per_prompt(elements, min_size=0):
    return st.lists(elements, min_size=min_size, max_size=30)


@given(rows=per_prompt(st.tuples(st.integers(0, 40), st.integers(1, 40))), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_bounds_are_ordered_and_in_range(rows, seed):
    n_divergent = np.array([min(a, b) for a, b in rows], dtype=int)
    lengths = np.array([b for _, b in rows], dtype=int)
    top = float(lengths.max(initial=0))
    cases = [
        (estimate_mean(n_divergent, ceiling=lengths, seed=seed), 0, top),
        (estimate_ratio(n_divergent, lengths, unit="share", seed=seed), 0, 1),
        (estimate_ratio(n_divergent, lengths, unit="nats", seed=seed), 0, math.inf),
        (estimate_ratio(n_divergent, lengths, unit="perplexity", seed=seed), 1, math.inf),
        (
            estimate_difference(n_divergent, lengths - n_divergent, ceiling=lengths, seed=seed),
            -top,
            top,
        ),
        (median_fdt(n_divergent, n_divergent == lengths), 0, top),
    ]
    for e, floor, ceiling in cases:
        known = [x for x in (e.low, e.value, e.high) if x is not None]
        assert known == sorted(known)
        assert all(math.isfinite(x) and floor - 1e-9 <= x <= ceiling + 1e-9 for x in known)
        if e.low is not None and e.high is not None and e.method != "survival band":
            assert e.low < e.high


@given(nats=per_prompt(st.floats(0, 1e6), min_size=2))
@settings(max_examples=60, deadline=None)
def test_any_nats_give_finite_bounds(nats):
    for unit in ("nats", "perplexity"):
        e = estimate_ratio(nats, np.ones(len(nats)), unit=unit)
        assert all(math.isfinite(x) for x in (e.value, e.low))
        assert e.high is None or (math.isfinite(e.high) and e.high >= e.value >= e.low)


# Survival


def slow_survival(fdt, censored):
    """Kaplan–Meier, one token at a time, as told in words."""
    n_steps = max(f if c else f + 1 for f, c in zip(fdt, censored, strict=True))
    share, curve = 1.0, []
    for t in range(n_steps):
        seen = diverged = 0
        for f, c in zip(fdt, censored, strict=True):
            if f > t or (f == t and not c):
                seen += 1
                diverged += f == t
        share *= 1 - diverged / seen
        curve.append(share)
    return curve


def test_survival_by_hand():
    """The third completion has two tokens, both survived: at t = 2 it is no longer there."""
    curve = survival([0, 2, 2], [False, False, True])
    assert curve.share == pytest.approx([2 / 3, 2 / 3, 0])
    assert curve.n_prompts == 3


def test_a_censored_fdt_survives_its_last_token():
    assert survival([4, 4], [True, True]).share.tolist() == [1, 1, 1, 1]


@given(rows=per_prompt(st.tuples(st.integers(0, 12), st.booleans()), min_size=1))
@settings(max_examples=100, deadline=None)
def test_survival_equals_the_slow_loop(rows):
    fdt, censored = zip(*rows, strict=True)
    assume(any(f > 0 or not c for f, c in rows))
    curve = survival(fdt, censored)
    assert curve.share == pytest.approx(slow_survival(fdt, censored), abs=1e-12)
    assert np.all(np.diff(curve.share) <= 0)
    assert np.all((curve.low >= 0) & (curve.low <= curve.share + 1e-9))
    assert np.all((curve.high <= 1) & (curve.high >= curve.share - 1e-9))
    assert np.all(curve.low < curve.high)


def test_survival_equals_scipy_with_censoring_just_before_the_end():
    _, lengths, _, fdt = some_rows(200)
    censored = fdt == lengths
    data = stats.CensoredData(uncensored=fdt[~censored], right=fdt[censored] - 0.5)
    steps = stats.ecdf(data).sf
    curve = survival(fdt, censored)
    assert curve.share == pytest.approx(steps.evaluate(np.arange(len(curve.share))), abs=1e-12)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_band_is_clopper_and_pearsons_while_all_completions_last(level):
    rng = np.random.default_rng(0)
    fdt = np.minimum(rng.geometric(0.1, 40) - 1, LENGTH)
    curve = survival(fdt, fdt == LENGTH, level=level)
    for t in range(len(curve.share)):
        low, high = clopper_pearson(int(np.sum(fdt > t)), 40, level)
        assert (curve.low[t], curve.high[t]) == pytest.approx((low, high))


def test_the_band_has_no_gaps_where_survival_is_one_or_zero():
    curve = survival([2] * 10, [False] * 10)
    low, _ = clopper_pearson(10, 10)
    _, high = clopper_pearson(0, 10)
    assert curve.share.tolist() == [1, 1, 0]
    assert curve.low == pytest.approx([low, low, 0])
    assert curve.high == pytest.approx([1, 1, high])


def test_a_band_widens_downwards_as_completions_end():
    fdt = np.array([2] * 30 + [9] * 5)
    curve = survival(fdt, np.ones(35, dtype=bool))
    assert np.all(curve.share == 1)
    assert np.all(curve.high == 1)
    assert curve.low[1] == pytest.approx(clopper_pearson(35, 35)[0])
    assert curve.low[8] == pytest.approx(clopper_pearson(5, 5)[0])


def test_an_upper_band_never_rises():
    """Five die at once, then nearly all end: what was known of S does not get lost."""
    curve = survival([0] * 20 + [2] * 19 + [9], [False] * 20 + [True] * 20)
    assert np.all(np.diff(curve.high) <= 0)
    assert curve.high[8] == pytest.approx(clopper_pearson(20, 40)[1])
    assert curve.low[8] < curve.low[0]


def test_survival_rows_are_kept_where_something_changes():
    curve = survival([0, 2, 2, 5, 9, 9], [False, False, False, False, True, True])
    rows = curve.to_json()
    assert [row[0] for row in rows] == [0, 2, 5]
    for t, share, low, high in json.loads(json.dumps(rows)):
        assert (share, low, high) == (curve.share[t], curve.low[t], curve.high[t])
    fdt = np.minimum(np.random.default_rng(0).geometric(0.01, 300), 128)
    times = [row[0] for row in survival(fdt, fdt == 128).to_json()]
    assert times == sorted({0} | {int(t) for t in fdt if t < 128})


# Median


def test_median_by_hand():
    """Of 0..9 five are above 4 and so S(4) = 1/2; the band reaches 1/2 with 2 and 9 of 10 gone."""
    e = median_fdt(np.arange(10), np.zeros(10, dtype=bool))
    sides = [clopper_pearson(10 - gone, 10) for gone in range(1, 11)]
    assert e.value == 4
    assert e.low == next(t for t, (low, _) in enumerate(sides) if low <= 0.5)
    assert e.high == next(t for t, (_, high) in enumerate(sides) if high <= 0.5)
    assert (e.low, e.high) == (1, 8)


def test_no_median_where_survival_stays_above_one_half():
    e = median_fdt([0] + [8] * 9, [False] + [True] * 9)
    assert (e.value, e.low, e.high) == (None, 8, None)
    e = median_fdt([0, 0, 0, 0] + [8] * 6, [False] * 4 + [True] * 6)
    assert (e.value, e.low, e.high) == (None, 0, None)


def test_median_with_an_open_upper_end():
    e = median_fdt([0, 0, 0, 0, 0, 0] + [8] * 4, [False] * 6 + [True] * 4)
    assert (e.value, e.low, e.high) == (0, 0, None)


@pytest.mark.parametrize("n", [6, 10, 14, 22, 38, 50, 98])
def test_a_median_does_not_slip_by_rounding(n):
    """One prompt a token: the product of (1 − 1/seen) is 1/2 after half of them, give or take."""
    assert median_fdt(np.arange(n), np.zeros(n, dtype=bool)).value == n // 2 - 1


# Pairs


def enumerated_p_value(d):
    """Two-sided: twice the smaller share of sign patterns whose mean is as low, or as high."""
    sums = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in sign_patterns(len(d))]
    low = np.mean([x <= sum(d) for x in sums])
    high = np.mean([x >= sum(d) for x in sums])
    return min(1.0, 2 * min(low, high))


def sign_patterns(n):
    return itertools.product([-1, 1], repeat=n)


@given(d=st.lists(st.integers(-9, 9), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_sign_flips_equal_full_enumeration(d):
    a, b = np.maximum(d, 0), np.maximum(-np.array(d), 0)
    assert sign_flip_p_value(a, b) == pytest.approx(enumerated_p_value(d))


def test_sign_flips_by_hand():
    """Of eight patterns of signs one has the sum 6, and one −6."""
    assert sign_flip_p_value([1, 2, 3], [0, 0, 0]) == pytest.approx(2 / 8)
    assert sign_flip_p_value([1, 1], [1, 1]) == 1
    assert sign_flip_p_value([4, 1], [1, 1]) == 1


def test_sampled_sign_flips_are_close_to_enumeration():
    d = np.array([5, -2, 7, 1, 3, -4, 6, 2, -1, 8, 4, -3])
    exact, sampled = (sign_flip_p_value(d, 0 * d, n_resamples=k) for k in (4096, 4000))
    assert exact == pytest.approx(enumerated_p_value(d))
    assert sampled == pytest.approx(exact, abs=0.02)


def test_sign_flips_are_blind_to_order_and_to_which_candidate_is_first():
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 9, (2, 60))
    shuffled = rng.permutation(60)
    p = sign_flip_p_value(a, b)
    assert sign_flip_p_value(a[shuffled], b[shuffled]) == p
    assert sign_flip_p_value(b, a) == p
    assert sign_flip_p_value(a, b, seed=1) == pytest.approx(p, abs=0.03)


def test_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(4)
    p_values = []
    for trial in range(400):
        a, b = np.minimum(rng.geometric(0.03, (2, 30)), 128)
        p_values.append(sign_flip_p_value(a, b, seed=trial, n_resamples=499))
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(p_values) <= 0.05) < 0.08


def test_a_clear_difference_has_a_small_p_value():
    rng = np.random.default_rng(5)
    b = rng.integers(0, 100, 50)
    assert sign_flip_p_value(b + rng.integers(0, 20, 50), b) < 0.001


# Holm


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04]) == [0.04]
    assert holm([0.5, 0.4, 0.6]) == [1, 1, 1]
    assert holm([0.01, 0.01, 0.2, 0.005]) == pytest.approx([0.03, 0.03, 0.2, 0.02])


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(p):
    """Holm's own words: go up the sorted p-values until one exceeds level / (m − i)."""
    level = 0.05
    rejected, open_ = set(), True
    for i, j in enumerate(sorted(range(len(p)), key=lambda j: p[j])):
        open_ = open_ and p[j] * (len(p) - i) <= level
        if open_:
            rejected.add(j)
    corrected = holm(p)
    assert {j for j, x in enumerate(corrected) if x <= level} == rejected
    assert all(x >= y for x, y in zip(corrected, p, strict=True))


def test_a_pooled_ratio_and_its_error_by_hand():
    value, error = pooled([1.0, 0.5], [2, 3])
    assert value == pytest.approx(0.3)
    residuals = np.array([1 - 0.3 * 2, 0.5 - 0.3 * 3])
    assert error == pytest.approx(np.sqrt(2 * (residuals**2).sum()) / 5)
    assert pooled([1.0], [2]) == (0.5, None)
