"""Magnitude pruning against hand-worked cases and a sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergent_tokens.compress.prune import prune_magnitude, share_mask


def test_by_hand() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5], [-2.0, 4.0, -0.25]])
    assert prune_magnitude(weight, 0.5).tolist() == [[3.0, 0.0, 0.0], [-2.0, 4.0, 0.0]]
    assert weight[0, 1] == -1.0
    assert torch.equal(prune_magnitude(weight, 0.0), weight)


def test_of_equal_magnitudes_the_first_go() -> None:
    weight = torch.tensor([[1.0, -1.0, 2.0], [1.0, -1.0, 0.5]])
    assert share_mask(weight.abs(), 0.5).tolist() == [[False, False, True], [True, True, False]]
    flat = torch.ones(4, 5)
    assert share_mask(flat.abs(), 0.35).flatten().tolist() == [False] * 7 + [True] * 13


def test_zeros_go_first() -> None:
    weight = torch.tensor([[0.0, 2.0, -0.0, 1.0]])
    assert prune_magnitude(weight, 0.5).tolist() == [[0.0, 2.0, 0.0, 1.0]]
    assert prune_magnitude(weight, 0.25).count_nonzero() == 2  # more zeros than asked for


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 9),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_exactly_the_smallest(
    seed: int, n_out: int, n_in: int, share: float, dtype: torch.dtype, coarse: bool
) -> None:
    weight = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if coarse:  # many ties
        weight = (weight * 2).round() + 0.5
    kept = share_mask(weight.abs(), share)
    order = torch.sort(weight.float().abs().flatten(), stable=True).indices
    gone = order[: round(share * weight.numel())]
    expected = torch.ones(weight.numel(), dtype=torch.bool)
    expected[gone] = False
    assert torch.equal(kept.flatten(), expected)
    pruned = prune_magnitude(weight, share)
    assert pruned.dtype == dtype
    assert torch.equal(pruned[kept], weight[kept])
    assert not pruned[~kept].any()


@pytest.mark.parametrize("transpose", [False, True])
def test_views_are_read_as_out_in(transpose: bool) -> None:
    weight = torch.ones(3, 4)
    view = weight.T if transpose else weight
    gone = ~share_mask(view.abs(), 0.5)
    assert gone.flatten().tolist() == [True] * 6 + [False] * 6
