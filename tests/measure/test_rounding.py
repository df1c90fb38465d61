import pytest
import torch
from torch import nn

import runs
import tiny
from divergent_tokens.measure.rounding import lent_rounding

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


def test_without_a_float_matrix_its_other_floats_are_flipped():
    model = runs.changed(runs.model(), lambda network: None)
    layer = model.network.model.layers[0]
    for parameter in layer.parameters():
        if parameter.ndim == 2:  # as a packed checkpoint holds them
            parameter.requires_grad_(False).data = parameter.data.to(torch.int8)
    before = bits_of(model.network)
    with lent_rounding(model):
        flipped = bits_of(model.network)
    assert any(not torch.equal(bits, flipped[name]) for name, bits in before.items())


def test_packed_integers_are_left_alone():
    model = runs.changed(runs.model(), lambda network: None)
    packed = nn.Parameter(torch.arange(6, dtype=torch.int32).view(2, 3), requires_grad=False)
    model.network.model.layers[0].packed = packed
    with lent_rounding(model):
        assert packed.tolist() == [[0, 1, 2], [3, 4, 5]]
