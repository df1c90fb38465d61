"""Which numbers of a sweep a plan hangs on."""

import dataclasses

import numpy as np
import pytest

import sweeps
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.doubts import doubts
from divergent_tokens.search.settings import Settings

BUDGET = Budget(Unit.share, 0.4)


def test_a_sweep_without_noise_leaves_no_doubt():
    sweep = sweeps.sweep(noise=0.0, n_prompts=8, scale=1e-7)
    for pair in sweep.all_draws:  # every prompt says the same
        nats = sweep.true_kl[pair] * sweeps.N_TOKENS
        sweep.all_draws[pair] = np.full((8, 1), np.sqrt(2 * nats), np.float32)
    rows = [dataclasses.replace(r, kl=sweep.true_kl[r.component, r.scheme]) for r in sweep.rows]
    found = doubts(dataclasses.replace(sweep, rows=tuple(rows)), BUDGET, Settings())
    assert (found.pairs, found.n_unsure, found.sureness) == ((), 0, 1.0)
    assert found.chosen


def test_what_resamples_decide_otherwise_is_in_doubt_with_all_its_candidates_worst_first():
    sweep = sweeps.sweep(n_prompts=16, scale=1e-7)
    found = doubts(sweep, BUDGET, Settings())
    kls = {(row.component, row.scheme): row.kl for row in sweep.rows}
    assert 0 < found.n_unsure < len(sweep.components)
    assert 0.5 < found.sureness < 1
    assert {name for name, _ in found.pairs} < {c.name for c in sweep.components}
    assert len({name for name, _ in found.pairs}) == found.n_unsure
    assert [kls[pair] for pair in found.pairs] == sorted(
        (kls[p] for p in found.pairs), reverse=True
    )


def test_a_large_change_is_in_doubt_however_sure_its_place_is():
    sweep = sweeps.sweep(n_prompts=16, scale=1e-5, schemes=("int3",))
    found = doubts(sweep, Budget(Unit.components, len(sweep.components)), Settings())
    assert found.n_unsure == 0
    kls = {(row.component, row.scheme): row.kl for row in sweep.rows}
    assert set(found.pairs) == {pair for pair, kl in kls.items() if kl >= 0.1}
    assert 0 < len(found.pairs) < len(kls)


def test_what_was_measured_is_in_doubt_no_more():
    sweep = sweeps.sweep(n_prompts=16, scale=1e-7)
    pair = doubts(sweep, BUDGET, Settings()).pairs[0]
    row = next(r for r in sweep.rows if (r.component, r.scheme) == pair)
    measured = dataclasses.replace(row, method="measure")
    known = doubts(dataclasses.replace(sweep, rows=(*sweep.rows, measured)), BUDGET, Settings())
    assert pair not in known.pairs
    assert set(known.pairs) == set(doubts(sweep, BUDGET, Settings()).pairs) - {pair}


@pytest.mark.parametrize("seed", range(3))
def test_coupled_components_are_in_doubt_together(seed):
    sweep = sweeps.sweep(n_prompts=16, scale=1e-7, prompt_seed=seed)
    found = doubts(sweep, BUDGET, Settings(coupling="vllm"))
    of_attention = [
        name for name, _ in found.pairs if name.endswith(("q_proj", "k_proj", "v_proj"))
    ]
    assert len(of_attention) % 3 == 0
