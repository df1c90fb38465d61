"""Lending gives every bit back; what is lent is what the schemes make."""

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

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
    "w8a8",
    "fp8",
    "magnitude:0.5+fp8",
]
ACTIVE = ["w8a8", "fp8"]
"""Those that quantize inputs."""


def _model(architecture: str, dtype: torch.dtype = torch.float32) -> Model:
    network = tiny.network(architecture).to(dtype)
    return Model(network, tiny.tokenizer(), architecture, "0" * 64)


State = dict[str, tuple[int, tuple[int, ...], str]]


def _state(model: Model) -> State:
    """Address, strides and digest of every tensor, tied ones under each of their names.

    Nothing may hang on the modules.
    """
    for module in model.network.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in module.__dict__
    return _tensors(model)


def _tensors(model: Model) -> State:
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
            during = _tensors(model)
        assert _state(model) == before
        changed = {name for name in before if during[name] != before[name]}
        assert changed == {c.parameter for c in components}


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe", "gpt-oss"])
def test_every_bit_comes_back_where_groups_are_fixed(architecture: str, text: str) -> None:
    model = _model(architecture)
    components = [c for c in find_components(model.network) if c.shape[1] % 32 == 0]
    scheme = parse_scheme(text)
    originals = [weight_of(model.network, c) for c in components]
    before = _state(model)
    with lent_plan(model, uniform_plan(components, scheme)):
        for component, original in zip(components, originals, strict=True):
            now = weight_of(model.network, component)
            assert torch.equal(now, scheme.compress(original, component)), component.name
            assert not torch.equal(now, original), component.name
        during = _tensors(model)
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
    for text in ("int4", *ACTIVE):
        plan = uniform_plan(find_components(model.network), parse_scheme(text))
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
    plan = uniform_plan(find_components(model.network), parse_scheme("w8a8"))
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
    with pytest.raises(ModelError, match=r"0\.mlp\.up_proj\.weight is not in memory, and no hook"):
        apply_plan(model, plan)


@pytest.mark.parametrize("text", ["magnitude:0.5+int4:g8", *ACTIVE])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe", "gpt-oss"])
def test_for_good_is_what_was_lent(architecture: str, text: str) -> None:
    model = _model(architecture)
    plan = uniform_plan(find_components(model.network), parse_scheme(text))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with lent_plan(model, plan) as lent:
            expected = lent.network(ids).logits
        applied = apply_plan(model, plan)
        gc.collect()
        assert torch.equal(applied.network(ids).logits, expected)
    assert applied == replace(model, reference=lent.reference, fingerprint=lent.fingerprint)


# --- inputs ---

Calls = dict[str, tuple[tuple[Any, ...], torch.Tensor]]


@contextmanager
def _watched(model: Model) -> Iterator[Calls]:
    """What went into each module at first, before any other hook, and what came out of it."""
    calls: Calls = {}
    hooks = []
    for name, module in model.network.named_modules():

        def before(_module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            calls[name] = (inputs, torch.empty(0))

        def after(_module: nn.Module, _inputs: Any, output: torch.Tensor, name: str = name) -> None:
            calls[name] = (calls[name][0], output)

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield calls
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("text", [*ACTIVE, "magnitude:0.5+w8a8", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "qwen3", "qwen3-moe"])
def test_dense_modules_multiply_quantized_inputs(architecture: str, text: str) -> None:
    model = _model(architecture)
    scheme = parse_scheme(text)
    components = [c for c in find_components(model.network) if c.stack_index is None]
    originals = {c.name: weight_of(model.network, c).clone() for c in components}
    plan = uniform_plan(components, scheme)
    with (
        torch.no_grad(),
        _watched(model) as calls,
        lent_plan(model, plan, components=components),
    ):
        model.network(torch.arange(12).view(2, 6))
    for component in components:
        inputs, output = calls[component.name]
        x = inputs[0]
        quantized = x if scheme.activations is None else scheme.activations.quantize(x)
        weight = scheme.compress(originals[component.name], component)
        bias = model.network.get_submodule(component.name).bias
        expected = quantized @ weight.t() + (0 if bias is None else bias)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        assert scheme.activations is None or not torch.equal(x, quantized)


@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
def test_experts_multiply_quantized_inputs_each_by_its_own_scheme(architecture: str) -> None:
    model = _model(architecture)
    texts = ["w8a8", "fp8", "int8", None]
    experts = [c for c in find_components(model.network) if c.stack_index is not None]
    plan = {c: texts[(c.expert or 0) if "up" in c.name else 1 - (c.expert or 0)] for c in experts}
    schemes = {c.name: parse_scheme(text) for c, text in plan.items() if text is not None}
    with torch.no_grad(), _watched(model) as calls, lent_plan(model, Plan(schemes)):
        model.network(torch.arange(12).view(2, 6))
        weights = {c.name: weight_of(model.network, c).clone() for c in experts}
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.experts"
        inputs, output = calls[name]
        module = model.network.get_submodule(name)
        expected = _slow_experts(name, module, weights, schemes, *inputs)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        plain = _slow_experts(name, module, weights, {}, *inputs)
        assert not torch.allclose(output, plain, rtol=1e-4, atol=1e-4)


def _slow_experts(
    name: str,
    module: Any,
    weights: dict[str, torch.Tensor],
    schemes: dict[str, Scheme],
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """Token by token and expert by expert."""

    def times(expert: int, part: str, x: torch.Tensor) -> torch.Tensor:
        scheme = schemes.get(f"{name}.{expert}.{part}")
        if scheme is not None and scheme.activations is not None:
            x = scheme.activations.quantize(x)
        out = weights[f"{name}.{expert}.{part}"] @ x
        if not module.has_bias:
            return out
        if part == "down_proj":
            return out + module.down_proj_bias[expert]
        return out + module.gate_up_proj_bias[expert][int(part == "up_proj") :: 2]

    found = torch.zeros_like(hidden)
    for token, x in enumerate(hidden):
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            both = [times(expert, part, x) for part in ("gate_proj", "up_proj")]
            joined = torch.cat(both) if module.is_concatenated else torch.stack(both, -1).flatten()
            inner = module._apply_gate(joined[None])[0]
            found[token] += share * times(expert, "down_proj", inner)
    return found


def test_inputs_that_are_lent_twice_are_quantized_twice() -> None:
    model = _model("llama")
    name = "model.layers.0.mlp.up_proj"
    fp8, w8a8 = (parse_scheme(text) for text in ACTIVE[::-1])
    before = _state(model)
    ids = torch.arange(12)[None]
    with (
        torch.no_grad(),
        _watched(model) as calls,
        lent_plan(model, Plan({name: fp8})) as outer,
    ):
        once = model.network(ids).logits
        with lent_plan(outer, Plan({name: w8a8})):
            model.network(ids)
            weight = model.network.get_submodule(name).weight.clone()
        (x,), output = calls[name]
        assert torch.equal(model.network(ids).logits, once)
    assert fp8.activations is not None
    assert w8a8.activations is not None
    quantized = w8a8.activations.quantize(fp8.activations.quantize(x))
    torch.testing.assert_close(output, quantized @ weight.t())
    assert _state(model) == before


def test_a_head_may_quantize_its_inputs_and_an_embedding_not() -> None:
    model = _model("llama")
    components = find_components(model.network, include=["lm_head", "*embed_tokens"])
    plan = Plan({"lm_head": parse_scheme("w8a8")})
    with torch.no_grad(), _watched(model) as calls, lent_plan(model, plan, components=components):
        model.network(torch.arange(12)[None])
        weight = model.network.lm_head.weight.clone()
    (x,), output = calls["lm_head"]
    quantized = parse_scheme("w8a8").activations
    assert quantized is not None
    torch.testing.assert_close(output, quantized.quantize(x) @ weight.t())
    with (
        pytest.raises(SchemeError, match=r"w8a8 .*model\.embed_tokens looks rows up"),
        lent_plan(model, uniform_plan(components, parse_scheme("w8a8")), components=components),
    ):
        pytest.fail("lent")


def test_modules_that_share_a_matrix_both_quantize_their_inputs() -> None:
    model = _model("llama")
    first, second = model.network.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    plan = Plan({"model.layers.0.mlp.up_proj": parse_scheme("fp8")})
    with torch.no_grad(), _watched(model) as calls, lent_plan(model, plan):
        model.network(torch.arange(12)[None])
        weight = first.mlp.up_proj.weight.clone()
    activations = parse_scheme("fp8").activations
    assert activations is not None
    for layer in (0, 1):
        (x,), output = calls[f"model.layers.{layer}.mlp.up_proj"]
        torch.testing.assert_close(output, activations.quantize(x) @ weight.t())


def test_experts_of_a_class_that_declares_nothing_are_refused_before_anything_is_changed() -> None:
    model = _model("qwen3-moe")
    before = _state(model)
    model.network.model.layers[1].mlp.experts.has_bias = None
    components = find_components(model.network)
    for use in (apply_plan, lambda *args: lent_plan(*args).__enter__()):
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts"):
            use(model, uniform_plan(components, parse_scheme("w8a8")))
        assert _state(model) == before
