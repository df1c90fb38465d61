"""vLLM itself is not at hand; what it is asked, and what is said without it."""

import dataclasses
import sys
import types

import pytest

import runs
from divergent_tokens.errors import ModelError
from divergent_tokens.measure.completions import complete


def named():
    """The tiny model under the name of a hub's."""
    return dataclasses.replace(runs.model(), reference="people/tiny")


def test_what_vllm_could_not_load_is_said():
    with pytest.raises(ModelError, match="a folder or a hub id, and llama is neither"):
        complete(runs.model(), runs.prompts(2), new_tokens=3, by_vllm=True)


def test_without_vllm_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match="pip install vllm, or leave --generate-with out"):
        complete(named(), runs.prompts(2), new_tokens=3, by_vllm=True)


def test_what_vllm_is_asked(monkeypatch, tmp_path):
    asked = {}

    class LLM:
        def __init__(self, **options):
            asked.update(options)

        def generate(self, prompts, settings):
            asked.update(vars(settings), prompts=prompts)
            rows = [runs.greedy(model.network, p["prompt_token_ids"], 4, ()) for p in prompts]
            outputs = [types.SimpleNamespace(token_ids=row) for row in rows]
            return [types.SimpleNamespace(outputs=[output]) for output in outputs]

    def settings(**given):
        return types.SimpleNamespace(**given)

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, settings
    monkeypatch.setitem(sys.modules, "vllm", fake)
    model, prompts = named(), runs.prompts(3)
    found = complete(model, prompts, new_tokens=4, ignore_eos=True, by_vllm=True, cache=tmp_path)
    expected = complete(model, prompts, new_tokens=4, ignore_eos=True, cache=tmp_path)
    assert (found.ids == expected.ids).all()
    assert (found.decoding, expected.decoding) == ("vllm", "dynamic")
    assert asked["model"] == model.reference
    assert asked["dtype"] == "float32"
    assert asked["generation_config"] == "vllm"
    assert asked["max_model_len"] == 8 + 4
    assert (asked["temperature"], asked["max_tokens"], asked["ignore_eos"]) == (0.0, 4, True)
    assert asked["prompts"][0] == {"prompt_token_ids": list(prompts.prompts[0].ids)}
    monkeypatch.setitem(sys.modules, "vllm", None)  # kept under a key of its own
    again = complete(model, prompts, new_tokens=4, ignore_eos=True, by_vllm=True, cache=tmp_path)
    assert again.decoding == "vllm"
