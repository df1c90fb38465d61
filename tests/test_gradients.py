"""Gradients, inputs and harm of single experts, fused or not, against slow obvious loops."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import runs
import tiny
from divergent_tokens.allocation import cut
from divergent_tokens.compress.components import component_view, find_components, weight_of
from divergent_tokens.compress.prune import rows_mask
from divergent_tokens.compress.units import whole
from divergent_tokens.errors import ModelError, SchemeError
from divergent_tokens.gradients import sequence_gradients
from divergent_tokens.labels import draw_labels
from divergent_tokens.layers import decoder_layers
from divergent_tokens.measure.progress import silent
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.models import Model, load_model
from divergent_tokens.pruning.prune import prune
from divergent_tokens.pruning.settings import Settings
from divergent_tokens.recover import Training
from divergent_tokens.report.pruning import pruning_markdown
from divergent_tokens.saliencies import LEVELS, Saliencies, _smoothed, find_saliencies

SEQUENCES = Sequences(np.random.default_rng(1).integers(4, 200, (6, 16)), "random")
MIXTURES = ["qwen3-moe", "gpt-oss", "mixtral", "apart"]


class Apart(nn.Module):
    """A fused mixture's experts as modules of their own, as older code and code of a hub has it."""

    def __init__(self, fused):
        super().__init__()
        self.act = fused.act_fn
        n, hidden, inner = len(fused.down_proj), *fused.down_proj.shape[1:]
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(hidden, inner, bias=False),
                    "up_proj": nn.Linear(hidden, inner, bias=False),
                    "down_proj": nn.Linear(inner, hidden, bias=False),
                }
            )
            for _ in range(n)
        )
        for e, expert in enumerate(self.experts):
            gate, up = fused.gate_up_proj[e].chunk(2)
            for name, own in zip(expert, (gate, up, fused.down_proj[e]), strict=True):
                expert[name].weight.data = own.detach().clone()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        found = torch.zeros_like(hidden_states)
        for e, expert in enumerate(self.experts):
            tokens, slots = (top_k_index == e).nonzero(as_tuple=True)
            if len(tokens) == 0:
                continue
            x = hidden_states[tokens]
            out = expert["down_proj"](self.act(expert["gate_proj"](x)) * expert["up_proj"](x))
            found = found.index_add(0, tokens, out * top_k_weights[tokens, slots, None])
        return found


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        **{**tiny._SMALL, "intermediate_size": 24}, num_local_experts=4, num_experts_per_tok=2
    )
    network = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return Model.of(network, tiny.tokenizer(), reference="mixtral")


def apart(base):
    """The model with every expert a module of its own; it computes the same."""

    def take_apart(network):
        for layer in decoder_layers(network)[1]:
            layer.mlp.experts = Apart(layer.mlp.experts)

    return runs.changed(base, take_apart)


def mixture(name):
    if name == "mixtral":
        return mixtral()
    return apart(runs.model("qwen3-moe")) if name == "apart" else runs.model(name)


def only(model, *patterns):
    return find_components(model.network, include=patterns)


def without(model, expert, layer=1):
    """The model with a router that never chooses an expert of a layer."""

    def close(network):
        router = decoder_layers(network)[1][layer].mlp.gate

        def never(_module, _inputs, output):
            logits = output[0].clone()
            logits[:, expert] = -1e9
            scores, index = logits.softmax(-1).topk(2)
            return logits, scores / scores.sum(-1, keepdim=True), index

        router.register_forward_hook(never)

    return runs.changed(model, close)


def slow_gradients(model, components, ids, seed, size):
    """By autograd on the stored parameters, one sequence at a time. [sequence][component]"""
    network = runs.changed(model, lambda n: n.requires_grad_(True)).network
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in torch.split(ids, size):
        uniforms = torch.rand(batch[:, 1:].numel(), generator=generator, dtype=torch.float64)
        for row, own in zip(batch, uniforms.view(len(batch), -1), strict=True):
            logps = network(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
            labels = draw_labels(logps.detach().exp(), own[None])[0]
            network.zero_grad()
            logps.gather(-1, labels[:, None]).sum().backward()
            gradients = []
            for component in components:
                gradient = network.get_parameter(component.parameter).grad
                if gradient is None:
                    gradient = torch.zeros_like(network.get_parameter(component.parameter))
                gradients.append(component_view(gradient, component).clone())
            found.append(gradients)
    return found


def drawn(seed, n=6):
    return torch.from_numpy(SEQUENCES.ids[np.random.default_rng(seed).permutation(6)[:n]])


def size_of(name):
    return 1 if name == "apart" else 4


def test_what_was_taken_apart_computes_the_same():
    base = runs.model("qwen3-moe")
    ids = SEQUENCES.ids[0].tolist()
    expected = runs.logits_of(base.network, ids)
    np.testing.assert_allclose(runs.logits_of(apart(base).network, ids), expected, atol=1e-3)


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_are_those_of_the_weights(name):
    model = mixture(name)
    components = find_components(model.network)
    ids = drawn(0)
    found = [[] for _ in components]
    met = sequence_gradients(
        model, components, ids, lambda i, g: found[i].append(g), 3, None, silent
    )
    slow = slow_gradients(model, components, ids, 3, size_of(name))
    for i, component in enumerate(components):
        expected = torch.stack([one[i] for one in slow])
        scale = max(float(expected.abs().max()), 1e-6)
        assert (i in met) == bool(found[i]), component.name
        own = torch.cat(found[i]) if found[i] else torch.zeros(0, *component.shape)
        if len(own) == len(ids):
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4 * scale)
        else:  # batches in which no token was sent to it are left out
            there = expected.abs().amax((1, 2)) > 0
            kept = own[own.abs().amax((1, 2)) > 0]
            torch.testing.assert_close(kept, expected[there], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", MIXTURES)
def test_wanda_is_its_definition(name):
    """Inputs of each expert by the definition of the layer: rows of the tokens sent to it."""
    model = mixture(name)
    components = only(model, "*.layers.1.*.experts.*")
    found = find_saliencies(model, components, "wanda", SEQUENCES, n_sequences=6)
    layer = decoder_layers(model.network)[1][1].mlp
    seen = []
    hook = layer.experts.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs))
    with torch.no_grad():
        model.network(input_ids=torch.from_numpy(SEQUENCES.ids))
    hook.remove()
    ((x, index, _),) = seen
    names = [c.name.rpartition(".experts.")[2] for c in components]
    own = dict(zip(names, zip(components, found.values, strict=True), strict=True))
    for e in range(4):
        rows = x[(index == e).any(-1)]
        inner = activations(layer.experts, e, rows)
        for part, inputs in (("gate_proj", rows), ("up_proj", rows), ("down_proj", inner)):
            component, values = own[f"{e}.{part}"]
            expected = weight_of(model.network, component).abs() * inputs.norm(dim=0)
            torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4)


def activations(experts, e, x):
    """What goes into an expert's down projection, as the model's paper or code writes it."""
    if isinstance(experts, Apart):
        one = experts.experts[e]
        return (experts.act(one["gate_proj"](x)) * one["up_proj"](x)).detach()
    if getattr(experts, "is_transposed", False):  # gpt-oss: interleaved, clamped
        both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
        gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)).detach()
    gate, up = (x @ experts.gate_up_proj[e].t()).chunk(2, -1)
    return (experts.act_fn(gate) * up).detach()


@pytest.mark.parametrize("name", MIXTURES)
def test_fisher_is_its_definition(name):
    model = mixture(name)
    components = only(model, "*.layers.1.*.experts.*")
    found = find_saliencies(model, components, "fisher", SEQUENCES, n_sequences=6, seed=5)
    slow = slow_gradients(model, components, drawn(5), 5, size_of(name))
    for i, component in enumerate(components):
        square = torch.stack([one[i].square() for one in slow]).sum(0) / (6 * 15)
        expected = 0.5 * weight_of(model.network, component).square() * _smoothed(square)
        scale = float(expected.max())
        torch.testing.assert_close(found.values[i], expected, rtol=2e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
@pytest.mark.parametrize("name", MIXTURES)
def test_harm_is_that_of_the_slow_loop(name, criterion):
    model = mixture(name)
    components = only(model, "*.layers.1.*.experts.*", "*.layers.1.*.q_proj")
    by_rows = criterion == "wanda"
    found = find_saliencies(
        model,
        components,
        criterion,
        SEQUENCES,
        n_sequences=6,
        by_rows=by_rows,
        with_harm=True,
        seed=5,
    )
    slow = slow_gradients(model, components, drawn(5), 6, size_of(name))
    for i, component in enumerate(components):
        weight = weight_of(model.network, component)
        for j in (3, 10, 17, len(LEVELS) - 1):
            one = Saliencies(whole([component]), (found.values[i],), None)
            mask = cut(one, "uniform", LEVELS[j], by_rows=by_rows).masks[0]
            s = [-float((g[i] * weight)[~mask].double().sum()) for g in slow]
            expected = np.square(s).sum() / (2 * 6 * 15)
            assert found.harm[i, j] == pytest.approx(expected, rel=5e-3, abs=1e-9)


# --- experts that no token is sent to ---


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-next", "apart"])
def test_an_expert_without_tokens_counts_as_the_average_of_the_others(name):
    model = without(mixture(name), 2)
    components = only(model, "*.layers.1.*expert*")  # a shared one, of their shape, is none of them
    own = [i for i, c in enumerate(components) if c.expert == 2]
    wanda = find_saliencies(model, components, "wanda", SEQUENCES)
    assert wanda.unseen == tuple(components[i].name for i in own)
    fisher = find_saliencies(
        model, components, "fisher", SEQUENCES, n_sequences=6, with_harm=True, seed=5
    )
    assert fisher.unseen == wanda.unseen
    slow = slow_gradients(model, components, drawn(5), 5, size_of(name))
    for i in own:
        weight = weight_of(model.network, components[i])
        assert torch.equal(wanda.values[i], weight.abs())
        part = components[i].name.rpartition(".")[2]
        others = [
            j
            for j, c in enumerate(components)
            if c.name.endswith(part) and c.expert not in (None, 2)
        ]
        assert len(others) == 3
        squares = [torch.stack([one[j].square() for one in slow]).sum(0).mean() for j in others]
        mean = float(torch.stack(squares).mean()) / (6 * 15)
        torch.testing.assert_close(
            fisher.values[i], 0.5 * weight.square() * mean, rtol=2e-3, atol=0
        )
        np.testing.assert_allclose(fisher.harm[i], fisher.harm[others].mean(0), rtol=1e-6)
        assert fisher.harm[i, -1] > 0


def test_nothing_is_known_of_an_expert_alone():
    model = without(mixture("qwen3-moe"), 2)
    with pytest.raises(SchemeError, match=r"no token was sent to .*experts\.2\.gate_proj, nor to"):
        find_saliencies(model, only(model, "*.layers.1.*.experts.2.*"), "fisher", SEQUENCES)


def test_experts_that_do_not_say_how_they_compute_are_refused_at_once(tmp_path):
    model = runs.changed(
        runs.model("qwen3-moe"), lambda n: setattr(n.model.layers[1].mlp.experts, "has_gate", None)
    )
    settings = Settings(sparsity=0.5, rounds=1)
    with pytest.raises(ModelError, match="does not say how its experts are computed"):
        run(model, tmp_path / "out", settings)


# --- whole runs ---


def run(model, out, settings):
    components = find_components(model.network)
    prompts = runs.prompts(4)
    return prune(model, components, SEQUENCES, prompts, out, settings)


@pytest.mark.parametrize(
    ("criterion", "allocate"),
    [
        ("wanda", "uniform"),
        ("wanda", "kl"),
        ("magnitude", "kl"),
        ("magnitude", "fdt"),
        ("fisher", "global"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_stacks_end_with_exact_zeros(name, criterion, allocate, tmp_path):
    settings = Settings(
        sparsity=0.5,
        rounds=2,
        criterion=criterion,
        allocate=allocate,
        n_saliency=6,
        new_tokens=6,
        granularity="expert",
        training=Training(steps=2, batch_size=4, micro_batch=4, learning_rate=1e-3),
    )
    record = run(runs.model(name), tmp_path / "out", settings)
    loaded = load_model(tmp_path / "out", device="cpu")
    zeros = {c["name"]: c["n_zero"] for c in record["components"]}
    for component in find_components(loaded.network):
        weight = weight_of(loaded.network, component)
        assert int((weight == 0).sum()) == zeros[component.name]
        if criterion == "wanda" and allocate == "uniform":
            assert torch.equal(weight == 0, ~rows_mask((weight != 0).float(), 0.5))
    share = sum(zeros.values()) / sum(c["n_parameters"] for c in record["components"])
    assert share == pytest.approx(0.5, abs=0.02)
    assert record["rounds"][-1]["unseen"] == []


def test_a_record_says_which_experts_saw_nothing(tmp_path):
    model = without(runs.model("qwen3-moe"), 2)
    settings = Settings(
        sparsity=0.5, rounds=1, n_saliency=6, new_tokens=6, training=Training(steps=0)
    )
    record = run(model, tmp_path / "out", settings)
    (one,) = record["rounds"]
    assert [name.partition(".experts.")[2] for name in one["unseen"]] == [
        f"2.{part}_proj" for part in ("gate", "up", "down")
    ]
    assert "sent to 3 matrices of experts" in pruning_markdown({**record, "folder": "out"})
    shares = [one["sparsities"][name] for name in one["unseen"]]
    assert max(shares) < 0.9  # not the first to go, and whole
