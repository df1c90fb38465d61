import doctest
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, rel_entr, softmax

from divergent_tokens.measure import metrics
from divergent_tokens.measure.metrics import (
    acceptance,
    divergence,
    divergent,
    dppl,
    fdt,
    kl,
    margin,
    near_ties,
    repeated,
    sdt,
    sdt_by_quarter,
)

# Three prompts by hand: the candidate parts after 2 of 4, never, and at once.
COMPLETIONS = np.array([[5, 6, 7, 8], [5, 6, 0, 0], [5, 5, 5, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool)
ARGMAX = np.array([[5, 6, 1, 8], [5, 6, 9, 9], [4, 5, 4, 9]])


def test_the_docstrings():
    assert doctest.testmod(metrics).failed == 0


def test_three_prompts_by_hand():
    assert divergent(ARGMAX, COMPLETIONS, MASK).sum() == 3
    assert fdt(ARGMAX, COMPLETIONS, MASK).tolist() == [2, 2, 0]
    assert sdt(ARGMAX, COMPLETIONS, MASK) == 3 / 9
    found = divergence(
        ARGMAX,
        COMPLETIONS,
        MASK,
        logprobs=np.log(np.where(MASK, 0.5, np.nan)),
        base_logprobs=np.full((3, 4), -1.0),
        kl=np.where(MASK, 0.25, np.nan),
        acceptance=np.full((3, 4), 0.5),
    )
    assert found.censored.tolist() == [False, True, False]
    assert found.n_divergent.tolist() == [1, 0, 2]
    assert found.n_tokens.tolist() == [4, 2, 3]
    assert found.nats.tolist() == pytest.approx([4 * math.log(2), 2 * math.log(2), 3 * math.log(2)])
    assert found.base_nats.tolist() == [4, 2, 3]
    assert found.kl.tolist() == [1, 0.5, 0.75]
    assert found.acceptance.tolist() == [2, 1, 1.5]
    part = found.subset((2, 0))
    assert part.fdt.tolist() == [0, 2]
    assert part.kl.tolist() == [0.75, 1]
    assert part.mask.tolist() == MASK[[2, 0]].tolist()


def test_lists_will_do_and_a_mask_is_not_needed():
    assert fdt([[1, 2], [1, 3]], [[1, 2], [2, 3]]).tolist() == [2, 0]
    assert sdt([[1, 2], [1, 3]], [[1, 2], [2, 3]]) == 0.25
    assert dppl([[math.log(0.5)], [math.log(0.125)]]) == pytest.approx(4)


def test_what_is_absent_is_none_and_not_zero():
    found = divergence(ARGMAX, COMPLETIONS, MASK)
    absent = (found.nats, found.base_nats, found.kl, found.kl_per_token, found.acceptance)
    assert absent == (None,) * 5
    assert found.subset([0]).kl is None
    nothing = np.zeros((2, 0), int)
    assert sdt(nothing, nothing) is None
    assert dppl(nothing) is None
    assert fdt(nothing, nothing).tolist() == [0, 0]
    assert near_ties([]) is None
    assert near_ties([None, None]) is None


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="both must be"):
        fdt([[1, 2]], [[1]])
    with pytest.raises(ValueError, match="both must be"):
        sdt([1, 2], [1, 2])
    with pytest.raises(ValueError, match="mask has shape"):
        sdt([[1, 2]], [[1, 2]], [[True]])
    with pytest.raises(ValueError, match="True from the left"):
        sdt([[1, 2]], [[1, 2]], [[False, True]])


@given(st.data())
def test_fdt_and_sdt_are_the_obvious_loops(data):
    n, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    ids = data.draw(arrays(np.int64, (n, width), elements=st.integers(0, 2)))
    argmax = data.draw(arrays(np.int64, (n, width), elements=st.integers(0, 2)))
    lengths = data.draw(st.lists(st.integers(0, width), min_size=n, max_size=n))
    mask = np.arange(width) < np.array(lengths)[:, None]
    first, wrong = [], 0
    for row in range(n):
        t = 0
        while t < lengths[row] and ids[row, t] == argmax[row, t]:
            t += 1
        first.append(t)
        wrong += sum(ids[row, t] != argmax[row, t] for t in range(lengths[row]))
    assert fdt(argmax, ids, mask).tolist() == first
    assert sdt(argmax, ids, mask) == (wrong / sum(lengths) if sum(lengths) else None)


@given(st.data())
def test_sdt_is_at_most_log2_of_dppl(data):
    """Wherever the argmax is another token, y has a probability of one half at most."""
    n, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    values = st.floats(-30, 30)
    logits = data.draw(arrays(np.float64, (n, width, 4), elements=values))
    ids = data.draw(arrays(np.int64, (n, width), elements=st.integers(0, 3)))
    q = metrics.log_softmax(logits)
    logprobs = np.take_along_axis(q, ids[..., None], -1)[..., 0]
    argmax = logits.argmax(-1)
    assert sdt(argmax, ids) <= math.log2(dppl(logprobs)) + 1e-12
    rows = divergence(argmax, ids, logprobs=logprobs)
    assert (rows.n_divergent <= rows.nats / math.log(2) + 1e-9).all()


pairs = arrays(np.float64, (2, 7), elements=st.floats(-300, 300))


@given(pairs)
def test_kl_acceptance_and_margin_against_scipy(logits):
    base, candidate = logits
    np.testing.assert_allclose(metrics.log_softmax(base), log_softmax(base), atol=1e-12)
    p, q = softmax(base), softmax(candidate)
    exact = (p * (log_softmax(base) - log_softmax(candidate))).sum()
    assert kl(base, candidate) == pytest.approx(exact, rel=1e-6, abs=1e-9)
    assert kl(base, candidate) >= 0
    assert acceptance(base, candidate) == pytest.approx(np.minimum(p, q).sum(), abs=1e-12)
    assert acceptance(base, candidate) >= 1 - math.sqrt(kl(base, candidate) / 2) - 1e-9
    assert acceptance(base, candidate) == pytest.approx(acceptance(candidate, base))
    for y in range(7):
        best_other = max(v for i, v in enumerate(base) if i != y)
        assert margin(base, y) == base[y] - best_other


@given(pairs, st.floats(-1000, 1000))
def test_a_constant_on_all_logits_changes_nothing(logits, constant):
    base, candidate = logits
    assert kl(base, candidate + constant) == pytest.approx(kl(base, candidate), rel=1e-6, abs=1e-9)
    assert kl(base, base + constant) == pytest.approx(0, abs=1e-20)
    assert kl(base, base) == 0
    assert acceptance(base, base) == 1


def test_kl_of_tiny_changes_keeps_its_digits():
    """To second order KL is half the variance of the change under p."""
    rng = np.random.default_rng(0)
    base, direction = 3 * rng.standard_normal(1000), rng.standard_normal(1000)
    p = softmax(base)
    half_variance = 0.5 * (p @ direction**2 - (p @ direction) ** 2)
    for size in (1e-4, 1e-6, 1e-7):
        found = kl(base, base + size * direction)
        assert found == pytest.approx(size**2 * half_variance, rel=1e-3)


def test_logits_that_rule_a_token_out():
    base, candidate = [0.0, 0.0, -np.inf], [0.0, 1.0, -np.inf]
    assert kl(base, candidate) == pytest.approx(kl(base[:2], candidate[:2]))
    assert kl(base, [0.0, 0.0, 0.0]) == pytest.approx(rel_entr([0.5, 0.5], [1 / 3, 1 / 3]).sum())
    assert kl([0.0, 0.0, 0.0], base) == np.inf
    assert np.isnan(kl([0.0, np.nan], [0.0, 0.0]))
    assert np.isnan(kl([0.0, 0.0], [0.0, np.nan]))
    assert acceptance(base, [0.0, 0.0, 0.0]) == pytest.approx(2 / 3)


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(1, 4))
def test_repeated_is_the_obvious_loop(row, n):
    ids = np.array([[*row, 7, 7]])
    mask = np.arange(len(row) + 2) < len(row)
    expected = [
        any(
            row[a : a + n] == row[b : b + n]
            for a in range(max(0, t - n + 1), min(t, len(row) - n) + 1)
            for b in range(len(row) - n + 1)
            if a != b
        )
        for t in range(len(row))
    ]
    found = repeated(ids, mask[None], n)
    assert found[0, : len(row)].tolist() == expected
    assert not found[0, len(row) :].any()


def test_repeated_by_hand():
    ids = np.array([[1, 2, 3, 1, 2, 3, 9, 1]])
    assert repeated(ids, n=3).tolist() == [[True] * 6 + [False] * 2]
    loop = np.array([[5] * 9])
    assert repeated(loop).all()
    assert not repeated(np.arange(100)[None]).any()


def test_sdt_by_quarter_by_hand():
    apart = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0]], bool)
    mask = np.array([[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]], bool)
    assert sdt_by_quarter(apart & mask, mask) == [1 / 4, 1 / 3, 1, 1]
    assert sorted(map(str, sdt_by_quarter(apart[:, :1]))) == ["0.5", "None", "None", "None"]


@given(arrays(bool, (3, 9)), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_quarters_add_up_to_the_whole(apart, lengths):
    mask = np.arange(9) < np.array(lengths)[:, None]
    edges = np.linspace(0, 9, 5).round().astype(int)
    counts = [mask[:, a:b].sum() for a, b in itertools.pairwise(edges)]
    shares = sdt_by_quarter(apart & mask, mask)
    assert [share is None for share in shares] == [count == 0 for count in counts]
    total = sum(s * c for s, c in zip(shares, counts, strict=True) if s is not None)
    assert total == pytest.approx((apart & mask).sum())


def test_near_ties_by_hand():
    assert near_ties([0.05, 0.1, 3.0, None, -0.2]) == 0.5
