"""LLM.int8 against bitsandbytes' own layer, and by hand."""

import importlib.util
import logging

import pytest
import torch

import runs
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import Component, find_components
from divergent_tokens.compress.plan import uniform_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import SchemeError

bitsandbytes = pytest.importorskip("bitsandbytes")
SCHEME = parse_scheme("llm.int8")


def component(shape):
    return Component("q_proj", "q", 0, shape, torch.float32, "q_proj.weight")


def own_layer(weight, x):
    """What bitsandbytes computes."""
    layer = bitsandbytes.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    with torch.no_grad():
        return layer.eval()(x)


def ours(weight, x):
    return SCHEME.activations.quantize(x) @ SCHEME.compress(weight, component(weight.shape)).t()


@pytest.mark.parametrize("outliers", [0, 1, 5])
def test_it_is_what_the_layer_computes(outliers):
    generator = torch.Generator().manual_seed(outliers)
    weight = torch.randn(24, 64, generator=generator) / 8
    x = torch.randn(2, 7, 64, generator=generator).clamp(-4, 4)
    x[0, :outliers, :outliers] += 20 * torch.eye(outliers)
    wanted = own_layer(weight, x)
    found = ours(weight, x)
    plain = x @ weight.t()
    assert (found - wanted).norm() < 1e-3 * wanted.norm()  # its products are summed in float16
    assert (found - plain).norm() > 3e-3 * plain.norm()


def test_by_hand():
    """One token: the largest input that is no outlier has the code 127, an outlier stays."""
    x = torch.tensor([[1.0, -0.5, 0.25, 8.0], [0.5, 0.5, 0.0, 0.0]])
    found = SCHEME.activations.quantize(x)
    codes = torch.tensor([[127.0, -64, 32], [127, 127, 0]])
    scales = torch.tensor([[1.0], [0.5]]) / 127
    assert torch.allclose(found[:, :3], codes * scales, atol=1e-6)
    assert found[:, 3].tolist() == [8.0, 0.0]


def test_inputs_are_left_alone_and_gradients_pass():
    x = torch.randn(3, 16, requires_grad=True)
    before = x.detach().clone()
    SCHEME.activations.quantize(x).sum().backward()
    assert torch.equal(x, before)
    assert torch.equal(x.grad, torch.ones_like(x))
    assert SCHEME.activations.quantize(torch.empty(0, 4)).shape == (0, 4)


def test_its_size_and_its_text():
    assert str(SCHEME) == "llm.int8"
    assert SCHEME.size_bytes(component((24, 64))) == 24 * 64 + 4 * 24
    assert not SCHEME.is_packable


def test_a_model_under_it_is_lent_and_given_back():
    model = runs.model()
    plan = uniform_plan(find_components(model.network), SCHEME)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model.network(ids).logits
        with lent_plan(model, plan) as lent:
            changed = lent.network(ids).logits
        assert torch.equal(model.network(ids).logits, before)
    assert 0 < (changed - before).norm() < 0.2 * before.norm()


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec

    def without(name, *arguments):
        return None if name == "bitsandbytes" else found(name, *arguments)

    monkeypatch.setattr("divergent_tokens.compress.llm_int8.find_spec", without)
    with pytest.raises(SchemeError, match="pip install bitsandbytes"):
        SCHEME.check([component((24, 64))])
