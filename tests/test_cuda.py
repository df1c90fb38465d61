"""What only a GPU can show."""

import dataclasses

import numpy as np
import pytest
import torch

import runs
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.measure import segments, ways
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.decoding import can_decode, decode
from divergent_tokens.measure.generation import generate
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.layer_runs import LayerRuns
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.models import load_model
from divergent_tokens.offload import is_offloaded
from divergent_tokens.probe import probe
from divergent_tokens.recover import Recovery, Training, hold
from divergent_tokens.replicas import training_devices
from divergent_tokens.sweep import sweep

import offloaded  # isort: skip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

PROMPTS = torch.arange(30, 54).view(3, 8)
ROWS = [[5, 6, 7], [9, 8], [3, 4, 5, 6], [7], [8, 9, 9]]


def on_gpu(architecture="llama"):
    base = runs.changed(runs.model(architecture), lambda network: network)
    return dataclasses.replace(base, network=base.network.to("cuda"))


def completions():
    return runs.written(runs.prompts(lengths=[8, 5, 19, 8, 3]), ROWS)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "cohere", "granite"])
def test_replayed_steps_write_the_same_text(architecture):
    network = on_gpu(architecture).network
    assert can_decode(network)
    ids = PROMPTS.cuda()
    expected = generate(network, ids, new_tokens=20)
    assert decode(network, ids, new_tokens=20) == expected
    ends = [expected[0][3], expected[1][9]]
    ended = generate(network, ids, new_tokens=20, eos_ids=ends)
    assert decode(network, ids, new_tokens=20, eos_ids=ends) == ended


def test_a_way_is_chosen_once_and_remembered(tmp_path, monkeypatch):
    model, ids = on_gpu(), PROMPTS.cuda()
    trials = []
    own = ways._by_trial
    monkeypatch.setattr(ways, "_by_trial", lambda *a: trials.append(1) or own(*a))
    monkeypatch.setattr(ways, "_remembered", {})
    options = {"new_tokens": 30, "n_steps": 60, "cache": tmp_path}
    way = ways.fastest_way(model, ids, **options)
    assert way in ways.WAYS
    assert ways.fastest_way(model, ids, **options) == way
    monkeypatch.setattr(ways, "_remembered", {})
    assert ways.fastest_way(model, ids, **options) == way
    assert len(trials) == 1
    few = {**options, "new_tokens": 31, "n_steps": 31}
    assert ways.fastest_way(model, ids, **few) == "dynamic"


def test_steps_that_cannot_be_captured_are_not_replayed():
    model, ids = on_gpu("opt"), PROMPTS.cuda()
    assert can_decode(model.network)
    assert ways.fastest_way(model, ids, new_tokens=30, n_steps=60, cache=None) == "dynamic"
    assert len(generate(model.network, ids, new_tokens=30)) == 3  # and the device still works


def test_completions_say_how_they_were_written(tmp_path):
    prompts = runs.prompts(n=8)
    found = complete(on_gpu(), prompts, new_tokens=60, cache=tmp_path)
    assert found.decoding in ways.WAYS
    assert complete(on_gpu(), prompts, new_tokens=60, cache=tmp_path).decoding == found.decoding
    expected = complete(runs.model(), prompts, new_tokens=60)
    assert (found.ids == expected.ids).mean() > 0.9  # another device rounds otherwise


def test_spilled_inputs_are_the_resident_ones(monkeypatch):
    model = on_gpu()
    head = find_head(model.network)
    found = []
    for share in (0.25, 0.0):
        monkeypatch.setattr(segments, "SHARE_OF_MEMORY", share)
        layer_runs = LayerRuns(model, head, completions(), batch_size=2)
        layer_runs.go_to(1)
        assert all(kept.is_cuda == (share > 0) for kept in layer_runs._inputs)
        assert all(kept.is_cuda or kept.is_pinned() for kept in layer_runs._inputs)
        found.append([row for _, rows in layer_runs.hidden(1) for row in rows])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "gpt2"])
def test_layers_that_wait_in_memory(architecture, tmp_path):
    network = offloaded.checkpoint(tmp_path / "m", architecture)
    whole = load_model(tmp_path / "m", device="cuda", dtype="float32")
    most = offloaded.n_bytes(network) - 1
    off = load_model(tmp_path / "m", device="cuda", dtype="float32", max_memory=most)
    assert is_offloaded(off.network)
    assert off.device.type == "cuda"
    components = find_components(whole.network)
    scheme = [parse_scheme("int3")]
    draws = [probe(m, components, scheme, completions(), batch_size=2).draws for m in (whole, off)]
    np.testing.assert_allclose(draws[1], draws[0], rtol=1e-4, atol=1e-5)
    rows = [
        sweep(
            model,
            components,
            scheme,
            completions().prompts,
            tmp_path / f"{name}.db",
            method="measure",
            new_tokens=6,
            batch_size=2,
        ).rows
        for name, model in {"whole": whole, "off": off}.items()
    ]
    for a, b in zip(*rows, strict=True):
        assert a.kl == pytest.approx(b.kl, rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "gpt2"])
def test_layers_on_two_gpus(architecture, tmp_path):
    network = offloaded.checkpoint(tmp_path / "m", architecture)
    whole = load_model(tmp_path / "m", device="cuda:0", dtype="float32")
    most = offloaded.n_bytes(network) - 1
    spread = load_model(tmp_path / "m", dtype="float32", max_memory=most)
    assert not is_offloaded(spread.network)
    assert {p.device.index for p in spread.network.parameters()} == {0, 1}
    ends = [parse_scheme("int3")], find_components(whole.network, include=["*"])
    inner = [parse_scheme("int3"), parse_scheme("w8a8")], find_components(whole.network)
    for schemes, components in (ends, inner):
        draws = [
            probe(model, components, schemes, completions(), batch_size=2).draws
            for model in (whole, spread)
        ]
        np.testing.assert_allclose(draws[1], draws[0], rtol=1e-4, atol=1e-5)
    schemes, components = inner
    rows = [
        sweep(
            model,
            components,
            schemes,
            completions().prompts,
            tmp_path / f"{name}.db",
            method="measure",
            new_tokens=6,
            batch_size=2,
        ).rows
        for name, model in {"whole": whole, "spread": spread}.items()
    ]
    for a, b in zip(*rows, strict=True):
        assert a.kl == pytest.approx(b.kl, rel=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3-moe", "gpt2"])
def test_training_on_two_gpus(architecture, checkpointing):
    base = on_gpu(architecture)
    sequences = Sequences(np.random.default_rng(1).integers(4, 200, (12, 16)), "random")
    training = Training(
        batch_size=8, micro_batch=2, learning_rate=1e-2, loss="both", checkpointing=checkpointing
    )
    devices = training_devices(base.network)
    assert devices[0] == base.network.device
    assert len(devices) == torch.cuda.device_count()
    found = []
    for used in ((), devices[:2], devices[:2]):
        network = runs.noisy(runs.model(architecture), 0.3).network.to("cuda")
        masks = {n: p.detach().abs() > 0.1 for n, p in network.named_parameters() if p.ndim >= 2}
        hold(network, masks)
        recovery = Recovery(
            network, base.network, sequences, training, total_steps=20, seed=0, devices=used
        )
        losses = [recovery.run(10, masks) for _ in range(2)]
        assert losses[1] < losses[0]
        assert all(not network.get_parameter(n)[~mask].any() for n, mask in masks.items())
        assert {p.device for p in network.parameters()} == {devices[0]}
        found.append((losses, recovery))
    alone, *together = [losses for losses, _ in found]
    for losses in together:
        assert losses == pytest.approx(alone, rel=1e-2)  # products are in bfloat16
    (copy,) = found[1][1]._replicas._copies
    assert {t.device for t in (*copy.network.parameters(), *copy.network.buffers())} == {devices[1]}
    assert {p.device for p in copy.teacher.parameters()} == {devices[1]}
    moments = [v["exp_avg"] for v in found[1][1]._optimizer.state.values()]
    assert {moment.device for moment in moments} == {devices[0]}
