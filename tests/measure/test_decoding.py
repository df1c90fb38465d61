"""Static cache, step by step: the text that transformers writes."""

import pytest
import torch

import runs
import tiny
from divergent_tokens.measure import decoding
from divergent_tokens.measure.decoding import can_decode, decode
from divergent_tokens.measure.generation import generate

PROMPTS = torch.tensor([list(range(30, 38)), list(range(90, 98)), list(range(150, 158))])
COUNT_IN_PYTHON = {"gemma2", "gemma3", "gpt-oss", "mamba2", "qwen3-next"}
"""Sliding windows and states."""


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_text_is_that_of_transformers(architecture):
    network = runs.model(architecture).network
    assert can_decode(network) == (architecture not in COUNT_IN_PYTHON)
    if can_decode(network):
        expected = generate(network, PROMPTS, new_tokens=20)
        assert decode(network, PROMPTS, new_tokens=20, replay=False) == expected


def test_ends_are_found_and_stop_the_rest(monkeypatch):
    network = runs.model().network
    free = generate(network, PROMPTS, new_tokens=40)
    ends = [free[0][3], free[1][7], free[2][5]]
    expected = generate(network, PROMPTS, new_tokens=40, eos_ids=ends)
    monkeypatch.setattr(decoding, "STEPS_BETWEEN_LOOKS", 4)
    steps = []
    found = decode(
        network,
        PROMPTS,
        new_tokens=40,
        eos_ids=ends,
        replay=False,
        on_step=lambda: steps.append(1),
    )
    assert found == expected
    longest = max(map(len, expected))
    assert longest < 40
    assert len(steps) == -(-longest // 4) * 4


def test_a_trial_stops_early_with_the_whole_cache():
    network = runs.model().network
    whole = decode(network, PROMPTS, new_tokens=20, replay=False)
    some = decode(network, PROMPTS, new_tokens=20, replay=False, at_most=5)
    assert some == [row[:5] for row in whole]


def test_one_token_and_each_step_told():
    network = runs.model().network
    steps = []
    found = decode(network, PROMPTS, new_tokens=1, replay=False, on_step=lambda: steps.append(1))
    assert found == generate(network, PROMPTS, new_tokens=1)
    assert len(steps) == 1


def test_layers_on_several_devices_are_not_replayed():
    network = runs.changed(runs.model(), lambda n: n).network
    network.hf_device_map = {"a": 0, "b": 1}
    assert not can_decode(network)
