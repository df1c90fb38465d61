"""Repair against the least squares of each row, solved outright."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergent_tokens.compress.repair import DAMPING, repair


def made(seed, n_out=5, n_in=12, n_tokens=200, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, n_in, generator=generator)
    x = x @ torch.randn(n_in, n_in, generator=generator)
    weight = torch.randn(n_out, n_in, generator=generator)
    mask = torch.rand(n_out, n_in, generator=generator) >= share
    return weight, mask, x.T @ x


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0, 1), st.integers(6, 200))
def test_every_row_is_its_least_squares(seed, share, n_tokens):
    weight, mask, moment = made(seed, n_tokens=n_tokens, share=share)
    found = repair(weight, mask, moment, steps=60)
    assert not found[~mask].any()
    damped = moment.double() + DAMPING * moment.diagonal().double().mean() * torch.eye(12)
    for row, kept, own in zip(weight.double(), mask, found, strict=True):
        if kept.any():
            right = (damped @ row)[kept]
            expected = torch.linalg.solve(damped[kept][:, kept], right)
            torch.testing.assert_close(own[kept].double(), expected, rtol=2e-2, atol=2e-2)


def test_outputs_change_less_than_without():
    weight, mask, moment = made(0)

    def loss(candidate):
        change = (candidate - weight).double()
        return float(((change @ moment.double()) * change).sum())

    assert loss(repair(weight, mask, moment)) < 0.7 * loss(weight * mask)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_gone_and_nothing_left(share):
    weight, mask, moment = made(1, share=share)
    torch.testing.assert_close(repair(weight, mask, moment), weight * mask)


def test_inputs_never_seen_leave_weights_as_they_are():
    weight, mask, moment = made(2)
    moment[3], moment[:, 3] = 0, 0
    mask[:, 3] = True
    found = repair(weight, mask, moment)
    torch.testing.assert_close(found[:, 3], weight[:, 3])
    torch.testing.assert_close(repair(weight, mask, torch.zeros(12, 12)), weight * mask)


def test_many_at_once_are_each_by_itself():
    several = [made(seed) for seed in range(4)]
    together = repair(*(torch.stack(parts) for parts in zip(*several, strict=True)))
    for found, one in zip(together, several, strict=True):
        torch.testing.assert_close(found, repair(*one), rtol=1e-3, atol=1e-4)
