import copy

import pytest
import torch
from transformers import GenerationConfig

import runs
import tiny
from divergent_tokens.measure.generation import generate

PROMPTS = torch.tensor([list(range(30, 38)), list(range(90, 98)), list(range(150, 158))])

PLANTED = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 9,
    "do_sample": True,
    "num_beams": 3,
    "temperature": 0.3,
    "top_k": 2,
    "max_length": 5,
    "max_new_tokens": 3,
    "length_penalty": 0.1,
    "forced_eos_token_id": 9,
    "forced_bos_token_id": 11,
    "begin_suppress_tokens": list(range(100)),
    "suppress_tokens": list(range(0, 250, 2)),
    "bad_words_ids": [[7], [8]],
    "sequence_bias": [[[10], 50.0]],
    "eos_token_id": list(range(100)),
    "use_cache": False,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_is_the_argmax_again_and_again(architecture):
    network = runs.model(architecture).network
    found = generate(network, PROMPTS, new_tokens=10)
    assert found == [runs.greedy(network, row.tolist(), 10, ()) for row in PROMPTS]


def test_nothing_of_the_generation_config_is_used():
    expected = generate(runs.model().network, PROMPTS, new_tokens=10)
    planted = GenerationConfig(**PLANTED)

    def plant(network):
        network.generation_config = planted

    network = runs.changed(runs.model(), plant).network
    before = copy.deepcopy(planted.to_dict())
    assert generate(network, PROMPTS, new_tokens=10) == expected
    assert network.generation_config is planted
    assert planted.to_dict() == before


def test_nothing_of_the_models_config_is_used_either():
    expected = generate(runs.model().network, PROMPTS, new_tokens=10)

    def plant(network):
        for name, value in PLANTED.items():
            if name not in ("use_cache", "eos_token_id", "return_dict_in_generate"):
                setattr(network.config, name, value)

    assert generate(runs.changed(runs.model(), plant).network, PROMPTS, new_tokens=10) == expected


def test_the_generation_config_comes_back_after_an_error():
    network = runs.changed(runs.model(), runs.failing_above(2, ValueError("too many"))).network
    own = network.generation_config
    with pytest.raises(ValueError, match="too many"):
        generate(network, PROMPTS, new_tokens=3)
    assert network.generation_config is own


def test_a_sequence_ends_with_its_own_first_end():
    network = runs.model().network
    free = generate(network, PROMPTS, new_tokens=12)
    ends = [free[0][3], free[1][7]]
    found = generate(network, PROMPTS, new_tokens=12, eos_ids=ends)
    for row, whole in zip(found, free, strict=True):
        cut = next((t + 1 for t, token in enumerate(whole) if token in ends), 12)
        assert row == whole[:cut]
    assert len({len(row) for row in found}) > 1


def test_ties_go_to_the_lowest_id():
    network = runs.changed(runs.model(), lambda network: network.lm_head.weight.zero_()).network
    assert generate(network, PROMPTS, new_tokens=4) == [[0] * 4] * 3


def test_each_step_is_told():
    steps = []
    generate(runs.model().network, PROMPTS, new_tokens=5, on_step=lambda: steps.append(1))
    assert len(steps) == 5


def test_draws_depend_on_their_seed_only():
    network = runs.model().network

    def draw(seed):
        return generate(network, PROMPTS, new_tokens=8, sample=True, seed=seed)

    torch.manual_seed(5)
    first = draw(3)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)  # the caller's own generator is untouched
    assert draw(3) == first
    assert draw(4) != first
    assert first != generate(network, PROMPTS, new_tokens=8)


def test_draws_have_temperature_one():
    """The first token of many draws is distributed as the model says, top_k and top_p aside."""
    network = runs.model().network
    n = 4000
    drawn = generate(network, PROMPTS[:1].repeat(n, 1), new_tokens=1, sample=True)
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=tiny.VOCABULARY)
    p = torch.tensor(runs.logits_of(network, PROMPTS[0].tolist())[-1]).softmax(-1)
    # Total variation of n draws from 256 outcomes lies near sqrt(256 / n) / 3.
    assert (counts / n - p).abs().sum() / 2 < 0.12
    assert (counts[p < p.sort(descending=True).values[50]] > 0).sum() > 20
