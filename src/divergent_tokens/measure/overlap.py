"""Text that was trained on and is reported on: such results look too good."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IN_A_ROW = 16
"""Tokens in a row that two texts hardly share by chance."""


def overlap(seen: NDArray[np.int64], texts: Sequence[Sequence[int]]) -> float | None:
    """The share of these texts that have `IN_A_ROW` tokens in a row of a sequence that was seen.

    `seen`: token ids [sequence, token], one after the other as they were cut from documents. Texts
    of fewer tokens do not count; None where all are as short as that.
    """
    known = np.unique(_runs(seen.reshape(1, -1)))
    long = [text for text in texts if len(text) >= IN_A_ROW]
    if not len(known) or not long:
        return None
    return float(np.mean([_has_one_of(known, _runs(np.array([text]))) for text in long]))


def _runs(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A number for every run of tokens [run]; two runs hardly ever have the same by chance."""
    factors = np.random.default_rng(0).integers(0, 2**64, IN_A_ROW, np.uint64)
    n = max(0, ids.shape[1] - IN_A_ROW + 1)
    found = np.zeros((len(ids), n), np.uint64)
    for i, factor in enumerate(factors):
        found += ids[:, i : i + n].astype(np.uint64) * factor
    return found.ravel()


def _has_one_of(known: NDArray[np.uint64], runs: NDArray[np.uint64]) -> bool:
    places = np.searchsorted(known, runs).clip(max=len(known) - 1)
    return bool((known[places] == runs).any())
