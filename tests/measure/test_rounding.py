import pytest
import torch
from torch import nn

import runs
import tiny
from divergent_tokens.errors import ModelError
from divergent_tokens.measure.rounding import first_layer, lent_rounding

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits_of(network):
    return {
        name: tensor.clone().view(BITS[tensor.dtype])
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }


def is_first_layers_matrix(name, tensor):
    return any(f".{place}.0." in name for place in ("layers", "h")) and tensor.ndim >= 2


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_lowest_bits_of_the_first_layer_flip_and_come_back(architecture, dtype):
    model = runs.changed(runs.model(architecture), lambda network: network.to(dtype))
    before = bits_of(model.network)
    with lent_rounding(model, seed=3) as rounded:
        assert rounded.network is model.network
        assert rounded.reference == "m (rounding)"
        flipped = bits_of(model.network)
    touched = set()
    for name, bits in before.items():
        difference = bits ^ flipped[name]
        if difference.any():
            touched.add(name)
            assert set(difference.unique().tolist()) <= {0, 1}
            assert 0.3 < difference.float().mean() < 0.7
    assert touched == {name for name, bits in before.items() if is_first_layers_matrix(name, bits)}
    after = bits_of(model.network)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bits_come_back_after_an_exception_and_the_tensors_are_the_same_ones():
    model = runs.changed(runs.model(), lambda network: None)
    before, places = bits_of(model.network), [p.data_ptr() for p in model.network.parameters()]
    with pytest.raises(KeyboardInterrupt), lent_rounding(model):
        raise KeyboardInterrupt
    after = bits_of(model.network)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.data_ptr() for p in model.network.parameters()] == places


def test_the_flips_depend_on_the_seed():
    model = runs.changed(runs.model(), lambda network: None)
    name = "model.layers.0.mlp.up_proj.weight"
    found = []
    for seed in (0, 0, 1):
        with lent_rounding(model, seed=seed):
            found.append(bits_of(model.network)[name])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_first_layer_is_that_of_the_decoder_and_not_an_expert():
    network = runs.changed(runs.model(), lambda network: None).network
    layer = network.model.layers[0]
    layer.mlp.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    network.model.vision = nn.ModuleList(nn.Linear(2, 2) for _ in range(30))
    assert first_layer(network) is layer


def test_a_network_without_a_list_of_layers_is_refused():
    network = runs.changed(runs.model(), lambda network: None).network
    network.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="keeps its 7 layers in no list"):
        first_layer(network)


def test_packed_integers_are_left_alone():
    model = runs.changed(runs.model(), lambda network: None)
    packed = nn.Parameter(torch.arange(6, dtype=torch.int32).view(2, 3), requires_grad=False)
    model.network.model.layers[0].packed = packed
    with lent_rounding(model):
        assert packed.tolist() == [[0, 1, 2], [3, 4, 5]]
