"""Groups of each architecture that the suite holds, and schemes that a server cannot load."""

import pytest

import tiny
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.couplings import Coupling, coupled, loadable
from divergent_tokens.errors import SchemeError

VLLM, TRANSFORMERS = Coupling.vllm, Coupling.transformers


def groups(architecture, coupling):
    """Names within their layers' blocks, only those that share."""
    components = find_components(tiny.network(architecture))
    names = [component.name for component in components]
    found = coupled(names, [component.kind for component in components], coupling)
    assert sorted(i for group in found for i in group) == list(range(len(names)))
    assert [group[0] for group in found] == sorted(group[0] for group in found)
    return [[names[i] for i in group] for group in found if len(group) > 1]


def test_q_k_v_and_gate_up_for_vllm():
    layer = "model.layers.1"
    assert groups("llama", VLLM)[2:] == [
        [f"{layer}.self_attn.{part}_proj" for part in "qkv"],
        [f"{layer}.mlp.{part}_proj" for part in ("gate", "up")],
    ]


def test_nothing_is_shared_without_a_coupling_or_a_mixture():
    for architecture in ("llama", "qwen3-moe", "gpt2"):
        assert groups(architecture, None) == []
    assert groups("llama", TRANSFORMERS) == []


def test_what_is_fused_already_stands_alone():
    assert groups("gpt2", VLLM) == []
    assert groups("opt", VLLM) == [
        [f"model.decoder.layers.{i}.self_attn.{part}_proj" for part in "kvq"] for i in range(2)
    ]


def test_experts_by_layer_or_all_together():
    by_layer = [group for group in groups("qwen3-moe", VLLM) if "experts" in group[0]]
    assert [len(group) for group in by_layer] == [12, 12]
    assert {name.split(".experts.")[0] for name in by_layer[1]} == {"model.layers.1.mlp"}
    (all_of_them,) = groups("qwen3-moe", TRANSFORMERS)
    assert len(all_of_them) == 24


def test_shared_experts_are_a_gate_and_an_up_like_any_other():
    found = [group for group in groups("qwen3-next", VLLM) if "shared_expert" in group[0]]
    assert [len(group) for group in found] == [2, 2]


def test_latent_attention():
    block = "model.layers.0.self_attn"
    parts = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    names = [f"{block}.{part}" for part in parts]
    found = coupled(names, ["q", "q", "other", "other", "o"], VLLM)
    assert found == ((0, 2), (1,), (3,), (4,))


def test_schemes_that_vllm_loads():
    schemes = [
        "int8",
        "int6:g64",
        "int4:g64:asym",
        "int8:tensor",
        "fp8",
        "magnitude:0.5+int3",
        "from:a+int3",
    ]
    fit = ("int8", "int4:g64:asym", "int8:tensor", "fp8", "from:a+int3")
    assert loadable(schemes, VLLM, "llama") == fit
    assert loadable(schemes, TRANSFORMERS, "llama") == tuple(schemes)
    assert loadable(schemes, None, "gpt2") == tuple(schemes)


def test_where_nothing_is_left_the_reasons_are_said():
    with pytest.raises(SchemeError, match=r"--couple vllm .*int6:g64: vLLM loads 4 and 8 bits"):
        loadable(["int6:g64", "int3"], VLLM, "llama")
    with pytest.raises(SchemeError, match="Conv1D layers of gpt2"):
        loadable(["int8"], TRANSFORMERS, "gpt2")
