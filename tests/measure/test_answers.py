import dataclasses
import math

import numpy as np
import pytest

from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.answers import (
    Answers,
    compare_answers,
    find_flips,
    mcnemar_p_value,
)


def answers(right, choices=None, documents=None):
    found = None if right is None else np.array(right, dtype=bool)
    n = len(documents or right)
    return Answers(
        task="t",
        metric="acc",
        filter="none",
        value=None if found is None else float(found.mean()),
        stderr=None,
        higher_is_better=True,
        documents=tuple(documents or map(str, range(n))),
        right=found,
        choices=choices,
    )


def test_flips_by_hand():
    base = answers([1, 1, 1, 0, 0, 1, 0, 1], choices=(0, 0, 0, 1, 1, 0, 1, 0))
    candidate = answers([1, 0, 0, 1, 0, 0, 0, 1], choices=(0, 1, 2, 0, 2, 1, 1, 0))
    flips = find_flips(base, candidate, seed=5)
    assert (flips.to_wrong, flips.to_right) == (3, 1)
    assert flips.share.value == 4 / 8
    assert flips.share.n_prompts == 8
    assert flips.share.seed == 5
    assert 0.1 < flips.share.low < 0.5 < flips.share.high < 0.9
    assert flips.changed == 5 / 8  # the fifth document went from one wrong choice to another
    assert flips.p_value == pytest.approx(2 * (1 + 4) / 2**4)


def test_the_difference_in_accuracy_is_that_of_the_two_directions():
    rng = np.random.default_rng(0)
    base, candidate = answers(rng.random(50) < 0.7), answers(rng.random(50) < 0.4)
    flips = find_flips(base, candidate)
    assert base.value - candidate.value == pytest.approx((flips.to_wrong - flips.to_right) / 50)
    assert flips.share.value == pytest.approx((flips.to_wrong + flips.to_right) / 50)


def test_without_flips_the_interval_still_goes_on():
    same = answers([1, 0, 1, 1])
    flips = find_flips(same, same)
    assert (flips.share.value, flips.to_wrong, flips.to_right, flips.p_value) == (0, 0, 0, 1)
    assert flips.share.high == pytest.approx(1 - 0.025 ** (1 / 4))  # Clopper and Pearson
    assert flips.changed is None


@pytest.mark.parametrize(("to_wrong", "to_right"), [(0, 0), (1, 0), (3, 1), (6, 0), (5, 5), (2, 9)])
def test_mcnemar_against_a_sum_over_coins(to_wrong, to_right):
    n = to_wrong + to_right
    as_rare = [k for k in range(n + 1) if math.comb(n, k) <= math.comb(n, to_right)]
    expected = sum(math.comb(n, k) for k in as_rare) / 2**n
    assert mcnemar_p_value(to_wrong, to_right) == pytest.approx(expected)
    assert mcnemar_p_value(to_right, to_wrong) == pytest.approx(expected)


def test_what_is_neither_right_nor_wrong_has_no_flips():
    graded = answers(None, documents=["0", "1"])
    assert find_flips(graded, graded) is None
    (result,) = compare_answers([graded], [graded])
    assert result.to_json()["flips"] is None


def test_answers_to_other_questions_are_refused():
    base = answers([1, 0])
    other = dataclasses.replace(base, documents=("0", "2"))
    with pytest.raises(DivergentTokensError, match="not asked the same in the task t"):
        find_flips(base, other)
