"""Experts run one by one give what transformers' own implementations give."""

import pytest
import torch

import runs
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.expert_forward import experts_one_by_one
from divergent_tokens.errors import ModelError

MIXTURES = ("qwen3-moe", "gpt-oss", "qwen3-next")


def plain(_name, x, _rows, times):
    return times(x)


def logits(network, ids):
    with torch.no_grad():
        return network(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_they_give_what_the_model_gives_and_go_away_again(architecture, implementation):
    network = runs.changed(runs.model(architecture), lambda network: None).network
    network.set_experts_implementation(implementation)
    ids = torch.randint(4, 200, (3, 11), generator=torch.Generator().manual_seed(0))
    own = logits(network, ids)
    with experts_one_by_one(network, find_components(network), plain):
        apart = logits(network, ids)
    assert torch.allclose(apart, own, atol=1e-4)
    assert torch.equal(logits(network, ids), own)
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_each_matrix_sees_its_own_tokens():
    network = runs.model("qwen3-moe").network
    seen = {}

    def watch(name, x, rows, times):
        seen[name] = (x, rows)
        return times(x)

    components = [c for c in find_components(network) if ".0.mlp" in c.name and c.expert == 1]
    routed = []
    gate = network.model.layers[0].mlp.gate
    hook = gate.register_forward_hook(lambda _m, _i, output: routed.append(output[-1]))
    with experts_one_by_one(network, components, watch):
        logits(network, torch.arange(4, 24).view(2, 10))
    hook.remove()
    name = "model.layers.0.mlp.experts.1"
    x, rows = seen[f"{name}.gate_proj"]
    assert x is seen[f"{name}.up_proj"][0]
    assert rows.tolist() == torch.where((routed[0] == 1).any(-1))[0].tolist()
    assert seen[f"{name}.down_proj"][0].shape == (len(rows), 24)
    assert not any(name.startswith("model.layers.1") for name in seen)  # not asked for


def test_a_matrix_whose_outputs_are_changed_changes_the_logits():
    network = runs.model("gpt-oss").network
    ids = torch.arange(4, 24).view(2, 10)

    def doubled(name, x, _rows, times):
        return times(x) * (2 if name.endswith("experts.0.down_proj") else 1)

    own = logits(network, ids)
    with experts_one_by_one(network, find_components(network), doubled):
        assert not torch.allclose(logits(network, ids), own, atol=1e-2)


def test_it_goes_away_after_an_exception():
    network = runs.model("qwen3-moe").network
    with (
        pytest.raises(KeyboardInterrupt),
        experts_one_by_one(network, find_components(network), plain),
    ):
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_a_class_that_declares_nothing_is_refused():
    network = runs.changed(runs.model("qwen3-moe"), lambda network: None).network
    components = find_components(network)
    network.model.layers[1].mlp.experts.has_bias = None
    with (
        pytest.raises(
            ModelError, match=r"layers\.1\.mlp\.experts \(Qwen3MoeExperts\) does not say"
        ),
        experts_one_by_one(network, components, plain),
    ):
        pass
    assert not any("forward" in module.__dict__ for module in network.modules())
