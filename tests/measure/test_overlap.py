"""Texts that stand in what was seen: against a slow search, and the ends of both."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from divergent_tokens.measure.overlap import IN_A_ROW, overlap


def slowly(seen, texts):
    """Every run of every text looked for in every row."""

    def runs(row):
        return {tuple(row[i : i + IN_A_ROW]) for i in range(len(row) - IN_A_ROW + 1)}

    known = runs(seen.ravel().tolist())
    found = [bool(runs(text) & known) for text in texts if len(text) >= IN_A_ROW]
    return float(np.mean(found)) if found and known else None


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 3))
def test_shares_are_those_of_the_slow_search(seed, length, n_tokens):
    rng = np.random.default_rng(seed)
    seen = rng.integers(0, n_tokens, (3, length))  # so few tokens that runs come again
    texts = [rng.integers(0, n_tokens, rng.integers(1, 40)).tolist() for _ in range(5)]
    assert overlap(seen, texts) == slowly(seen, texts)


def test_a_run_counts_from_its_full_length_on_and_across_sequences():
    seen = np.arange(80).reshape(8, 10)  # what was cut from one text
    assert overlap(seen, [list(range(24, 40))]) == 1.0
    assert overlap(seen, [[*range(25, 40), 99]]) == 0.0
    assert overlap(seen, [list(range(24, 40)), [*range(25, 40), 99], [1, 2]]) == 0.5
    assert overlap(seen, [list(range(15))]) is None
    assert overlap(seen, []) is None
    assert overlap(seen[:1], [list(range(24, 40))]) is None
