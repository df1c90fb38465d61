import numpy as np
import pytest
import torch

import runs
import tiny
from divergent_tokens.errors import ModelError
from divergent_tokens.measure import states as module
from divergent_tokens.measure.batches import BatchSize
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.states import base_states

PROMPTS = runs.prompts(lengths=[8, 5, 8, 11, 5])
COMPLETIONS = runs.written(PROMPTS, [[9, 10, 11], [12], list(range(30, 37)), [40, 41], [50] * 5])
CPU_ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory")
CPU = torch.device("cpu")


def states_of(model, size=4, **options):
    head = find_head(model.network)
    return base_states(model, head, COMPLETIONS, batch_size=BatchSize(size), **options)


@torch.no_grad()
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_states_are_those_that_predict_the_completions_tokens(architecture):
    model = runs.model(architecture)
    head = find_head(model.network)
    found = states_of(model)
    assert found.array.shape[0] == COMPLETIONS.mask.sum() == found.offsets[-1]
    for prompt, ids in enumerate(COMPLETIONS.sequences()):
        n, length = len(PROMPTS.prompts[prompt].ids), COMPLETIONS.lengths[prompt]
        logits = head.logits(found.of(prompt, CPU)).double().numpy()
        expected = runs.logits_of(model.network, ids)[n - 1 : n - 1 + length]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_come_back_from_the_cache_bit_for_bit(tmp_path, dtype, monkeypatch):
    model = runs.changed(runs.model(), lambda network: network.to(dtype))
    fresh = states_of(model)
    kept = states_of(model, cache=tmp_path)
    monkeypatch.setattr(module, "hidden_batches", None)
    again = states_of(model, cache=tmp_path)
    assert isinstance(again.array, np.memmap)
    for prompt in range(5):
        for states in (kept, again):
            rows = states.of(prompt, CPU)
            assert rows.dtype == dtype
            assert torch.equal(rows, fresh.of(prompt, CPU))


def test_the_dtype_is_that_of_the_states_whatever_the_embeddings_is():
    """Layers in bfloat16 over an embedding in float32, as some quantizers leave them."""

    def widen(network):
        network.bfloat16()
        network.model.embed_tokens.float()
        network.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out.bfloat16())

    model = runs.changed(runs.model(), widen)
    assert model.dtype == torch.float32
    assert states_of(model).of(0, CPU).dtype == torch.bfloat16


def test_batch_size_changes_nothing():
    one, four = states_of(runs.model(), 1), states_of(runs.model(), 4)
    np.testing.assert_allclose(one.array, four.array, rtol=1e-5, atol=1e-5)
    assert (one.batch_size, four.batch_size) == (1, 4)


def test_running_out_of_memory_halves_the_batch_and_loses_nothing():
    limited = runs.changed(runs.model(), runs.failing_above(2, CPU_ERROR))
    found = states_of(limited, 4)
    assert found.batch_size == 2
    np.testing.assert_allclose(found.array, states_of(runs.model()).array, rtol=1e-5, atol=1e-5)


def test_candidates_learn_from_the_cache_what_fitted(tmp_path):
    limited = runs.changed(runs.model(), runs.failing_above(2, CPU_ERROR))
    states_of(limited, 4, cache=tmp_path)
    size = BatchSize(4)
    head = find_head(limited.network)
    again = base_states(limited, head, COMPLETIONS, batch_size=size, cache=tmp_path)
    assert size.value == again.batch_size == 2


def test_a_failure_on_the_way_leaves_nothing_in_the_cache(tmp_path):
    broken = runs.changed(runs.model(), runs.failing_above(2, RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        states_of(broken, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_entry_is_made_again(tmp_path):
    fresh = states_of(runs.model())
    states_of(runs.model(), cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "hidden.npy").write_bytes(b"")
    again = states_of(runs.model(), cache=tmp_path)
    np.testing.assert_array_equal(again.array, fresh.array)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_module_that_is_not_finite_is_named(value):
    def plant(network):
        network.model.layers[1].mlp.down_proj.weight[3, 5] = value

    broken = runs.changed(runs.model(), plant, "broken")
    with pytest.raises(ModelError, match=r"broken .* first in model\.layers\.1\.mlp\.down_proj;"):
        states_of(broken)
    assert not any(module._forward_hooks for module in broken.network.modules())
