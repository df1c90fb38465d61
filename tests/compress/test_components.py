"""Components of every architecture against names and shapes written by hand, and what they do."""

import re
from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, JetMoeConfig, LongcatFlashConfig, PreTrainedModel

import tiny
from divergent_tokens.compress.components import (
    Component,
    component_view,
    ends,
    find_components,
    weight_of,
)
from divergent_tokens.errors import ModelError

LLAMA = {
    "model.layers.{}.self_attn.q_proj": ("q", (32, 32)),
    "model.layers.{}.self_attn.k_proj": ("k", (16, 32)),
    "model.layers.{}.self_attn.v_proj": ("v", (16, 32)),
    "model.layers.{}.self_attn.o_proj": ("o", (32, 32)),
    "model.layers.{}.mlp.gate_proj": ("gate", (48, 32)),
    "model.layers.{}.mlp.up_proj": ("up", (48, 32)),
    "model.layers.{}.mlp.down_proj": ("down", (32, 48)),
}
WIDE_HEADS = {
    "model.layers.{}.self_attn.q_proj": ("q", (64, 32)),
    "model.layers.{}.self_attn.k_proj": ("k", (32, 32)),
    "model.layers.{}.self_attn.v_proj": ("v", (32, 32)),
    "model.layers.{}.self_attn.o_proj": ("o", (32, 64)),
}
DENSE_WIDE = LLAMA | WIDE_HEADS


def _experts(inner: int) -> dict[str, tuple[str, tuple[int, int]]]:
    return {
        f"model.layers.{{}}.mlp.experts.{expert}.{part}": ("expert", shape)
        for expert in range(4)
        for part, shape in (
            ("gate_proj", (inner, 32)),
            ("up_proj", (inner, 32)),
            ("down_proj", (32, inner)),
        )
    }


IN_EVERY_LAYER = {
    "llama": LLAMA,
    "llama-padded": LLAMA,
    "qwen3": DENSE_WIDE,
    "gemma3": DENSE_WIDE,
    "gpt2": {
        "transformer.h.{}.attn.c_attn": ("other", (96, 32)),
        "transformer.h.{}.attn.c_proj": ("o", (32, 32)),
        "transformer.h.{}.mlp.c_fc": ("up", (128, 32)),
        "transformer.h.{}.mlp.c_proj": ("down", (32, 128)),
    },
    "opt": {
        "model.decoder.layers.{}.self_attn.q_proj": ("q", (32, 32)),
        "model.decoder.layers.{}.self_attn.k_proj": ("k", (32, 32)),
        "model.decoder.layers.{}.self_attn.v_proj": ("v", (32, 32)),
        "model.decoder.layers.{}.self_attn.out_proj": ("o", (32, 32)),
        "model.decoder.layers.{}.fc1": ("up", (48, 32)),
        "model.decoder.layers.{}.fc2": ("down", (32, 48)),
    },
    "gemma2": DENSE_WIDE,
    "granite": LLAMA,
    "cohere": LLAMA,
    "qwen3-moe": WIDE_HEADS | _experts(inner=24),
    "gpt-oss": WIDE_HEADS | _experts(inner=48),
    "mamba2": {
        "backbone.layers.{}.mixer.in_proj": ("other", (168, 32)),
        "backbone.layers.{}.mixer.out_proj": ("other", (32, 64)),
    },
}


def _expected(architecture: str) -> dict[str, tuple[str, int, tuple[int, int]]]:
    if architecture != "qwen3-next":
        return {
            form.format(layer): (kind, layer, shape)
            for layer in (0, 1)
            for form, (kind, shape) in IN_EVERY_LAYER[architecture].items()
        }
    shared = "model.layers.{}.mlp.shared_expert."
    mixture = _experts(inner=24) | {
        shared + "gate_proj": ("gate", (24, 32)),
        shared + "up_proj": ("up", (24, 32)),
        shared + "down_proj": ("down", (32, 24)),
    }
    linear_attention = {
        "model.layers.{}.linear_attn.in_proj_qkvz": ("other", (96, 32)),
        "model.layers.{}.linear_attn.in_proj_ba": ("other", (8, 32)),
        "model.layers.{}.linear_attn.out_proj": ("other", (32, 32)),
    }
    # Its query projection holds the output gate too.
    attention = WIDE_HEADS | {"model.layers.{}.self_attn.q_proj": ("q", (128, 32))}
    return {
        form.format(layer): (kind, layer, shape)
        for layer, forms in enumerate((mixture | linear_attention, mixture | attention))
        for form, (kind, shape) in forms.items()
    }


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_names_kinds_and_shapes(architecture: str) -> None:
    components = find_components(tiny.network(architecture))
    found = {c.name: (c.kind, c.layer, c.shape) for c in components}
    assert found == _expected(architecture)
    assert len(found) == len(components)


def test_sizes_and_experts() -> None:
    by_name = {c.name: c for c in find_components(tiny.network("qwen3-moe"))}
    expert = by_name["model.layers.1.mlp.experts.2.gate_proj"]
    assert expert.expert == 2
    assert expert.n_parameters == 24 * 32
    assert expert.base_size_bytes == 2 * 24 * 32  # 16 bits a weight, though it runs in float32
    assert by_name["model.layers.1.self_attn.q_proj"].expert is None


def test_weights_of_eight_bits_count_eight() -> None:
    network = tiny.network("llama")
    narrow = network.model.layers[0].mlp.up_proj
    narrow.weight = nn.Parameter(narrow.weight.detach().to(torch.float8_e4m3fn), False)
    (component,) = find_components(network, include=["*.0.mlp.up_proj"])
    assert component.base_size_bytes == 48 * 32


# --- what a component's view does ---


def _rank_one(component: Component, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    out, into = (torch.randn(n, generator=generator) for n in component.shape)
    return torch.outer(out, into)  # [out, in]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_change_through_the_view_changes_the_output_by_x_dw_t(architecture: str) -> None:
    network = tiny.network(architecture)
    for component in find_components(network):
        if component.stack_index is not None:
            continue  # test_experts.py
        module = network.get_submodule(component.name)
        x = torch.randn(5, component.shape[1], generator=torch.Generator().manual_seed(1))
        change = _rank_one(component)
        with torch.no_grad():
            before = module(x)
            weight_of(network, component).add_(change)
            after = module(x)
        torch.testing.assert_close(after, before + x @ change.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_views_share_storage_and_do_not_overlap(architecture: str) -> None:
    network = tiny.network(architecture)
    components = find_components(network)
    with torch.no_grad():
        for number, component in enumerate(components):
            weight_of(network, component).fill_(float(number))
    for number, component in enumerate(components):
        view = weight_of(network, component)
        assert view.shape == component.shape
        assert not view.requires_grad
        assert torch.equal(view, torch.full(component.shape, float(number))), component.name


def test_experts_fill_their_fused_tensors() -> None:
    for architecture in ("qwen3-moe", "gpt-oss"):
        network = tiny.network(architecture)
        with torch.no_grad():
            for component in find_components(network, include=["*.experts.*"]):
                weight_of(network, component).fill_(7.0)
        experts = network.model.layers[1].mlp.experts
        assert bool((experts.gate_up_proj == 7).all())
        assert bool((experts.down_proj == 7).all())


def test_a_component_of_another_network_is_refused() -> None:
    (wide,) = find_components(tiny.network("qwen3"), include=["*.0.self_attn.q_proj"])
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj"):
        weight_of(tiny.network("llama"), wide)


def test_view_of_a_tensor_of_the_same_layout() -> None:
    network = tiny.network("gpt2")
    (component,) = find_components(network, include=["*.0.mlp.c_fc"])
    storage = torch.arange(32 * 128.0).reshape(32, 128)  # Conv1D: [in, out]
    assert torch.equal(component_view(storage, component), storage.T)


# --- what is not a component ---


def test_a_matrix_that_two_modules_share_is_listed_once() -> None:
    network = tiny.network("llama")
    first, second = network.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    names = [c.name for c in find_components(network)]
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.1.mlp.up_proj" not in names


def test_unfused_experts_and_their_router() -> None:
    """As remote code has them: a list of small networks beside a linear `gate`."""
    network = tiny.network("llama")
    for layer in network.model.layers:
        layer.mlp.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 6)}) for _ in range(3))
        layer.mlp.gate = nn.Linear(4, 3)
        layer.mlp.router = nn.ModuleDict({"inner": nn.Linear(4, 3)})
    added = find_components(network, exclude=["*_proj"])
    assert [(c.name, c.kind, c.expert, c.shape) for c in added[:3]] == [
        (f"model.layers.0.mlp.experts.{e}.w1", "expert", e, (6, 4)) for e in range(3)
    ]
    assert len(added) == 6


def test_a_gate_without_experts_is_no_router() -> None:
    network = tiny.network("llama")
    for layer in network.model.layers:
        layer.mlp.gate = nn.Linear(4, 3)
    assert len(find_components(network, include=["*.mlp.gate"])) == 2


def test_packed_weights_are_named() -> None:
    network = tiny.network("llama")
    packed = torch.zeros(48, 32, dtype=torch.int8)
    network.model.layers[1].mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.up_proj: it holds torch.int8 \[48, 32\]"
    ):
        find_components(network)
    assert len(find_components(network, exclude=["*.1.mlp.up_proj"])) == 13


def _jetmoe() -> PreTrainedModel:
    config = JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return AutoModelForCausalLM.from_config(config)


def test_an_unknown_layout_is_named_and_can_be_excluded() -> None:
    network = _jetmoe()
    with pytest.raises(ModelError, match=r"layers\.0\..*layout.*not known.*\[4, .*exclude it"):
        find_components(network)
    rest = find_components(network, exclude=["*_linear"])
    assert [c.name for c in rest] == ["model.layers.0.self_attention.kv_proj"]
    assert find_components(network, include=["*.kv_proj"]) == rest


def test_shapes_that_contradict_the_layout_are_refused() -> None:
    network = tiny.network("qwen3-moe")
    network.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts.*\[4, 48, 32\]"):
        find_components(network)


def test_experts_that_are_identities_have_no_weights() -> None:
    config = LongcatFlashConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        ffn_hidden_size=48,
        expert_ffn_hidden_size=24,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        n_routed_experts=3,
        zero_expert_num=2,
        moe_topk=2,
    )
    network = AutoModelForCausalLM.from_config(config)
    experts = find_components(network, include=["*.experts.*"])
    assert {c.expert for c in experts} == {0, 1, 2}
    assert {c.shape for c in experts} == {(24, 32), (32, 24)}


def test_a_network_without_linear_layers_is_refused() -> None:
    network = tiny.network("llama")
    for layer in network.model.layers:
        layer.mlp = layer.self_attn = nn.Identity()
    with pytest.raises(ModelError, match="no linear layers"):
        find_components(network)


# --- embeddings and head ---

ENDS = {
    "llama": ("model.embed_tokens", "lm_head"),
    "gemma3": ("model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "opt": ("model.decoder.embed_tokens", "lm_head"),
    "mamba2": ("backbone.embeddings", "lm_head"),
    "gpt-oss": ("model.embed_tokens", "lm_head"),
}


@pytest.mark.parametrize("architecture", ENDS)
def test_ends_come_only_if_asked_for(architecture: str) -> None:
    network = tiny.network(architecture)
    embedding, head = ENDS[architecture]
    inner = find_components(network)
    found = ends(network)
    tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
    assert [(c.name, c.kind, c.layer) for c in found] == [
        (embedding, "embedding", None),
        *([] if tied else [(head, "head", None)]),
    ]
    assert not set(found) & set(inner)
    for name in (embedding, head):  # tied: one component, whichever name brings it in
        (chosen,) = find_components(network, include=[name])
        assert chosen == (found[0] if tied or name == embedding else found[1])
    both = find_components(network, include=[embedding, head, "*.0.*"])
    assert both[0] == found[0]
    assert both[1:] == (
        *find_components(network, include=["*.0.*"]),
        *([] if tied else [found[1]]),
    )
    assert find_components(network, exclude=[head]) == inner
    if tied:
        assert find_components(network, include=["*"], exclude=[head]) == inner
    for end in found:
        assert end.shape == (network.config.vocab_size, weight_of(network, end).shape[1])
        assert weight_of(network, end).data_ptr() == (
            network.get_parameter(end.parameter).data_ptr()
        )


def test_an_end_that_is_no_matrix_is_named_if_asked_for() -> None:
    network = tiny.network("llama")
    packed = torch.zeros(256, 32, dtype=torch.int8)
    network.lm_head.weight = nn.Parameter(packed, requires_grad=False)
    assert len(find_components(network)) == 14
    assert [end.kind for end in ends(network)] == ["embedding"]
    with pytest.raises(ModelError, match=r"lm_head: it holds torch\.int8"):
        find_components(network, include=["lm_head"])


def test_components_know_their_architecture() -> None:
    network = tiny.network("qwen3-moe")
    found = (*find_components(network), *ends(network))
    assert {component.model_type for component in found} == {"qwen3_moe"}


# --- patterns ---


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.q_proj"], [], r".*\.q_proj"),
        (["*.0.*"], ["*.mlp.*"], r"model\.layers\.0\.self_attn\..*"),
        (["*.q_proj", "*.k_proj"], [], r".*\.[qk]_proj"),
        ([r"re:layers\.1\.mlp\.(up|down)_proj$"], [], r"model\.layers\.1\.mlp\.(up|down)_proj"),
        ([], ["re:self_attn"], r".*\.mlp\..*"),
        (["model.layers.1.mlp.up_proj"], [], r"model\.layers\.1\.mlp\.up_proj"),
    ],
)
def test_patterns(include: list[str], exclude: list[str], expected: str) -> None:
    network = tiny.network("llama")
    found = [c.name for c in find_components(network, include=include, exclude=exclude)]
    every = [c.name for c in find_components(network)]
    assert found == [name for name in every if re.fullmatch(expected, name)]
    assert found


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["*.qproj", "q_proj", "re:qproj", "*.self_attn.qproj"])
def test_a_pattern_that_matches_nothing_shows_the_nearest(option: str, pattern: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_components(tiny.network("llama"), **{option: [pattern]})
    message = str(caught.value)
    assert f"{option} {pattern!r} matches no component" in message
    assert message.partition("Nearest: ")[2].startswith("model.layers.*.self_attn.q_proj, ")
    shown = message.partition("Nearest: ")[2].split(", ")[0]
    assert any(fnmatchcase(c.name, shown) for c in find_components(tiny.network("llama")))


def test_bad_regular_expressions_and_nothing_left() -> None:
    network = tiny.network("llama")
    with pytest.raises(ModelError, match="not a regular expression"):
        find_components(network, include=["re:("])
    with pytest.raises(ModelError, match="leave no component"):
        find_components(network, include=["*.q_proj"], exclude=["*.self_attn.*"])
