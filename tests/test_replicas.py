"""Training on several devices is that on one; two CPU devices stand for two GPUs here."""

import threading

import numpy as np
import pytest
import torch

import runs
import tiny
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.recover import NotFiniteError, Recovery, Training, hold
from divergent_tokens.replicas import Replicas, training_devices

SEQUENCES = Sequences(np.random.default_rng(1).integers(4, 200, (12, 16)), "random")


def recovery(base, network, devices=(), **training):
    options = {"batch_size": 4, "micro_batch": 1, "learning_rate": 3e-3, "loss": "both"}
    return Recovery(
        network,
        base.network,
        SEQUENCES,
        Training(**{**options, **training}),
        total_steps=9,
        seed=0,
        devices=devices,
    )


def halved(base):
    """A copy with something to learn, half of which is held at zero, and the masks."""
    generator = torch.Generator().manual_seed(3)
    network = runs.changed(base, lambda n: n).network
    masks = {
        name: torch.rand(p.shape, generator=generator) > 0.5
        for name, p in network.named_parameters()
        if p.ndim >= 2
    }
    hold(network, masks)
    return network, masks


def weights(network):
    return [p.detach() for p in network.parameters()]


@pytest.mark.parametrize("loss", ["distill", "ce", "both"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe"])
def test_one_step_on_two_devices_is_that_on_one_to_the_bit(architecture, loss):
    base = runs.model(architecture)
    found = []
    for devices in ((), ("cpu", "cpu")):
        network, masks = halved(base)
        own = recovery(base, network, devices, batch_size=2, micro_batch=1, loss=loss)
        found.append((own.run(3, masks), weights(network)))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize(("n_devices", "micro_batch"), [(2, 1), (3, 2), (3, 4), (9, 4)])
def test_more_devices_differ_by_rounding_only_and_not_from_run_to_run(n_devices, micro_batch):
    base = runs.model()
    network, masks = halved(base)
    alone = recovery(base, network, micro_batch=micro_batch)
    loss = alone.run(3, masks)
    again = []
    for _ in range(2):
        other, _ = halved(base)
        together = recovery(base, other, ["cpu"] * n_devices, micro_batch=micro_batch)
        assert together.run(3, masks) == pytest.approx(loss, rel=1e-5)
        again.append(weights(other))
        for name, mask in masks.items():
            assert not other.get_parameter(name)[~mask].any()
    torch.testing.assert_close(again[0], weights(network), rtol=1e-3, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


def test_parts_are_dealt_out_in_turn_and_computed_side_by_side():
    network = runs.model().network
    replicas = Replicas(network, None, ["cpu"] * 3)
    together = threading.Barrier(3, timeout=60)
    seen = []

    def work(own, teacher, ids):
        if int(ids) < 3:  # nobody comes past here alone
            together.wait()
        seen.append((own, teacher, int(ids)))
        return float(ids) / 2

    assert replicas.backward(torch.arange(5).split(1), work) == [0, 0.5, 1, 1.5, 2]
    by_network = {id(own): [i for o, _, i in seen if o is own] for own, _, _ in seen}
    assert sorted(by_network.values()) == [[0, 3], [1, 4], [2]]
    assert by_network[id(network)] == [0, 3]
    assert all(teacher is None for _, teacher, _ in seen)


def test_what_is_cut_between_rounds_is_what_the_copies_compute_with():
    base = runs.model()
    network, masks = halved(base)
    both = recovery(base, network, ("cpu", "cpu"))
    both.run(1, masks)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.5)
    other = runs.changed(base, lambda n: n).network
    other.load_state_dict(network.state_dict())
    alone = recovery(base, other)
    alone.load_state({name: tensor.clone() for name, tensor in both.state().items()})
    assert both.run(2, masks) == pytest.approx(alone.run(2, masks), rel=1e-5)


def test_a_run_goes_on_with_another_number_of_devices():
    base = runs.model()
    network, masks = halved(base)
    whole = recovery(base, network, ("cpu", "cpu"), batch_size=2)
    whole.run(4, masks)
    other, _ = halved(base)
    first = recovery(base, other, ("cpu", "cpu"), batch_size=2)
    first.run(2, masks)
    second = recovery(base, other, batch_size=2)
    second.load_state(first.state())
    second.run(2, masks)
    assert all(torch.equal(a, b) for a, b in zip(weights(network), weights(other), strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # the second has dropout
def test_activations_made_again_on_two_devices(architecture):
    base = runs.model(architecture)
    found = []
    for again in (False, True):
        network, masks = halved(base)
        recovery(base, network, ("cpu", "cpu"), checkpointing=again).run(2, masks)
        assert not any(module.training for module in network.modules())
        found.append(weights(network))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_number_on_a_copy_stops_all():
    base = runs.model()
    network, masks = halved(base)
    both = recovery(base, network, ("cpu", "cpu"))
    before = [w.clone() for w in weights(network)]
    own = both._loss

    def wrong(computed, teacher, ids):
        loss = own(computed, teacher, ids)
        return loss if computed is network else loss * torch.inf

    both._loss = wrong
    with pytest.raises(NotFiniteError, match="the loss is inf at step 1"):
        both.run(1, masks)
    networks = [pair.network for pair in (both._replicas._own, *both._replicas._copies)]
    assert all(p.grad is None for one in networks for p in one.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(network), strict=True))
    both._loss = own
    assert np.isfinite(both.run(1, masks))


def test_no_copy_is_made_that_has_nothing_to_do():
    base = runs.model()
    network, _ = halved(base)
    assert len(recovery(base, network)._replicas) == 1
    assert len(recovery(base, network, ["cpu"] * 8)._replicas) == 4


def test_a_copy_shares_what_the_network_shares_and_nothing_with_it():
    network = tiny.network("gpt2")  # head and embedding are one
    replicas = Replicas(network, None, ("cpu", "cpu"))
    theirs = replicas._copies[0].network
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    own = {p.data_ptr() for p in (*network.parameters(), *network.buffers())}
    assert not own & {p.data_ptr() for p in (*theirs.parameters(), *theirs.buffers())}


def test_the_networks_own_device_comes_first():
    network = runs.model().network
    with pytest.raises(DivergentTokensError, match="meta, cpu was asked for, but the network lies"):
        Replicas(network, None, ("meta", "cpu"))
    assert training_devices(network) == (torch.device("cpu"),)
