"""Lending gives every bit back; what is lent is what the schemes make."""

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from divergent_tokens.compress.apply import apply_plan, lent_plan
from divergent_tokens.compress.components import Component, ends, find_components, weight_of
from divergent_tokens.compress.plan import Plan, uniform_plan
from divergent_tokens.compress.schemes import Scheme, parse_scheme
from divergent_tokens.errors import ModelError, SchemeError
from divergent_tokens.models import Model

SCHEMES = [
    "int8",
    "int2",
    "int8:tensor",
    "int4:g8",
    "int4:g8:asym",
    "magnitude:0.5",
    "magnitude:0.5+int4:g8",
]


def _model(architecture: str, dtype: torch.dtype = torch.float32) -> Model:
    network = tiny.network(architecture).to(dtype)
    return Model(network, tiny.tokenizer(), architecture, "0" * 64)


State = dict[str, tuple[int, tuple[int, ...], str]]


def _state(model: Model) -> State:
    """Address, strides and digest of every tensor, tied ones under each of their names."""
    tensors = {
        **dict(model.network.named_parameters(remove_duplicate=False)),
        **dict(model.network.named_buffers(remove_duplicate=False)),
    }
    return {
        name: (
            tensor.data_ptr(),
            tensor.stride(),
            hashlib.sha256(
                tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
                if tensor.ndim
                else repr(tensor.item()).encode()
            ).hexdigest(),
        )
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_bit_comes_back(architecture: str, dtype: torch.dtype) -> None:
    model = _model(architecture, dtype)
    components = find_components(model.network)
    before = _state(model)
    for text in SCHEMES:
        scheme = parse_scheme(text)
        originals = [weight_of(model.network, c) for c in components]
        with lent_plan(model, uniform_plan(components, scheme)) as lent:
            assert lent.network is model.network
            for component, original in zip(components, originals, strict=True):
                now = weight_of(lent.network, component)
                assert torch.equal(now, scheme.compress(original, component)), component.name
                assert not torch.equal(now, original), component.name
            during = _state(model)
        assert _state(model) == before
        changed = {name for name in before if during[name] != before[name]}
        assert changed == {c.parameter for c in components}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe", "gpt-oss"])
def test_every_bit_comes_back_after_a_failure(
    architecture: str, failure: type[BaseException]
) -> None:
    model = _model(architecture)
    before = _state(model)
    plan = uniform_plan(find_components(model.network), parse_scheme("int4"))
    with pytest.raises(failure), lent_plan(model, plan):
        raise failure
    assert _state(model) == before


def test_every_bit_comes_back_if_lending_itself_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("qwen3-moe")
    before = _state(model)
    compress, calls = Scheme.compress, 0

    def interrupted(self: Scheme, weight: torch.Tensor, component: Component) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 17:
            raise KeyboardInterrupt
        return compress(self, weight, component)

    monkeypatch.setattr(Scheme, "compress", interrupted)
    plan = uniform_plan(find_components(model.network), parse_scheme("int8"))
    with pytest.raises(KeyboardInterrupt), lent_plan(model, plan):
        pytest.fail("lent in spite of the interrupt")
    assert calls == 17
    assert _state(model) == before


def test_one_expert_is_changed_alone() -> None:
    model = _model("gpt-oss")
    components = find_components(model.network)
    (chosen,) = (c for c in components if c.name == "model.layers.0.mlp.experts.2.up_proj")
    originals = {c.name: weight_of(model.network, c).clone() for c in components}
    with lent_plan(model, Plan({chosen.name: parse_scheme("int4")})):
        for component in components:
            same = torch.equal(weight_of(model.network, component), originals[component.name])
            assert same == (component.name != chosen.name)


def test_lending_nests() -> None:
    model = _model("qwen3-moe")
    components = find_components(model.network)
    before = _state(model)
    with lent_plan(model, uniform_plan(components, parse_scheme("magnitude:0.5"))) as outer:
        middle = _state(model)
        with lent_plan(outer, uniform_plan(components[:20], parse_scheme("int4"))) as inner:
            assert inner.reference == "qwen3-moe [magnitude:0.5] [int4]"
            twice = weight_of(inner.network, components[0]).clone()
        assert _state(model) == middle
    assert _state(model) == before
    chain = parse_scheme("magnitude:0.5+int4")
    assert torch.equal(
        twice, chain.compress(weight_of(model.network, components[0]), components[0])
    )


def test_lending_for_a_forward_pass_in_inference_mode() -> None:
    model = _model("llama")
    plan = uniform_plan(find_components(model.network), parse_scheme("int4"))
    ids = torch.arange(12)[None]
    before = _state(model)
    with torch.no_grad():
        base = model.network(ids).logits
    with torch.inference_mode(), lent_plan(model, plan) as lent:
        assert not torch.equal(lent.network(ids).logits, base)
    assert _state(model) == before
    loss = model.network.requires_grad_()(ids).logits.sum()
    loss.backward()  # the storage that came back may be trained
    with torch.no_grad():
        assert torch.equal(model.network(ids).logits, base)


def test_a_lent_model_has_its_own_identity() -> None:
    model = _model("llama")
    components = find_components(model.network)
    identities = set()
    for text in SCHEMES:
        for chosen in (components, components[:3]):
            plan = uniform_plan(chosen, parse_scheme(text))
            with lent_plan(model, plan, components=components) as lent:
                assert lent.reference == f"llama [{text}]"
                assert lent.tokenizer is model.tokenizer
                identities.add(lent.fingerprint)
    assert len(identities) == 2 * len(SCHEMES)
    assert model.fingerprint not in identities
    assert all(len(identity) == 64 for identity in identities)


def test_a_matrix_that_two_modules_share_is_lent_to_both() -> None:
    model = _model("llama")
    first, second = model.network.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    before = _state(model)
    with lent_plan(model, uniform_plan(find_components(model.network), parse_scheme("int4"))):
        assert second.mlp.up_proj.weight.data_ptr() == first.mlp.up_proj.weight.data_ptr()
        assert (
            second.mlp.up_proj.weight.data_ptr() != before["model.layers.0.mlp.up_proj.weight"][0]
        )
    assert _state(model) == before


@pytest.mark.parametrize(
    "use", [apply_plan, lambda model, plan: lent_plan(model, plan).__enter__()]
)
def test_what_does_not_fit_is_refused_before_anything_is_changed(use: object) -> None:
    assert callable(use)
    model = _model("llama")
    before = _state(model)
    components = find_components(model.network)
    with pytest.raises(SchemeError, match="down_proj"):  # the last of its layer
        use(model, uniform_plan(components, parse_scheme("int4:g32")))
    with pytest.raises(SchemeError, match="no component of this model"):
        use(model, Plan({components[0].name: parse_scheme("int8"), "x": parse_scheme("int8")}))
    assert _state(model) == before


def test_a_matrix_that_is_also_the_head_or_the_embedding_is_refused() -> None:
    for end in ("lm_head", "model.embed_tokens"):
        model = _model("llama")
        module = model.network.get_submodule(end)
        model.network.model.layers[1].self_attn.q_proj.weight = module.weight
        components = find_components(model.network)
        before = _state(model)
        plan = uniform_plan(components, parse_scheme("int8"))
        with (
            pytest.raises(ModelError, match=r"1\.self_attn\.q_proj shares"),
            lent_plan(model, plan),
        ):
            pytest.fail("lent")
        assert _state(model) == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_embeddings_and_heads_are_lent_where_asked_for(architecture: str) -> None:
    model = _model(architecture)
    before = _state(model)
    for end in ends(model.network):
        components = find_components(model.network, include=[end.name])
        original = weight_of(model.network, end)
        scheme = parse_scheme("int4:g8")
        with lent_plan(model, uniform_plan(components, scheme), components=components):
            assert torch.equal(weight_of(model.network, end), scheme.compress(original, end))
            tied = model.network.config.tie_word_embeddings
            for module in (model.network.get_input_embeddings(), model.network.lm_head):
                shared = module.weight.data_ptr() == weight_of(model.network, end).data_ptr()
                changed = module.weight.data_ptr() != original.data_ptr()
                assert shared == changed or not tied
        assert _state(model) == before


def test_weights_that_are_not_in_memory_are_refused() -> None:
    model = _model("llama")
    plan = uniform_plan(find_components(model.network), parse_scheme("int8"))
    up = model.network.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(up.weight.to("meta"), requires_grad=False)
    with pytest.raises(ModelError, match=r"0\.mlp\.up_proj is not in memory"):
        apply_plan(model, plan)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe", "gpt-oss"])
def test_for_good_is_what_was_lent(architecture: str) -> None:
    model = _model(architecture)
    plan = uniform_plan(find_components(model.network), parse_scheme("magnitude:0.5+int4:g8"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with lent_plan(model, plan) as lent:
            expected = lent.network(ids).logits
        applied = apply_plan(model, plan)
        assert torch.equal(applied.network(ids).logits, expected)
    assert applied == replace(model, reference=lent.reference, fingerprint=lent.fingerprint)
