"""How many prompts: made-up samples of known variance, slow searches, and what cannot be said."""

import math

import numpy as np
import pytest
from scipy import stats

from divergent_tokens.measure.intervals import estimate_ratio
from divergent_tokens.measure.metrics import divergence
from divergent_tokens.measure.needed import (
    POWER,
    Sample,
    estimate_of,
    needed_prompts,
    prompts_to_tell,
    sample_of,
    variance,
)
from divergent_tokens.measure.summaries import estimate_fdt
from divergent_tokens.measure.widths import Width, parse_width

LENGTH = 100.0


def made_up(n, metric="kl", mean=10.0, sd=3.0, seed=0):
    rng = np.random.default_rng(seed)
    sums = rng.gamma((mean / sd) ** 2, sd**2 / mean, n)
    agreement = np.full(n, 1.2 * mean) if metric == "fdt" else None
    return Sample(metric, np.minimum(sums, LENGTH), np.full(n, LENGTH), agreement)


def width_of(estimate):
    return estimate.high - estimate.low


def test_a_sample_is_what_the_metric_is_made_of():
    ids = np.zeros((2, 4), int)
    argmax = [[0, 1, 0, 1], [0, 0, 0, 0]]
    mask = [[1, 1, 1, 1], [1, 1, 1, 0]]
    d = divergence(argmax, ids, mask, kl=np.full((2, 4), 0.5))
    fdt, sdt, kl = (sample_of(metric, d) for metric in ("fdt", "sdt", "kl"))
    assert fdt.sums.tolist() == [1, 3]
    assert fdt.longest_agreement.tolist() == [1, 3]
    assert sdt.sums.tolist() == [2, 0]
    assert kl.sums.tolist() == [2.0, 1.5]
    assert kl.lengths.tolist() == [4, 3]


def test_one_copy_is_the_comparisons_own_interval():
    fdt, kl = made_up(20, "fdt"), made_up(20)
    of_fdt = estimate_fdt(fdt.sums, fdt.lengths, fdt.longest_agreement, level=0.9, seed=3)
    assert estimate_of(fdt, level=0.9, seed=3) == of_fdt
    of_kl = estimate_ratio(kl.sums, kl.lengths, unit="nats", level=0.9, seed=3)
    assert estimate_of(kl, level=0.9, seed=3) == of_kl
    assert estimate_of(kl, copies=3).n_prompts == 60
    assert estimate_of(kl, copies=3).value == pytest.approx(estimate_of(kl).value)


@pytest.mark.parametrize("metric", ["fdt", "sdt", "kl"])
def test_as_many_prompts_as_a_known_variance_asks_for(metric):
    """A sample so large that it is the population: the normal interval is 2 z sd / sqrt(n) wide."""
    sample = made_up(600, metric)
    z = stats.norm.isf(0.025)
    scale = 1 if metric == "fdt" else LENGTH
    size = 0.3 / scale
    expected = (2 * z * sample.sums.std() / scale / size) ** 2
    found = needed_prompts(sample, Width(metric, size, relative=False))
    assert found.n_prompts == pytest.approx(expected, rel=0.15)
    assert found.low < found.n_prompts < found.high
    assert found.high / found.low < 2  # 600 prompts know their variance


@pytest.mark.parametrize("metric", ["fdt", "sdt", "kl"])
def test_the_width_is_met_where_it_is_said_to_be_by_a_slow_search(metric):
    sample, width = made_up(30, metric), parse_width(f"{metric}=15%")
    found = needed_prompts(sample, width).n_prompts
    copies = 1
    while width_of(e := estimate_of(sample, copies=copies)) > width.of(e.value):
        copies += 1
    assert 30 * (copies - 1) - 15 < found <= 30 * copies + 15


def test_beyond_the_copies_and_below_the_trial_the_square_root_carries_on():
    sample = made_up(16)
    narrow, narrower = (Width("kl", size, relative=False) for size in (1e-4, 5e-5))
    assert needed_prompts(sample, narrower).n_prompts == pytest.approx(
        4 * needed_prompts(sample, narrow).n_prompts
    )
    wide = width_of(estimate_of(sample))
    twice = Width("kl", 2 * wide, relative=False)
    assert needed_prompts(sample, twice).n_prompts == pytest.approx(4)


def test_twice_the_numbers_need_as_many_for_a_relative_width():
    sample = made_up(32)
    doubled = Sample("kl", 2 * sample.sums, sample.lengths)
    one, two = (needed_prompts(s, parse_width("kl=10%")) for s in (sample, doubled))
    assert one.n_prompts == pytest.approx(two.n_prompts)
    assert (one.low, one.high) == pytest.approx((two.low, two.high))


def test_the_range_holds_the_true_number_as_often_as_intervals_do():
    """300 trials of 32 from a skewed population whose number is known from 20,000 of it."""
    rng = np.random.default_rng(1)
    population = rng.gamma(1.0, 1.0, 20_000)
    width = Width("kl", 0.4 / LENGTH, relative=False)

    def of(sums):
        return Sample("kl", sums, np.full(len(sums), LENGTH))

    truth = needed_prompts(of(rng.permutation(population)[:4000]), width).n_prompts
    held, numbers = 0, []
    for _ in range(300):
        found = needed_prompts(of(rng.choice(population, 32)), width)
        held += found.low <= truth <= found.high
        numbers.append(found.n_prompts)
    assert held / 300 > 0.8
    assert np.median(numbers) == pytest.approx(truth, rel=0.3)


def test_variance_by_hand_about_the_pooled_ratio():
    sample = Sample("kl", np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0]))
    assert variance(sample).value == pytest.approx(2 / 3)
    # A ratio of 0.5: residuals 0, 1 and −1.
    other = Sample("sdt", np.array([1.0, 2.0, 0.0]), np.array([2.0, 2.0, 2.0]))
    assert variance(other).value == pytest.approx(2 / 3)
    # Longer completions have more: no residual at all.
    alike = Sample("sdt", np.array([1.0, 2.0, 4.0]), np.array([2.0, 4.0, 8.0]))
    assert variance(alike).value == pytest.approx(0)


def test_where_nothing_differs_nothing_is_said_of_nats_and_a_bound_of_shares():
    none = Sample("kl", np.zeros(16), np.full(16, LENGTH))
    assert needed_prompts(none, parse_width("kl=25%")).n_prompts is None
    assert needed_prompts(none, parse_width("kl=0.1")).n_prompts is None
    never = Sample("sdt", np.zeros(16), np.full(16, LENGTH))
    assert needed_prompts(never, parse_width("sdt=25%")).n_prompts is None  # a share of nothing
    found = needed_prompts(never, parse_width("sdt=0.05"))
    exact = math.log(0.025) / math.log(1 - 0.05)  # 1 − 0.025^(1/n) = 0.05
    assert found.n_prompts == pytest.approx(exact, rel=0.1)
    assert (found.low, found.high) == (None, None)


# --- two candidates ---


def two(n=40, gap=1.0, shared=5.0, own=1.0, metric="kl"):
    """Prompts that are hard or easy for both, by `shared`."""
    rng = np.random.default_rng(2)
    both = 40 + shared * rng.standard_normal(n)
    a, b = (both + own * rng.standard_normal(n) for _ in "ab")
    agreement = np.full(n, 50.0)
    lengths = np.full(n, LENGTH)
    return Sample(metric, a + gap, lengths, agreement), Sample(metric, b, lengths, agreement)


def power(a, b, n, rng):
    """How often n prompts drawn from those of a and b have a mean difference beyond chance."""
    d = a.sums - b.sums
    drawn = rng.choice(d, (4000, n))
    z = drawn.mean(1) / (drawn.std(1, ddof=1) / math.sqrt(n))
    return float((np.abs(z) > stats.norm.isf(0.025)).mean())


def test_pairs_need_fewer_and_reach_their_power():
    a, b = two()
    found = prompts_to_tell(a, b)
    assert found.paired.n_prompts < found.unpaired / 5
    n = math.ceil(found.paired.n_prompts)
    assert power(a, b, n, np.random.default_rng(0)) == pytest.approx(POWER, abs=0.08)


def test_unpaired_and_paired_are_alike_where_prompts_share_nothing():
    found = prompts_to_tell(*two(n=4000, shared=0.0))
    assert found.paired.n_prompts == pytest.approx(found.unpaired, rel=0.05)


def test_by_hand():
    a = Sample("fdt", np.array([3.0, 1.0, 3.0, 1.0] * 10), np.full(40, 8.0), np.full(40, 4.0))
    b = Sample("fdt", np.zeros(40), np.full(40, 8.0), np.full(40, 4.0))
    found = prompts_to_tell(a, b)
    assert found.difference.value == 2
    z = stats.norm.isf(0.025) + stats.norm.ppf(0.8)
    assert found.paired.n_prompts == pytest.approx(z**2 * (40 / 39) / 4)


def test_sign_and_order_change_nothing():
    a, b = two()
    one, other = prompts_to_tell(a, b), prompts_to_tell(b, a)
    assert one.paired.n_prompts == pytest.approx(other.paired.n_prompts)
    assert one.difference.value == pytest.approx(-other.difference.value)


def test_a_difference_that_may_be_none_has_no_number_that_is_enough():
    found = prompts_to_tell(*two(gap=0.0))
    assert found.difference.low < 0 < found.difference.high
    assert found.paired.high is None
    assert found.paired.low < found.paired.n_prompts


@pytest.mark.parametrize("metric", ["fdt", "sdt", "kl"])
def test_a_candidate_beside_itself_cannot_be_told(metric):
    a, _ = two(metric=metric)
    found = prompts_to_tell(a, a)
    assert found.difference.value == 0
    assert found.paired.n_prompts is found.paired.high is found.unpaired is None
