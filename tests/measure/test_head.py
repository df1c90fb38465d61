import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaForCausalLM

import runs
import tiny
from divergent_tokens.errors import ModelError
from divergent_tokens.measure.batches import padded
from divergent_tokens.measure.head import find_head, kept_head

IDS = torch.tensor([list(range(20, 40)), list(range(100, 120))])


def leftovers(network) -> int:
    """Hooks and replaced forwards anywhere in the network."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for module in network.modules()
    )


@pytest.fixture(params=tiny.ARCHITECTURES)
def network(request):
    return runs.model(request.param).network


@torch.no_grad()
def test_the_two_halves_give_the_networks_own_logits(network):
    head = find_head(network)
    whole = network(input_ids=IDS, use_cache=False).logits
    hidden = head.hidden(IDS)
    for row in range(len(IDS)):
        assert torch.equal(head.logits(hidden[row]), whole[row].float())
        for n in (1, 3, 7):  # chunks of a few tokens
            parts = [head.logits(hidden[row, a : a + n]) for a in range(0, IDS.shape[1], n)]
            torch.testing.assert_close(torch.cat(parts), whole[row], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(network):
    head = find_head(network)
    rows = [IDS[0, :13].tolist(), IDS[1].tolist()]
    together = head.hidden(padded(rows, torch.device("cpu")))
    for row, ids in enumerate(rows):
        alone = head.hidden(torch.tensor([ids]))[0]
        torch.testing.assert_close(together[row, : len(ids)], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_nothing_is_left_behind_in_the_network(network):
    head = find_head(network)
    head.logits(head.hidden(IDS)[0])
    assert leftovers(network) == 0


@torch.no_grad()
def test_nothing_is_left_behind_after_an_error():
    base = runs.changed(runs.model(), lambda network: None)
    head = find_head(base.network)
    with pytest.raises(IndexError):
        head.hidden(torch.tensor([[10**6]]))
    with pytest.raises(RuntimeError, match="shape"):
        head.logits(torch.zeros(3, 5))
    assert leftovers(base.network) == 0


@torch.no_grad()
def test_a_forward_that_somebody_else_put_there_comes_back():
    base = runs.changed(runs.model(), lambda network: None)
    head = find_head(base.network)
    theirs = head.body.forward
    head.body.forward = lambda *args, **kwargs: theirs(*args, **kwargs)  # as accelerate does
    mine = head.body.forward
    head.logits(head.hidden(IDS)[0])
    assert head.body.forward is mine


@torch.no_grad()
def test_bfloat16_logits_are_those_of_the_network_widened():
    base = runs.changed(runs.model("gemma2"), lambda network: network.bfloat16())
    head = find_head(base.network)
    whole = base.network(input_ids=IDS, use_cache=False).logits
    found = head.logits(head.hidden(IDS)[0])
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), whole[0].float().numpy())


def test_a_network_without_logits_is_refused():
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(ModelError, match="BertModel does not make logits"):
        find_head(BertModel(config).eval())


class OffByItsInput(LlamaForCausalLM):
    """Its logits look at the ids, past the hidden states."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        if input_ids is not None:
            output.logits = output.logits + input_ids[..., None]
        return output


def test_logits_that_need_more_than_hidden_states_are_refused():
    with pytest.raises(ModelError, match="do not follow from its final hidden states alone"):
        find_head(OffByItsInput(tiny.CONFIGS["llama"]()).eval())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_kept_head_does_not_see_what_is_lent(architecture):
    network = runs.changed(runs.model(architecture), lambda network: None).network
    head = find_head(network)
    hidden = head.hidden(torch.arange(4, 8)[None])[0].detach()
    kept = kept_head(head, hidden)
    own = head.logits(hidden)
    assert torch.equal(kept.logits(hidden), own)
    places = {parameter.data_ptr() for parameter in kept.network.parameters()}
    assert places == {parameter.data_ptr() for parameter in network.parameters()}  # no memory
    for parameter in network.parameters():
        parameter.data = parameter.data * 1.5
    assert torch.equal(kept.logits(hidden), own)
    assert not torch.equal(head.logits(hidden), own)


def test_a_forward_of_somebody_elses_keeps_the_head_itself():
    def add_forward(network):
        forward = network.forward
        network.forward = lambda **kwargs: forward(**kwargs)

    network = runs.changed(runs.model(), add_forward).network
    head = find_head(network)
    assert kept_head(head, head.hidden(torch.arange(4, 8)[None])[0].detach()) is head
