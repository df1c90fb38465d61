"""Experts run in the open give what transformers' own implementations give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import runs
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.expert_forward import grouped_product, open_experts
from divergent_tokens.errors import ModelError

MIXTURES = ("qwen3-moe", "gpt-oss", "qwen3-next")


def plain(inputs, times):
    return times(inputs.x)


def logits(network, ids):
    with torch.no_grad():
        return network(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("architecture", MIXTURES)
def test_they_give_what_the_model_gives_and_go_away_again(architecture, implementation, dtype):
    network = runs.changed(runs.model(architecture), lambda network: network.to(dtype)).network
    network.set_experts_implementation(implementation)
    ids = torch.randint(4, 200, (3, 11), generator=torch.Generator().manual_seed(0))
    own = logits(network, ids)
    with open_experts(network, find_components(network), plain):
        apart = logits(network, ids)
    assert torch.allclose(apart, own, atol=1e-4 if dtype == torch.float32 else 0.5)
    assert torch.equal(logits(network, ids), own)
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_each_part_sees_its_experts_tokens():
    network = runs.model("qwen3-moe").network
    seen = {}

    def watch(inputs, times):
        seen[inputs.stack, inputs.part] = inputs
        return times(inputs.x)

    components = [c for c in find_components(network) if ".0.mlp" in c.name and c.expert == 1]
    routed = []
    gate = network.model.layers[0].mlp.gate
    hook = gate.register_forward_hook(lambda _m, _i, output: routed.append(output[-1]))
    with open_experts(network, components, watch):
        logits(network, torch.arange(4, 24).view(2, 10))
    hook.remove()
    name = "model.layers.0.mlp.experts"
    assert seen.keys() == {(name, part) for part in ("gate_proj", "up_proj", "down_proj")}
    gate_inputs, down_inputs = seen[name, "gate_proj"], seen[name, "down_proj"]
    assert gate_inputs.x is seen[name, "up_proj"].x
    assert down_inputs.x.shape == (40, 24)  # every token passes two experts
    for expert in range(4):
        tokens = gate_inputs.tokens[gate_inputs.experts == expert]
        assert tokens.tolist() == torch.where((routed[0] == expert).any(-1))[0].tolist()
        assert gate_inputs.counts[expert] == len(tokens)


def test_outputs_that_are_changed_change_the_logits():
    network = runs.model("gpt-oss").network
    ids = torch.arange(4, 24).view(2, 10)

    def doubled(inputs, times):
        return times(inputs.x) * (2 if inputs.part == "down_proj" else 1)

    own = logits(network, ids)
    with open_experts(network, find_components(network), doubled):
        assert not torch.allclose(logits(network, ids), own, atol=1e-2)


def test_opened_twice_both_happen_the_older_first():
    network = runs.model("qwen3-moe").network
    ids = torch.arange(4, 24).view(2, 10)
    seen = []

    def doubled(inputs, times):
        seen.append("old")
        return times(2 * inputs.x)

    def watched(inputs, times):
        seen.append(inputs.x)
        return times(inputs.x)

    components = [c for c in find_components(network) if ".0.mlp" in c.name]
    with open_experts(network, components, watched):
        logits(network, ids)
        single = seen[0]
        seen.clear()
    with open_experts(network, components, doubled):
        expected = logits(network, ids)
        seen.clear()
        with open_experts(network, components, watched):
            assert torch.equal(logits(network, ids), expected)
        assert seen[0] == "old"
        assert torch.equal(seen[1], 2 * single)
        assert torch.equal(logits(network, ids), expected)
    assert not any("forward" in module.__dict__ for module in network.modules())


def test_they_go_away_after_an_exception():
    network = runs.model("qwen3-moe").network
    with pytest.raises(KeyboardInterrupt), open_experts(network, find_components(network), plain):
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
        open_experts(network, components, plain),
    ):
        pass
    assert not any("forward" in module.__dict__ for module in network.modules())


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    n_out=st.sampled_from([3, 8]),
    n_in=st.sampled_from([5, 8]),
    transposed=st.booleans(),
)
def test_a_grouped_product_is_a_product_for_each_group(counts, n_out, n_in, transposed):
    generator = torch.Generator().manual_seed(len(counts))
    weights = torch.randn(len(counts), n_out, n_in, generator=generator)
    if transposed:
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    x = torch.randn(sum(counts), n_in, generator=generator, requires_grad=True)
    out = grouped_product(x, weights, torch.tensor(counts))
    parts = x.split(counts)
    slow = torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)])
    assert torch.allclose(out, slow, atol=1e-5)
    factors = torch.randn(out.shape, generator=generator)
    (gradient,) = torch.autograd.grad(out, x, factors)
    (expected,) = torch.autograd.grad(slow, x, factors)
    assert torch.allclose(gradient, expected, atol=1e-5)
