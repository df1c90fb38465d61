"""From the middle of a network on: the same hidden states, bit for bit, and less work."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

import runs
import tiny
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import Plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import ModelError
from divergent_tokens.layers import decoder_layers
from divergent_tokens.measure.batches import BatchSize
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.layer_runs import LayerRuns
from divergent_tokens.measure.progress import silent
from divergent_tokens.measure.states import hidden_batches
from divergent_tokens.models import Model

IN_FULL: set[str] = set()
"""Architectures whose layers hand on more than their hidden states."""


@pytest.fixture(scope="module")
def completions():
    """Prompts and completions of several lengths: batches of two are padded, one is left over."""
    rows = [[5, 6, 7], [9, 8], [3, 4, 5, 6], [7], [8, 9, 9]]
    return runs.written(runs.prompts(lengths=[8, 5, 19, 8, 3]), rows)


@pytest.fixture
def deep():
    """Five layers."""
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).float().eval()
    return Model.of(network, tiny.tokenizer())


def in_full(model, completions, batch_size=2):
    head = find_head(model.network)
    size = BatchSize(batch_size)
    with torch.no_grad():
        return list(hidden_batches(model, head, completions, size, "", silent))


def from_layer(layer_runs, layer):
    with torch.no_grad():
        return list(layer_runs.hidden(layer))


def assert_equal(found, expected):
    assert [list(batch) for batch, _ in found] == [list(batch) for batch, _ in expected]
    for (_, rows), (_, others) in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))


def started(model, completions, batch_size=2):
    return LayerRuns(model, find_head(model.network), completions, batch_size=batch_size)


def lent(model, layer):
    components = [c for c in find_components(model.network) if c.layer == layer]
    plan = Plan({component.name: parse_scheme("int3") for component in components})
    return lent_plan(model, plan)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_final_states_are_those_of_a_full_pass_whatever_the_layer_does(architecture, completions):
    model = runs.model(architecture)
    layer_runs = started(model, completions)
    assert (layer_runs.refusal is None) == (architecture not in IN_FULL)
    base = in_full(model, completions)
    for layer in range(2):
        layer_runs.go_to(layer)
        assert_equal(from_layer(layer_runs, layer), base)
        with lent(model, layer):
            expected = in_full(model, completions)
            assert_equal(from_layer(layer_runs, layer), expected)
        assert not torch.equal(expected[0][1][0], base[0][1][0])
    assert all("forward" not in vars(module) for module in model.network.modules())


def test_layers_before_the_kept_one_do_not_run_and_advancing_runs_one(deep, completions):
    ran = Counter()
    layers = decoder_layers(deep.network)[1]
    layer_runs = started(deep, completions)
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.update([i]))
    n_batches = 3
    layer_runs.go_to(0)
    assert not ran
    layer_runs.go_to(3)
    assert ran == dict.fromkeys(range(3), n_batches)
    ran.clear()
    from_layer(layer_runs, 3)
    assert ran == dict.fromkeys((3, 4), n_batches)
    layer_runs.go_to(4)
    with lent(deep, 4):
        assert_equal(from_layer(layer_runs, 4), in_full(deep, completions))


def test_without_a_layer_everything_runs(deep, completions):
    layer_runs = started(deep, completions)
    with lent(deep, 0):
        assert_equal(from_layer(layer_runs, None), in_full(deep, completions))


def test_only_the_kept_layer_can_be_asked_for_and_none_comes_back(deep, completions):
    layer_runs = started(deep, completions)
    with pytest.raises(ValueError, match=r"go_to\(2\) first"):
        from_layer(layer_runs, 2)
    layer_runs.go_to(2)
    with pytest.raises(ValueError, match="layer 1 comes before layer 2"):
        layer_runs.go_to(1)


def hand_something_on(network):
    """Layer 1 reads what layer 0 left beside the hidden states, as value residuals do."""
    first, second = list(decoder_layers(network)[1])[:2]
    left = []
    first.mlp.register_forward_hook(lambda _m, _i, output: left.append(output))
    second.mlp.register_forward_hook(lambda _m, _i, output: output + left[-1])


def share_a_layer(network):
    layers = decoder_layers(network)[1]
    layers[1] = layers[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [(hand_something_on, "from layer 1 on other hidden states"), (share_a_layer, "more than once")],
)
def test_what_does_not_work_from_the_middle_on_runs_in_full(completions, change, said):
    model = runs.changed(runs.model(), change)
    layer_runs = started(model, completions)
    assert said in layer_runs.refusal
    layer_runs.go_to(1)
    assert_equal(from_layer(layer_runs, 1), in_full(model, completions))
    assert all("forward" not in vars(module) for module in model.network.modules())


def test_a_forward_that_somebody_put_on_a_layer_is_used_and_stays(deep, completions):
    layer = decoder_layers(deep.network)[1][3]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.5
    mine = layer.forward
    layer_runs = started(deep, completions)
    assert layer_runs.refusal is None
    layer_runs.go_to(3)
    assert_equal(from_layer(layer_runs, 3), in_full(deep, completions))
    assert layer.forward is mine


def test_a_batch_that_does_not_fit_any_more_is_run_in_parts(deep, completions):
    layer_runs = started(deep, completions, batch_size=5)
    layer_runs.go_to(2)
    expected = from_layer(layer_runs, 2)
    runs.failing_above(2, torch.OutOfMemoryError("CUDA out of memory"))(deep.network)
    found = from_layer(layer_runs, 2)
    assert [list(batch) for batch, _ in found] == [list(batch) for batch, _ in expected]
    for (_, rows), (_, others) in zip(found, expected, strict=True):
        for a, b in zip(rows, others, strict=True):
            torch.testing.assert_close(a, b)


def test_numbers_that_are_not_finite_are_said_with_their_module(deep, completions):
    layer_runs = started(deep, completions)
    layer_runs.go_to(2)
    with torch.no_grad():
        decoder_layers(deep.network)[1][2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"first in model\.layers\.2\.mlp\.down_proj"):
        from_layer(layer_runs, 2)
