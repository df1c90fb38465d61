"""GPTQ through llm-compressor: against its own modifier, and kept codes."""

import importlib.util
from collections import defaultdict

import pytest
import torch

import runs
import tiny
from divergent_tokens.calibrated import read_calibration, ready_plan, ready_schemes
from divergent_tokens.candidates import lent_candidates
from divergent_tokens.compress.calibration import Calibration, second_moments
from divergent_tokens.compress.components import Component, find_components, weight_of
from divergent_tokens.compress.expert_forward import open_experts
from divergent_tokens.compress.gptq import round_by_gptq, round_to_nearest
from divergent_tokens.compress.kept import Entry, Kept
from divergent_tokens.compress.plan import uniform_plan
from divergent_tokens.compress.quantize import dequantize
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import ModelError, SchemeError

needs_llm_compressor = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)
ROWS = Calibration(tuple(tuple(range(4 + i, 24 + i)) for i in range(12)), "test")


# --- without llm-compressor ---


@pytest.mark.parametrize("text", ["gptq:int4:g64", "gptq:int8", "gptq:int3:g16:asym"])
def test_its_text(text):
    scheme = parse_scheme(text)
    assert str(scheme) == text
    assert (scheme.is_calibrated, scheme.is_packable, scheme.activations) == (True, True, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gptq", "says no grid"),
        ("gptq:fp8", "says no grid"),
        ("gptq:int4:tensor", "by channel or group"),
        ("gptq:int9", "asks for 9 bits"),
        ("magnitude:0.5+gptq:int4", "let 'gptq:' stand alone"),
    ],
)
def test_texts_that_say_too_much_or_too_little(text, said):
    with pytest.raises(SchemeError, match=said):
        parse_scheme(text)


@pytest.mark.parametrize("tokens", [1, 50, 4096])
def test_moments_are_sums_over_all_tokens_and_shared_by_q_k_and_v(tokens, monkeypatch):
    monkeypatch.setattr("divergent_tokens.compress.calibration.TOKENS", tokens)
    rows = (*ROWS.rows, (4, 5), (7, 9), (8,), *ROWS.rows[:3])
    network = tiny.network("llama")
    components = find_components(network)
    texts = Calibration(rows, "test")
    found = {c.name: moment for c, moment in second_moments(network, components, texts)}
    assert list(found) == [c.name for c in components]
    seen = []
    module = network.get_submodule("model.layers.1.mlp.down_proj")
    hook = module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in rows:
            network(torch.tensor([row]))
    hook.remove()
    x = torch.cat(seen)
    assert torch.allclose(found["model.layers.1.mlp.down_proj"], x.T @ x, rtol=1e-4, atol=1e-3)
    q, k, o = (found[f"model.layers.0.self_attn.{part}_proj"] for part in "qko")
    assert q is k
    assert not torch.equal(q, o)


@pytest.mark.parametrize("texts", [ROWS, Calibration(((7,),), "one token")])
@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
def test_moments_of_single_experts(architecture, texts, monkeypatch):
    monkeypatch.setattr("divergent_tokens.compress.calibration.TOKENS", 50)
    network = tiny.network(architecture)
    components = find_components(network, include=["*experts*"])
    seen = defaultdict(list)

    def product(inputs, times):
        for row, expert in zip(inputs.x, inputs.experts.tolist(), strict=True):
            seen[inputs.stack, inputs.part, expert].append(row)
        return times(inputs.x)

    with torch.no_grad(), open_experts(network, components, product):
        for row in texts.rows:
            network(torch.tensor([row]))
    found = dict(second_moments(network, components, texts))
    unseen = [c for c, moment in found.items() if not moment.any()]
    assert bool(unseen) == (texts is not ROWS)
    assert any(rows for rows in seen.values())
    for component, moment in found.items():
        rows = seen[*component.part_of_stack, component.stack_index]
        expected = sum((x[:, None] * x for x in rows), torch.zeros_like(moment))
        torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-4)
    only_up = [c for c in components if c.part_of_stack[1] == "up_proj"]
    for component, moment in second_moments(network, only_up, texts):
        assert torch.equal(moment, found[component])


def test_experts_that_cannot_be_opened_are_named_before_anything_is_read(monkeypatch):
    network = tiny.network("qwen3-moe")
    network.model.layers[1].mlp.experts.has_gate = None
    monkeypatch.setattr(network.model, "forward", None)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts .* does not say how"):
        next(iter(second_moments(network, find_components(network), ROWS)))


def test_moments_in_several_readings_are_the_same(monkeypatch):
    network = tiny.network("llama")
    components = find_components(network)
    whole = dict(second_moments(network, components, ROWS))
    monkeypatch.setattr("divergent_tokens.compress.calibration.ROOM_BYTES", 3 * 4 * 32**2)
    for component, moment in second_moments(network, components, ROWS):
        assert torch.equal(moment, whole[component])


def test_what_no_text_reaches_has_a_moment_of_zero():
    network = tiny.network("llama")
    components = find_components(network, include=["*.1.mlp.*", "*.0.mlp.*"])
    network.model.layers[1].mlp.forward = lambda x: x
    found = {
        c.name: float(moment.abs().sum()) for c, moment in second_moments(network, components, ROWS)
    }
    assert list(found) == [c.name for c in components]
    assert [value == 0 for value in found.values()] == [False] * 3 + [True] * 3


def test_inputs_that_are_not_finite_are_named():
    network = tiny.network("llama")
    components = find_components(network)
    network.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"into model\.layers\.1\.self_attn\.q_proj is not finite"):
        list(second_moments(network, components, ROWS))


def test_kept_codes_come_back(tmp_path):
    component = Component("q_proj", "q", 0, (2, 4), torch.bfloat16, "q_proj.weight")
    kept = Kept(tmp_path, "base", "calibration")
    assert kept.read("gptq:int4", component) is None
    assert not kept.has("gptq:int4", component)
    codes = torch.tensor([[1, -2, 3, -8], [0, 7, 1, 2]], dtype=torch.int8)
    scales = torch.tensor([[0.5], [0.25]])
    kept.write("gptq:int4", component, Entry({"codes": codes, "scales": scales}, {"bits": 4}))
    assert Kept(tmp_path, "other", "calibration").read("gptq:int4", component) is None
    scheme = parse_scheme("gptq:int4").bound(kept)
    assert scheme.source == "calibration"
    assert scheme.is_ready
    assert scheme.compress(torch.zeros(2, 4, dtype=torch.bfloat16), component).tolist() == [
        [0.5, -1.0, 1.5, -4.0],
        [0.0, 1.75, 0.25, 0.5],
    ]


def test_codes_that_were_not_made_are_asked_for():
    component = find_components(tiny.network("llama"))[0]
    with pytest.raises(SchemeError, match=r"codes of .*q_proj under gptq:int4 were not made"):
        parse_scheme("gptq:int4").compress(torch.zeros(32, 32), component)


def test_what_has_no_inputs_of_its_own_is_refused():
    scheme = parse_scheme("gptq:int4")
    with pytest.raises(SchemeError, match="looked up or shared"):
        scheme.check(find_components(tiny.network("llama"), include=["*"]))
    with pytest.raises(SchemeError, match="groups of 7"):
        parse_scheme("gptq:int4:g7").check(find_components(tiny.network("llama")))


@pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is not None, reason="llm-compressor is installed"
)
def test_without_llm_compressor_it_says_what_to_install(tmp_path):
    model = runs.model()
    components = find_components(model.network)
    with pytest.raises(SchemeError, match="pip install llmcompressor"):
        ready_schemes(model, components, [parse_scheme("gptq:int4")], cache=tmp_path)


def test_a_plan_without_it_needs_nothing(tmp_path):
    model = runs.model()
    plan = uniform_plan(find_components(model.network), parse_scheme("int8"))
    assert ready_plan(model, find_components(model.network), plan, cache=tmp_path) is plan
    assert list(tmp_path.iterdir()) == []


def test_the_builtin_texts_are_calibrated_on():
    found = read_calibration("builtin", runs.model())
    assert len(found.rows) == 128
    assert max(map(len, found.rows)) <= 512


# --- with it ---


@needs_llm_compressor
@pytest.mark.parametrize("text", ["gptq:int4", "gptq:int3:g16", "gptq:int4:g8:asym", "gptq:int2"])
def test_it_is_what_its_own_modifier_makes_of_the_first_layer(text, tmp_path):
    """Whose inputs are the base's whatever is compressed before."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    grid = parse_scheme(text).steps[0].grid
    network = tiny.network("llama")
    network.save_pretrained(tmp_path)
    network.config._name_or_path = str(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    component = next(c for c in find_components(network) if c.name == name)
    ((_, moment),) = second_moments(network, [component], ROWS)
    found = dequantize(round_by_gptq(weight_of(network, component), moment, grid))
    group = grid.granularity if isinstance(grid.granularity, int) else None
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if group is None else "group",
        **({} if group is None else {"group_size": group}),
    }
    modifier = GPTQModifier(config_groups={"group_0": {"targets": [name], "weights": weights}})
    data = Dataset.from_dict(
        {
            "input_ids": [list(row) for row in ROWS.rows],
            "attention_mask": [[1] * len(row) for row in ROWS.rows],
        }
    )
    oneshot(
        model=network,
        recipe=modifier,
        dataset=data,
        num_calibration_samples=len(ROWS.rows),
        max_seq_length=64,
        tokenizer=tiny.tokenizer(),
        pipeline="basic",
    )
    theirs = weight_of(network, component)
    same = (found - theirs).abs() < 1e-5
    assert same.float().mean() > 0.99  # sums in another order may tip a code


@needs_llm_compressor
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_harms_the_outputs_less_than_rounding_to_nearest_on_its_grid(bits):
    network = tiny.network("llama")
    grid = parse_scheme(f"gptq:int{bits}").steps[0].grid
    gains = []
    for component, moment in second_moments(network, find_components(network), ROWS):
        weight = weight_of(network, component)

        def harm(quantized, weight=weight, moment=moment):
            change = dequantize(quantized) - weight
            return float(((change @ moment) * change).sum())

        gptq, nearest = round_by_gptq(weight, moment, grid), round_to_nearest(weight, grid)
        gains.append(harm(gptq) / harm(nearest))
    assert max(gains) < 1.01
    assert sum(gains) / len(gains) < 0.9


@needs_llm_compressor
@pytest.mark.parametrize("text", ["gptq:int4", "gptq:int4:g8:asym"])
def test_columns_without_inputs_are_rounded_to_nearest_like_a_matrix_without_any(text):
    grid = parse_scheme(text).steps[0].grid
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator)
    x = torch.randn(40, 16, generator=generator)
    x[:, 3] = 0
    nearest = dequantize(round_to_nearest(weight, grid))
    found = dequantize(round_by_gptq(weight, x.T @ x, grid))
    assert torch.equal(found[:, 3], nearest[:, 3])
    assert not torch.equal(found, nearest)
    assert torch.equal(dequantize(round_by_gptq(weight, torch.zeros(16, 16), grid)), nearest)


@needs_llm_compressor
def test_codes_are_made_once_and_a_model_runs_under_them(tmp_path, monkeypatch):
    model = runs.model()
    components = find_components(model.network, include=["*.mlp.*"])
    schemes = [parse_scheme("gptq:int4:g8"), parse_scheme("int8")]
    first = ready_schemes(model, components, schemes, cache=tmp_path)
    assert first[1] is schemes[1]
    monkeypatch.setattr("divergent_tokens.compress.gptq.round_by_gptq", None)
    second = ready_schemes(model, components, schemes, cache=tmp_path)
    weight = weight_of(model.network, components[0])
    assert torch.equal(
        first[0].compress(weight, components[0]), second[0].compress(weight, components[0])
    )
    plan = uniform_plan(components, schemes[0])
    with lent_candidates(model, {"gptq": plan}, components, cache=tmp_path)["gptq"] as lent:
        changed = weight_of(lent.network, components[0]).clone()
    assert torch.equal(changed, first[0].compress(weight, components[0]))
    assert not torch.equal(changed, weight)
