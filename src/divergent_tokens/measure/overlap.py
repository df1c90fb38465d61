"""Text that was trained on and is reported on: such results look too good."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IN_A_ROW = 16
"""Tokens in a row that two texts hardly share by chance."""


def share_seen(seen: NDArray[np.int64], texts: Sequence[Sequence[int]]) -> float:
    """The share of these texts that have `IN_A_ROW` tokens in a row of a sequence that was seen.

    `seen`: token ids [sequence, token]. Texts, or sequences, of fewer tokens share nothing.
    """
    known = np.unique(_runs(seen))
    if not len(known) or not texts:
        return 0.0
    return float(np.mean([_has_one_of(known, _runs(np.array([text]))) for text in texts]))


def _runs(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for every run of tokens [run]; two of them have the same by chance once in 2⁶⁴."""
    factors = np.random.default_rng(0).integers(0, 2**64, IN_A_ROW, np.uint64) | np.uint64(1)
    n = max(0, ids.shape[1] - IN_A_ROW + 1)
    found = np.zeros((len(ids), n), np.uint64)
    for i, factor in enumerate(factors):
        found += ids[:, i : i + n].astype(np.uint64) * factor
    return found.ravel()


def _has_one_of(known: NDArray[np.uint64], runs: NDArray[np.uint64]) -> bool:
    places = np.searchsorted(known, runs).clip(max=len(known) - 1)
    return bool((known[places] == runs).any())
