"""The probe against slow ways of computing the same: gradients of weights, and all labels."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import runs
import tiny
from divergent_tokens import backward
from divergent_tokens import labels as labels_module
from divergent_tokens.compress import changes
from divergent_tokens.compress import changes as changes_module
from divergent_tokens.compress.components import find_components, weight_of
from divergent_tokens.compress.expert_forward import open_experts
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import ModelError, SchemeError
from divergent_tokens.labels import draw_labels
from divergent_tokens.measure.completions import complete
from divergent_tokens.probe import kl_of, probe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"  # within torch.func.jvp
)
SCHEMES = tuple(parse_scheme(text) for text in ("int4", "magnitude:0.5"))


def completed(base, lengths=(8, 8, 6), new_tokens=5):
    return complete(base, runs.prompts(lengths=lengths), new_tokens=new_tokens)


def labels_of(base, completions, prompt, draw, seed=0):
    """The labels that the probe draws, from logits computed the obvious way. [token]"""
    uniforms = labels_module._uniforms(completions, prompt, draw + 1, seed)[draw : draw + 1]
    with torch.no_grad():
        return draw_labels(logps_of(base.network, completions, prompt).exp(), uniforms)[0]


def logps_of(network, completions, prompt):
    sequence = completions.sequences()[prompt]
    n = int(completions.lengths[prompt])
    logits = network(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
    return logits[-n - 1 : -1].log_softmax(-1)


def by_weight_gradients(base, components, schemes, completions, n_draws):
    """s as ⟨∇_W Σ log p(labels), ΔW⟩, prompt by prompt. [component, scheme, prompt, draw]"""
    network = runs.changed(base, lambda network: network.requires_grad_(True)).network
    found = np.zeros((len(components), len(schemes), len(completions.prompts), n_draws))
    for p in range(len(completions.prompts)):
        for r in range(n_draws):
            labels = labels_of(base, completions, p, r)
            network.zero_grad()
            logps_of(network, completions, p).gather(-1, labels[:, None]).sum().backward()
            for i, component in enumerate(components):
                parameter = network.get_parameter(component.parameter)
                weight = weight_of(network, component).clone()
                whole = parameter.data
                gradient = parameter.grad
                parameter.data = torch.zeros_like(whole) if gradient is None else gradient
                slope = weight_of(network, component).clone()
                parameter.data = whole
                for j, scheme in enumerate(schemes):
                    change = scheme.compress(weight, component) - weight
                    found[i, j, p, r] = (change * slope).sum()
    return found


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_draws_are_weight_gradients_times_changes(architecture):
    base = runs.model(architecture)
    components = find_components(base.network)
    completions = completed(base)
    found = probe(base, components, SCHEMES, completions, n_draws=2, batch_size=2)
    slow = by_weight_gradients(base, components, SCHEMES, completions, 2)
    assert found.draws.shape == slow.shape
    assert np.allclose(found.draws, slow, rtol=1e-3, atol=1e-4 * np.abs(slow).max())
    met = np.abs(found.draws).max(axis=(1, 2, 3)) > 0
    assert all(met[i] for i, c in enumerate(components) if c.expert is None)
    assert met.tolist() == (np.abs(slow).max(axis=(1, 2, 3)) > 0).tolist()  # experts met by a token


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe"])
def test_with_all_labels_it_is_the_fisher_form(architecture, monkeypatch):
    """Σ_v p(v) (d log p(v))² along ΔW, by forward differentiation of the whole model."""
    base = runs.model(architecture)
    components = find_components(base.network)
    completions = completed(base, lengths=(8,) * 4, new_tokens=1)
    vocabulary = base.vocabulary_size
    every = torch.arange(vocabulary)
    monkeypatch.setattr(
        labels_module, "draw_labels", lambda p, _u: every[:, None].expand(-1, len(p))
    )
    found = probe(base, components, SCHEMES, completions, n_draws=vocabulary)
    for p in range(len(completions.prompts)):
        probabilities = logps_of(base.network, completions, p).detach()[0].exp().double().numpy()
        for i in range(0, len(components), 3):
            for j, scheme in enumerate(SCHEMES):
                slope = along(base, components[i], scheme, completions, p)
                exact = (probabilities * slope**2).sum() / 2
                ours = (probabilities * found.draws[i, j, p].astype(float) ** 2).sum() / 2
                assert ours == pytest.approx(exact, rel=1e-4, abs=1e-12)


def forward_differentiable():
    """The other kernels of attention have no forward derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def along(base, component, scheme, completions, prompt):
    """d log p(v) of the first completion token along a component's change. [vocab]"""
    network = runs.changed(base, lambda network: network.double()).network
    network.set_experts_implementation("eager")
    ids = torch.tensor([completions.sequences()[prompt]])
    weight = weight_of(base.network, component)
    change = scheme.compress(weight, component) - weight
    parameter = network.get_parameter(component.parameter)
    whole = parameter.data.clone()
    parameter.data = torch.zeros_like(whole)
    weight_of(network, component).copy_(change)
    direction, parameter.data = parameter.data, whole

    def logps(value):
        changed = {component.parameter: value}
        out = torch.func.functional_call(network, changed, (ids,), {"use_cache": False})
        return out.logits[0, -2].log_softmax(-1)

    with forward_differentiable():
        _, slope = torch.func.jvp(logps, (whole,), (direction,))
    return slope.detach().numpy()


def test_it_is_unbiased():
    base = runs.model()
    components = find_components(
        base.network, include=["*.1.mlp.down_proj", "*.0.self_attn.q_proj"]
    )
    completions = completed(base, lengths=(8,) * 6, new_tokens=4)
    found = probe(base, components, SCHEMES, completions, n_draws=400)
    exact = exact_kl(base, components, completions)
    squares = 0.5 * found.draws.astype(float) ** 2  # [component, scheme, prompt, draw]
    total = completions.lengths.sum()
    mean = squares.mean(-1).sum(-1) / total
    error = np.sqrt((squares.var(-1, ddof=1) / squares.shape[-1]).sum(-1)) / total
    assert np.abs((mean - exact) / error).max() < 4
    assert (error / exact).max() < 0.1


def exact_kl(base, components, completions):
    """½ Σ_t Σ_v p (d log p)², over Σ L, along each change. [component, scheme]"""
    found = np.zeros((len(components), len(SCHEMES)))
    for i, component in enumerate(components):
        for j, scheme in enumerate(SCHEMES):
            weight = weight_of(base.network, component)
            change = scheme.compress(weight, component) - weight
            for p in range(len(completions.prompts)):

                def logps(value, p=p, name=component.parameter):
                    ids = torch.tensor([completions.sequences()[p]])
                    out = torch.func.functional_call(
                        base.network, {name: value}, (ids,), {"use_cache": False}
                    )
                    n = int(completions.lengths[p])
                    return out.logits[0, -n - 1 : -1].log_softmax(-1)

                with forward_differentiable():
                    value, slope = torch.func.jvp(logps, (weight,), (change,))
                found[i, j] += 0.5 * float((value.exp() * slope**2).sum().detach())
    return found / completions.lengths.sum()


@pytest.mark.parametrize("text", ["w8a8", "fp8", "int8", "nvfp4"])
def test_quantized_inputs_count_too(text):
    """Against the slope of the log-probabilities when the changed output is mixed in."""
    base = runs.changed(runs.model("llama"), lambda network: None)
    scheme = parse_scheme(text)
    components = find_components(base.network, include=["*.0.mlp.*", "*.1.self_attn.o_proj"])
    completions = completed(base)
    found = probe(base, components, [scheme], completions, batch_size=3)
    for i, component in enumerate(components):
        weight = weight_of(base.network, component).clone()
        changed = scheme.compress(weight, component)
        module = base.network.get_submodule(component.name)
        for p in range(len(completions.prompts)):
            share = torch.zeros(1, requires_grad=True)

            def mixed(_module, inputs, output, share=share, weight=weight, changed=changed):
                x = inputs[0].detach()
                quantized = x if scheme.activations is None else scheme.activations.quantize(x)
                return output + share * (quantized @ changed.t() - x @ weight.t())

            labels = labels_of(base, completions, p, 0)
            hook = module.register_forward_hook(mixed)
            logps = logps_of(base.network, completions, p)
            hook.remove()
            logps.gather(-1, labels[:, None]).sum().backward()
            assert found.draws[i, 0, p, 0] == pytest.approx(share.grad.item(), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("text", ["w8a8", "int4"])
@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
def test_an_experts_draw_is_the_slope_of_swapping_that_expert(architecture, text):
    base = runs.changed(runs.model(architecture), lambda network: None)
    scheme = parse_scheme(text)
    components = find_components(base.network, include=["*.0.mlp.experts.*"])
    completions = completed(base)
    # Alone, as below: in another batch an input next to a rounding boundary may fall beyond it.
    found = probe(base, components, [scheme], completions, batch_size=1)
    for i, component in enumerate(components):
        weight = weight_of(base.network, component).clone()
        changed = scheme.compress(weight, component)
        for p in range(len(completions.prompts)):
            share = torch.zeros(1, requires_grad=True)

            def mixed(inputs, times, share=share, i=i, weight=weight, changed=changed):
                out = times(inputs.x)
                if inputs.part != components[i].name.rpartition(".")[2]:
                    return out
                x = inputs.x.detach()
                quantized = x if scheme.activations is None else scheme.activations.quantize(x)
                dz = quantized @ changed.t() - x @ weight.t()
                return out + share * dz * (inputs.experts == components[i].expert)[:, None]

            with open_experts(base.network, components, mixed):
                logps = logps_of(base.network, completions, p)
            labels = labels_of(base, completions, p, 0)
            logps.gather(-1, labels[:, None]).sum().backward()
            assert found.draws[i, 0, p, 0] == pytest.approx(share.grad.item(), rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gpt-oss"])
def test_embeddings_and_heads_can_be_probed(architecture):
    base = runs.model(architecture)
    names = [".".join(name.split(".")[:-1]) for name, _ in base.network.named_parameters()]
    ends = [n for n in names if n.endswith(("embed_tokens", "lm_head", "wte"))]
    components = find_components(base.network, include=ends)
    assert {c.layer for c in components} == {None}
    completions = completed(base)
    found = probe(base, components, SCHEMES, completions, batch_size=2)
    slow = by_weight_gradients(base, components, SCHEMES, completions, 1)
    assert np.allclose(found.draws, slow, rtol=1e-3, atol=1e-4 * np.abs(slow).max())


def test_batches_and_order_change_nothing():
    base = runs.model("qwen3-moe")
    components = find_components(base.network)
    completions = completed(base, lengths=(8, 6, 7, 8))
    found = probe(base, components, SCHEMES, completions, n_draws=2, batch_size=4).draws
    single = probe(base, components, SCHEMES, completions, n_draws=2, batch_size=1).draws
    assert np.allclose(found, single, rtol=1e-3, atol=1e-5)
    turned = probe(base, components, SCHEMES, completions.subset([3, 1, 0, 2]), n_draws=2).draws
    assert np.allclose(turned, found[:, :, [3, 1, 0, 2]], rtol=1e-3, atol=1e-5)
    first = probe(base, components, SCHEMES, completions, n_draws=1).draws
    assert np.allclose(first[..., 0], found[..., 0], rtol=1e-3, atol=1e-5)
    other = probe(base, components, SCHEMES, completions, seed=1).draws
    assert not np.allclose(other, first)


def test_a_batch_that_does_not_fit_is_halved():
    error = torch.OutOfMemoryError("out of memory")
    base = runs.changed(runs.model(), runs.failing_above(2, error))
    components = find_components(base.network)
    completions = completed(runs.model(), lengths=(8,) * 5)
    found = probe(base, components, SCHEMES, completions, batch_size=5)
    assert found.batch_size <= 2
    whole = probe(runs.model(), components, SCHEMES, completions, batch_size=5)
    assert np.allclose(found.draws, whole.draws, rtol=1e-3, atol=1e-5)


def test_changes_that_are_not_kept_are_made_again(monkeypatch):
    base = runs.model()
    components = find_components(base.network)
    completions = completed(base)
    kept = probe(base, components, SCHEMES, completions, batch_size=1)
    monkeypatch.setattr(changes, "KEPT_BYTES", 20_000)
    monkeypatch.setattr(backward, "PRODUCT_BYTES", 1)
    monkeypatch.setitem(backward.OPERATIONS_A_BYTE, "float", 0)  # products, and no moves
    again = probe(base, components, SCHEMES, completions, batch_size=3)
    assert np.allclose(kept.draws, again.draws, rtol=1e-3, atol=1e-5)
    assert np.array_equal(kept.weight_errors, again.weight_errors)


def test_nothing_is_left_behind():
    base = runs.changed(runs.model("qwen3-moe"), lambda network: None)
    components = find_components(base.network)
    completions = completed(base)

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(base, components, SCHEMES, completions, batch_size=1, progress=interrupt)
    for module in base.network.modules():
        assert not module._forward_hooks
        assert "forward" not in module.__dict__
    assert all(parameter.grad is None for parameter in base.network.parameters())


def test_weight_errors_are_relative():
    base = runs.model()
    components = find_components(base.network, include=["*.0.mlp.up_proj"])
    found = probe(base, components, SCHEMES, completed(base))
    weight = weight_of(base.network, components[0])
    change = SCHEMES[1].compress(weight, components[0]) - weight
    assert found.weight_errors[0, 1] == pytest.approx(float(change.norm() / weight.norm()))


def test_what_does_not_fit_is_refused_before_anything_runs():
    base = runs.model()
    components = find_components(base.network)
    with pytest.raises(SchemeError, match="groups of 7 do not divide"):
        probe(base, components, [parse_scheme("int4:g7")], completed(base))


def test_a_component_that_sees_other_tokens_is_named():
    def pooled(network):
        layer = network.model.layers[0].mlp
        forward = layer.forward
        layer.forward = lambda x: forward(x[:, ::2]).repeat_interleave(2, 1)[:, : x.shape[1]]

    base = runs.changed(runs.model(), pooled)
    components = find_components(base.network)
    completions = completed(runs.model())
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.\w+ sees \d+ tokens where the batch"):
        probe(base, components, SCHEMES, completions)


def test_labels_follow_their_distribution():
    probabilities = torch.tensor([[0.5, 0.0, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    uniforms = torch.tensor(
        [[0.0, 0.0], [0.4999, 0.3], [0.5, 0.7], [0.76, 0.9999999999]], dtype=torch.float64
    )
    labels = draw_labels(probabilities, uniforms)
    assert labels.tolist() == [[0, 2], [0, 2], [2, 2], [3, 2]]


def test_kl_by_hand():
    draws = np.array([[2.0, 0.0], [1.0, 1.0]], np.float32)  # ½ s²: 2, 0 | ½, ½
    kl, error = kl_of(draws, np.array([2, 3]))
    assert kl == pytest.approx((1 + 0.5) / 5)
    residuals = np.array([1 - 0.3 * 2, 0.5 - 0.3 * 3])
    assert error == pytest.approx(np.sqrt(2 * (residuals**2).sum()) / 5)
    assert kl_of(draws[:1], np.array([2]))[1] is None


@pytest.mark.parametrize("scheme", ["int4", "w8a8"])
def test_either_way_of_adding_up_gives_the_same_draws(scheme, monkeypatch):
    # Few schemes: what each moves, token by token; many: one matrix a prompt for all of them.
    base = runs.model()
    components, completions = find_components(base.network), completed(base)
    schemes = [parse_scheme(scheme), parse_scheme("int3")]
    moved = probe(base, components, schemes, completions).draws
    monkeypatch.setitem(backward.OPERATIONS_A_BYTE, "float", 0)
    products = probe(base, components, schemes, completions).draws
    np.testing.assert_allclose(products, moved, rtol=1e-4, atol=1e-4 * np.abs(moved).max())


def test_memory_that_runs_out_in_the_head_halves_the_batch(monkeypatch):
    base = runs.model()
    components = find_components(base.network, include=["*"])
    completions = complete(base, runs.prompts(4), new_tokens=5)
    expected = probe(base, components, [parse_scheme("int8")], completions, batch_size=4)
    own, calls = labels_module.draw_labels, []

    def short(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*arguments)

    monkeypatch.setattr(labels_module, "draw_labels", short)
    found = probe(base, components, [parse_scheme("int8")], completions, batch_size=4)
    assert found.batch_size == 2
    np.testing.assert_allclose(found.draws, expected.draws, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_each_change_is_made_once(monkeypatch, batch_size):
    base = runs.model()
    components = find_components(base.network, include=["lm_head", "*.0.mlp.*"])
    schemes = [parse_scheme(f"int{bits}") for bits in (3, 4, 5, 6)]
    completions = complete(base, runs.prompts(4), new_tokens=5)
    made = []
    own = changes_module._change
    monkeypatch.setattr(changes_module, "_change", lambda *a: made.append(1) or own(*a))
    monkeypatch.setattr(labels_module, "chunk_tokens", lambda *_: 4)
    probe(base, components, schemes, completions, batch_size=batch_size)
    assert len(made) == len(components) * len(schemes)
