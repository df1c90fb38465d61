"""Plans that a server would not load rightly, and that it is so: transformers is tried."""

import dataclasses

import pytest
import torch

import tiny
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.compress.plan import Plan, uniform_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.compress.servers import problems

TRANSFORMERS, VLLM = Coupling.transformers, Coupling.vllm


def found(architecture, scheme, target, *, include=(), dtype=torch.float32):
    network = tiny.network(architecture)
    plan = uniform_plan(find_components(network, include=include), parse_scheme(scheme))
    return problems(plan, find_components(network, include=["*"]), target, dtype=dtype)


@pytest.mark.parametrize("target", list(Coupling))
@pytest.mark.parametrize("scheme", ["int8", "w8a8", "fp8", "int8:tensor", "magnitude:0.5"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_uniform_plans_of_dense_models_are_loaded(architecture, scheme, target):
    assert found(architecture, scheme, target) == ()


@pytest.mark.parametrize(
    ("architecture", "scheme", "target", "said"),
    [
        ("gpt2", "int8", TRANSFORMERS, "Conv1D layers of gpt2 would be filled with new weights"),
        ("gpt2", "int8", VLLM, "Conv1D layers of gpt2"),
        ("gpt-oss", "int8", TRANSFORMERS, "no server unpacks the experts of gpt_oss"),
        ("mamba2", "int8", TRANSFORMERS, "out_proj (int8): transformers sets the weight"),
        ("llama", "nvfp4", TRANSFORMERS, "4-bit floats to bfloat16 only"),
        ("llama", "int4:g16:asym", TRANSFORMERS, "zero points in another shape"),
        ("llama", "int6", VLLM, "integers of 4 and 8 bits"),
        ("llama", "int4:g16", VLLM, "in groups of 32, 64, 128"),
        ("qwen3-moe", "w8a8", TRANSFORMERS, "from packed integers alone"),
        ("llama", "nvfp4", VLLM, "a scale of its own over its groups' scales"),
        ("qwen3-moe", "int4:g32:asym", VLLM, "symmetric integers only for experts"),
        ("opt", "w8a8", TRANSFORMERS, "one scale for all tokens"),
        ("llama", "from:somewhere", VLLM, "leaves no codes"),
    ],
)
def test_what_is_refused_and_why(architecture, scheme, target, said):
    first = found(architecture, scheme, target)[0]
    assert said in str(first)
    assert first.instead


@pytest.mark.parametrize("scheme", ["int8", "gptq:int8", "gptq:int4:g32"])
def test_packed_integers_of_experts_are_loaded(scheme):
    assert found("qwen3-moe", scheme, TRANSFORMERS) == ()


def test_shared_experts_mostly_get_tokens_without_prompts():
    shared = ["*.shared_expert.up_proj"]
    first = found("qwen3-next", "w8a8", TRANSFORMERS, include=shared)[0]
    assert "one scale for all tokens" in first.why
    assert not any("one scale" in p.why for p in found("qwen3-next", "w8a8", VLLM, include=shared))
    assert not any(
        "one scale" in p.why for p in found("qwen3-next", "int8", TRANSFORMERS, include=shared)
    )


@pytest.mark.parametrize(
    ("model_type", "name", "refused"),
    [
        ("falcon", "transformer.h.0.mlp.dense_h_to_4h", True),
        ("gpt_bigcode", "transformer.h.0.mlp.c_proj", True),
        ("gpt_bigcode", "transformer.h.0.mlp.c_fc", False),
    ],
)
def test_modules_whose_weights_transformers_sets_while_it_loads(model_type, name, refused):
    component = find_components(tiny.network("llama"))[0]
    component = dataclasses.replace(component, name=name, model_type=model_type, parameter=name)
    plan = {scheme: Plan({name: parse_scheme(scheme)}) for scheme in ("int8", "fp8")}
    said = problems(plan["int8"], [component], TRANSFORMERS, dtype=torch.float32)
    assert [p.component for p in said] == [name] * refused
    assert not problems(plan["fp8"], [component], TRANSFORMERS, dtype=torch.float32)


def test_embeddings_are_refused_packed_but_not_pruned():
    assert "tied ones nowhere" in str(found("llama", "int8", VLLM, include=["lm_head"])[0])
    assert found("llama", "magnitude:0.5", VLLM, include=["lm_head"]) == ()


@pytest.mark.parametrize("architecture", ["gpt2", "gpt-oss", "qwen3-moe"])
def test_a_pruned_matrix_is_an_ordinary_one_anywhere(architecture):
    assert found(architecture, "magnitude:0.5", TRANSFORMERS) == ()


def test_4_bit_floats_are_fine_in_bfloat16():
    assert found("llama", "nvfp4", TRANSFORMERS, dtype=torch.bfloat16) == ()


def mixed(architecture, schemes, target):
    network = tiny.network(architecture)
    components = find_components(network)
    texts = {c.name: schemes(c) for c in components}
    plan = Plan({name: parse_scheme(text) for name, text in texts.items() if text})
    every = find_components(network, include=["*"])
    return problems(plan, every, target, dtype=torch.float32)


def test_half_a_fused_matrix_is_refused_by_vllm_alone():
    def only_q(component):
        return "int8" if component.kind == "q" else None

    assert mixed("llama", only_q, TRANSFORMERS) == ()
    first, second = mixed("llama", only_q, VLLM)
    assert first.component == "model.layers.0.self_attn.k_proj"
    assert "q_proj has int8" in first.why
    assert (first.scheme, second.component) == ("unchanged", "model.layers.1.self_attn.k_proj")


def test_experts_of_two_schemes():
    def by_layer(component):
        return f"int{4 + 4 * component.layer}" if component.kind == "expert" else None

    def within(component):
        return f"int{4 + 4 * (component.expert % 2)}" if component.kind == "expert" else None

    assert mixed("qwen3-moe", by_layer, VLLM) == ()
    (one,) = mixed("qwen3-moe", by_layer, TRANSFORMERS)
    assert "one scheme for all 24 routed experts" in one.why
    assert len(mixed("qwen3-moe", within, VLLM)) == 2


@pytest.mark.parametrize("expert", [None, "magnitude:0.5"])
def test_experts_that_stay_dense_beside_codes_would_be_lost(expert):
    def attention(component):
        return expert if component.kind == "expert" else "int8"

    first = mixed("qwen3-moe", attention, TRANSFORMERS)[0]
    assert "loses those that are not in codes" in first.why
    assert mixed("qwen3-moe", attention, VLLM) == ()


def test_a_whole_plan_has_its_problems_in_order():
    names = [problem.component for problem in found("llama", "int6", VLLM)]
    assert names == [c.name for c in find_components(tiny.network("llama"))]
