import pytest
from torch import nn

import runs
import tiny
from divergent_tokens.errors import ModelError
from divergent_tokens.layers import decoder_layers


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architectures_layers_are_found(architecture):
    network = runs.model(architecture).network
    name, layers = decoder_layers(network)
    assert len(layers) == network.config.get_text_config(decoder=True).num_hidden_layers
    assert network.get_submodule(name) is layers


def test_neither_experts_nor_another_tower_are_the_layers():
    network = runs.changed(runs.model(), lambda network: None).network
    layer = network.model.layers[0]
    layer.mlp.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    network.model.vision = nn.ModuleList(nn.Linear(2, 2) for _ in range(30))
    assert decoder_layers(network)[1][0] is layer


def test_a_network_without_a_list_of_layers_is_refused():
    network = runs.changed(runs.model(), lambda network: None).network
    network.model.layers = nn.Sequential(*network.model.layers)
    with pytest.raises(ModelError, match="has no list of decoder layers"):
        decoder_layers(network)
