"""The knapsack against all choices there are, on small cases, and against itself on large ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divergent_tokens.search.knapsack import least_harm


@st.composite
def cases(draw):
    """Up to six components with up to four options; some options are missing, many are alike."""
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    harms = st.one_of(st.integers(-3, 9).map(float), st.floats(1e-9, 1e-2), st.just(np.inf))
    harm = np.array(draw(st.lists(st.lists(harms, min_size=m, max_size=m), min_size=n, max_size=n)))
    sizes = st.lists(st.integers(0, 12), min_size=m, max_size=m)
    size = np.array(draw(st.lists(sizes, min_size=n, max_size=n)))
    harm = np.c_[np.zeros(n), harm]  # the uncompressed option is always there
    size = np.c_[np.full(n, 10), size]
    smallest = int(np.where(np.isfinite(harm), size, 99).min(1).sum())
    return harm, size, draw(st.integers(smallest, smallest + 12 * n))


def brute(harm, size, limit):
    """The least harm of all choices that fit."""
    n, m = harm.shape
    rows = np.arange(n)
    found = [
        harm[rows, options].sum()
        for options in map(list, itertools.product(range(m), repeat=n))
        if size[rows, options].sum() <= limit
    ]
    return min(found)


def close(a, b):
    return a == pytest.approx(b, rel=1e-6, abs=1e-12)  # HiGHS's own tolerance, of the gap


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_optimum_is_that_of_all_choices(case):
    harm, size, limit = case
    found = least_harm(harm, size, limit)
    rows = np.arange(len(harm))
    assert size[rows, found.options].sum() == found.size_bytes <= limit
    assert close(found.harm, harm[rows, found.options].sum())
    assert close(found.harm, brute(harm, size, limit))
    assert found.gap <= 1e-9


@settings(max_examples=200, deadline=None)
@given(cases())
def test_without_a_proof_the_bound_holds(case):
    harm, size, limit = case
    found = least_harm(harm, size, limit, prove=False)
    best = brute(harm, size, limit)
    assert found.size_bytes <= limit
    assert found.lower_bound <= best + 1e-9
    assert best <= found.harm + 1e-9
    assert found.gap == pytest.approx(found.harm - found.lower_bound)


def like_a_sweep(n, m, seed=0):
    """Shapes of a small model, sizes by bits, harms over five orders of magnitude."""
    rng = np.random.default_rng(seed)
    base = rng.choice([2 * 576 * 576, 2 * 576 * 1536, 2 * 192 * 576], n)
    shares = np.sort(rng.uniform(0.15, 0.6, m))[::-1]
    size = np.c_[base, (base[:, np.newaxis] * shares).astype(np.int64)]
    harm = 10 ** rng.uniform(-7, -2, (n, 1)) / shares**4 * rng.lognormal(0, 0.3, (n, m))
    return np.c_[np.zeros(n), harm], size


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_sweep_is_nearly_closed_by_the_price_and_closed_by_the_proof(share):
    harm, size = like_a_sweep(210, 4)
    limit = int(share * size[:, 0].sum())
    quick = least_harm(harm, size, limit, prove=False)
    assert quick.gap < 0.01 * quick.harm
    assert limit - quick.size_bytes < 0.001 * limit
    proven = least_harm(harm, size, limit)
    assert proven.gap == 0
    assert quick.lower_bound <= proven.harm <= quick.harm


def test_thousands_of_components_that_are_all_alike():
    harm, size = np.array([[0.0, 1e-6, 3e-6]] * 4000), np.array([[4000, 2000, 1000]] * 4000)
    found = least_harm(harm, size, 9_001_500)
    # 4,000 at 2,000 bytes leave room for 500 and three quarters that stay whole.
    assert np.bincount(found.options, minlength=3).tolist() == [500, 3500, 0]
    assert found.gap < 1e-6


def test_a_budget_that_fits_all_leaves_all_but_what_gains():
    harm, size = np.array([[0.0, 1.0], [0.0, -1.0]]), np.array([[10, 5], [10, 5]])
    found = least_harm(harm, size, 100)
    assert (found.options.tolist(), found.harm, found.gap) == ([0, 1], -1, 0)


def test_what_cannot_fit_is_an_error():
    with pytest.raises(ValueError, match="take 5 bytes, the limit is 4"):
        least_harm(np.array([[0.0, 1.0]]), np.array([[10, 5]]), 4)


def test_of_options_of_the_smallest_size_the_least_harmful():
    harm, size = np.array([[0.0, 3.0, 2.0, np.inf]] * 3), np.array([[9, 4, 4, 1]] * 3)
    assert least_harm(harm, size, 12).options.tolist() == [2, 2, 2]


def test_the_solver_prints_nothing(capfd):
    """HiGHS has a line that no option turns off; this case has it print that line."""
    harm, size = like_a_sweep(40, 4, seed=13)
    least_harm(harm, size, int(0.5 * size[:, 0].sum()))
    print("after it all is as before")
    assert capfd.readouterr().out == "after it all is as before\n"
