"""Plans as other tools read them, each held against the tool's own rules."""

import importlib.util
import json
import re

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationScheme, fake_quantize

import tiny
from divergent_tokens.compress.components import find_components, weight_of
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.recipes import _any_of, recipe
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.compress.tools import Tool
from divergent_tokens.errors import SchemeError

BLOCK = "model.layers.1.self_attn"


def plan(components, model_type="llama"):
    base = {"reference": "b", "fingerprint": "0" * 64, "model_type": model_type, "config": {}}
    return PlanFile(base, components, 1, 2)


def text(tool, components, **base):
    return recipe(plan(components, **base), tool).text


def test_a_pattern_for_many_names_matches_them_and_no_others():
    chosen = [f"l.{i}.{part}" for i, part in [(0, "q"), (0, "k"), (1, "q"), (11, "q"), (12, "a.b")]]
    pattern = _any_of(chosen)
    assert pattern == r"l\.(?:0\.(?:q|k)|(?:1|11)\.q|12\.a\.b)"
    every = {f"l.{i}.{part}" for i in range(15) for part in ("q", "k", "a.b", "a", "qq")}
    assert {name for name in every if re.fullmatch(pattern, name)} == set(chosen)
    experts = [f"model.layers.{i}.experts.{e}.up" for i in range(48) for e in range(128)]
    assert len(_any_of(experts)) < 1000
    assert _any_of(["l.a", "l.a.b"]) == r"l\.a(?:\.b)?"


# --- llm-compressor ---


def test_llm_compressor_s_groups_name_their_modules():
    found = yaml.safe_load(
        text(
            Tool.llm_compressor,
            {
                f"{BLOCK}.q_proj": "int8",
                f"{BLOCK}.k_proj": "int4:g64:asym",
                f"{BLOCK}.v_proj": "w8a8",
                f"{BLOCK}.o_proj": "int8",
                "model.layers.0.mlp.up_proj": "nvfp4",
            },
        )
    )
    (stage,) = found.values()
    groups = stage["quantization_modifiers"]["QuantizationModifier"]["config_groups"]
    schemes = [QuantizationScheme.model_validate(group) for group in groups.values()]
    assert [s.targets for s in schemes] == [
        [f"{BLOCK}.q_proj", f"{BLOCK}.o_proj"],
        [f"{BLOCK}.k_proj"],
        [f"{BLOCK}.v_proj"],
        ["model.layers.0.mlp.up_proj"],
    ]
    weights = [(s.weights.num_bits, s.weights.strategy, s.weights.group_size) for s in schemes]
    assert weights == [
        (8, "channel", None),
        (4, "group", 64),
        (8, "channel", None),
        (4, "tensor_group", 16),
    ]
    assert [s.weights.symmetric for s in schemes] == [True, False, True, True]
    assert schemes[2].input_activations.dynamic is True


@pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)
def test_llm_compressor_runs_it(tmp_path):
    """Modules that the plan names are quantized, and no others; where its grid is ours, alike."""
    from llmcompressor import oneshot

    network = tiny.network("llama")
    schemes = {
        "q": "int8",
        "k": "int4:g8:asym",
        "v": "int4:g8",
        "o": "fp8",
        "gate": "mxfp4",
        "up": "int3:g16",
        "down": "int3:asym",
    }
    components = {c.name: c for c in find_components(network) if c.layer == 1 or c.kind == "q"}
    chosen = {name: schemes[c.kind] for name, c in components.items()}
    file = tmp_path / "recipe.yaml"
    file.write_text(text(Tool.llm_compressor, chosen))
    network.save_pretrained(tmp_path / "base")
    network.config._name_or_path = str(tmp_path / "base")
    before = {name: weight_of(network, c).clone() for name, c in components.items()}
    oneshot(model=network, recipe=str(file), tokenizer=tiny.tokenizer())
    for name, module in network.named_modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        assert (args is not None) == (name in chosen), name
        if args is None:
            continue
        scheme, weight = parse_scheme(chosen[name]), before[name]
        zeros = getattr(module, "weight_zero_point", None)
        theirs = fake_quantize(module.weight.detach(), module.weight_scale, zeros, args)
        ours = scheme.compress(weight, components[name])
        if not args.symmetric or args.type == "float":
            assert torch.equal(theirs, ours), name
        else:
            grid = weight.reshape(*module.weight_scale.shape, -1)
            scales = grid.abs().amax(-1) / (2 ** (args.num_bits - 1) - 0.5)
            assert torch.allclose(module.weight_scale.float(), scales, rtol=1e-6), name
            assert args.num_bits == int(re.findall(r"\d", chosen[name])[0])


@pytest.mark.parametrize("other", ["int8", None])
def test_nvfp4_of_a_part_of_q_k_and_v_is_refused(other):
    """llm-compressor stops at it: the three have one scale."""
    rest = {"model.layers.0.self_attn.q_proj": "int8", "model.layers.0.self_attn.k_proj": "int8"}
    some = {f"{BLOCK}.k_proj": "nvfp4", f"{BLOCK}.v_proj": "nvfp4"}
    if other:
        some[f"{BLOCK}.q_proj"] = other
    with pytest.raises(SchemeError) as error:
        text(Tool.llm_compressor, rest | some)
    found = other or "unchanged"
    assert f"{BLOCK}.k_proj is nvfp4 where {BLOCK}.q_proj is {found}" in str(error.value)
    whole = rest | some | {f"{BLOCK}.q_proj": "nvfp4", "model.layers.0.mlp.down_proj": "nvfp4"}
    assert "shares one scale" in recipe(plan(whole), Tool.llm_compressor).notes[-1]
    # A mixture without gates, say, has nothing that shares.
    text(Tool.llm_compressor, {"model.layers.0.mlp.up_proj": "nvfp4"})


# --- GPTQModel ---


def dynamic_get(dynamic, name):
    """GPTQModel's rule: `-:` patterns come before the others; the first that matches decides."""
    for pattern, overrides in sorted(dynamic.items(), key=lambda item: item[0][0] != "-"):
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return None if pattern.startswith("-:") else overrides
    return "the default"


def test_gptqmodel_s_dynamic_says_of_every_module_what_is_planned():
    found = json.loads(
        text(
            Tool.gptqmodel,
            {
                f"{BLOCK}.q_proj": "int8",
                f"{BLOCK}.k_proj": "int4:g64",
                f"{BLOCK}.v_proj": "int4:g64",
                f"{BLOCK}.o_proj": "int3:g128:asym",
            },
        )
    )
    assert {key: found[key] for key in ("bits", "group_size", "sym")} == {
        "bits": 4,
        "group_size": 64,
        "sym": True,
    }
    rows = {
        part: dynamic_get(found["dynamic"], f"{BLOCK}.{part}_proj")
        for part in ("q", "k", "v", "o", "gate")
    }
    assert rows["q"] == {"bits": 8, "group_size": -1, "sym": True, "act_group_aware": False}
    assert rows["k"] == rows["v"] == {"bits": 4, "group_size": 64, "sym": True}
    assert rows["o"] == {"bits": 3, "group_size": 128, "sym": False}
    assert rows["gate"] is None
    assert dynamic_get(found["dynamic"], "model.layers.11.self_attn.q_proj") is None
    assert dynamic_get(found["dynamic"], f"{BLOCK}.q_proj.more") is None
    # It asks of names inside a layer too, whether they are left out everywhere.
    for inside in ("self_attn.q_proj", "self_attn.gate", "mlp.experts.3.up_proj"):
        assert dynamic_get(found["dynamic"], inside) == "the default"


def test_gptqmodel_s_patterns_match_what_servers_join():
    """vLLM looks q, k and v up as one, under a name that the base does not have."""
    alike = {f"{BLOCK}.{part}_proj": "int4:g64" for part in "qkv"}
    mlp = "model.layers.1.mlp"
    torn = {f"{mlp}.gate_proj": "int8", f"{mlp}.up_proj": "int4:g64"}
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj": "int8" for i in range(12)}
    found = recipe(plan(alike | torn | experts), Tool.gptqmodel)
    dynamic = json.loads(found.text)["dynamic"]
    assert dynamic_get(dynamic, f"{BLOCK}.qkv_proj")["bits"] == 4
    assert dynamic_get(dynamic, f"{mlp}.gate_up_proj") is None
    for name in ("model.layers.0.mlp.experts", "model.layers.0.mlp.experts.11.up_proj"):
        assert dynamic_get(dynamic, name)["bits"] == 8
    assert f"the parts of {mlp}.gate_up_proj (1 such)" in found.notes[-1]
    half = {f"{BLOCK}.q_proj": "int8", f"{BLOCK}.k_proj": "int8"}
    found = recipe(plan(half), Tool.gptqmodel)
    assert dynamic_get(json.loads(found.text)["dynamic"], f"{BLOCK}.qkv_proj") is None
    assert f"the parts of {BLOCK}.qkv_proj" in found.notes[-1]
    assert "vLLM" not in " ".join(recipe(plan(alike), Tool.gptqmodel).notes)


@pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None, reason="GPTQModel is not installed"
)
def test_gptqmodel_reads_it_so():
    from gptqmodel import QuantizeConfig

    chosen = {f"{BLOCK}.q_proj": "int8", f"{BLOCK}.k_proj": "int4:g64"}
    config = QuantizeConfig(**json.loads(text(Tool.gptqmodel, chosen)))
    parts = ("q_proj", "k_proj", "v_proj")
    assert [config.dynamic_get(f"{BLOCK}.{part}") for part in parts] == [
        {"bits": 8, "group_size": -1, "sym": True, "act_group_aware": False},
        {"bits": 4, "group_size": 64, "sym": True},
        False,
    ]


# --- llama.cpp ---


def test_llama_cpp_s_types_match_one_tensor_each():
    found = text(
        Tool.llama_cpp,
        {
            f"{BLOCK}.q_proj": "int8:tensor",
            f"{BLOCK}.o_proj": "int6",
            "model.layers.1.mlp.down_proj": "int4:g64",
            "model.layers.11.mlp.down_proj": "int5:asym",
            "model.layers.0.mlp.up_proj": "mxfp4",
        },
    )
    types = dict(line.split("=") for line in found.splitlines())
    assert sorted(types.values()) == ["bf16", "mxfp4", "q4_0", "q5_1", "q6_K", "q8_0"]

    def of(tensor):
        return [kind for pattern, kind in types.items() if re.search(pattern, tensor)]

    assert of("blk.1.attn_q.weight") == ["q8_0"]
    assert of("blk.1.attn_output.weight") == ["q6_K"]
    assert of("blk.1.ffn_down.weight") == ["q4_0"]
    assert of("blk.11.ffn_down.weight") == ["q5_1"]
    assert of("blk.1.attn_k.weight") == of("token_embd.weight") == ["bf16"]
    assert not any(character.isspace() for line in found.splitlines() for character in line)


def test_experts_of_a_layer_are_one_tensor():
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj": "int4" for i in range(4)}
    found = text(Tool.llama_cpp, experts, model_type="qwen3_moe")
    assert found.splitlines() == [
        r"^blk\.0\.ffn_up_exps\.weight$=q4_0",
        r"^(?!blk\.0\.ffn_up_exps\.weight$)=bf16",
    ]
    experts["model.layers.0.mlp.experts.3.up_proj"] = "int8"
    with pytest.raises(SchemeError, match=r"in one tensor, blk\.0\.ffn_up_exps"):
        text(Tool.llama_cpp, experts, model_type="qwen3_moe")


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"dtype": "float16"}, "f16"),
        ({"dtype": None, "text_config": {"dtype": "float32"}}, "f32"),
        ({}, "bf16"),
        (None, "bf16"),
    ],
)
def test_what_is_not_planned_keeps_its_dtype(config, kept):
    base = {**plan({}).base, "config": config}
    found = recipe(PlanFile(base, {f"{BLOCK}.q_proj": "int8"}, 1, 2), Tool.llama_cpp)
    assert found.text.endswith(f"={kept}\n")
    assert f"--outtype {kept}" in found.notes[0]


# --- Model Optimizer ---


def test_modelopt_s_quantizers():
    found = yaml.safe_load(
        text(
            Tool.modelopt,
            {
                f"{BLOCK}.q_proj": "int8",
                f"{BLOCK}.k_proj": "int4:g64",
                f"{BLOCK}.v_proj": "fp8",
                f"{BLOCK}.o_proj": "nvfp4",
            },
        )
    )
    first, *entries = found["quant_cfg"]
    assert first == {"quantizer_name": "*", "enable": False}
    by_name = {entry["quantizer_name"].removeprefix(BLOCK + "."): entry["cfg"] for entry in entries}
    assert by_name["q_proj.weight_quantizer"] == {"num_bits": 8, "axis": 0}
    assert by_name["k_proj.weight_quantizer"] == {"num_bits": 4, "block_sizes": {-1: 64}}
    assert by_name["v_proj.input_quantizer"]["type"] == "dynamic"
    assert by_name["o_proj.weight_quantizer"]["block_sizes"][-1] == 16


@pytest.mark.skipif(
    importlib.util.find_spec("modelopt") is None, reason="Model Optimizer is not installed"
)
@pytest.mark.filterwarnings("ignore")  # what it says on import
def test_modelopt_runs_it():
    """The planned quantizers are on and no others, and what they do to weights is ours."""
    import modelopt.torch.quantization as mtq

    network = tiny.network("llama")
    schemes = {
        "q": "int8",
        "k": "int4:g8",
        "v": "int8:tensor",
        "o": "int3",
        "gate": "w8a8",
        "up": "fp8",
    }
    components = {c.name: c for c in find_components(network) if c.kind in schemes}
    chosen = {name: schemes[c.kind] for name, c in components.items()}
    before = {name: weight_of(network, c).clone() for name, c in components.items()}
    settings = yaml.safe_load(text(Tool.modelopt, chosen))
    mtq.quantize(network, settings, lambda model: model(torch.arange(12)[None]))
    for name, module in network.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None:
            continue
        assert quantizer.is_enabled == (name in chosen), name
        assert module.input_quantizer.is_enabled == (chosen.get(name) in ("w8a8", "fp8")), name
        if name in chosen:
            ours = parse_scheme(chosen[name]).compress(before[name], components[name])
            # It multiplies by a reciprocal where we divide.
            assert torch.allclose(quantizer(before[name]), ours, rtol=1e-5, atol=1e-7), name


# --- refused ---


@pytest.mark.parametrize(
    ("tool", "scheme"),
    [
        (Tool.llm_compressor, "magnitude:0.5"),
        (Tool.llm_compressor, "llm.int8"),
        (Tool.gptqmodel, "int6"),
        (Tool.gptqmodel, "int4:g48"),
        (Tool.gptqmodel, "int8:tensor"),
        (Tool.gptqmodel, "w8a8"),
        (Tool.llama_cpp, "int7"),
        (Tool.llama_cpp, "fp8"),
        (Tool.llama_cpp, "magnitude:0.5+int4"),
        (Tool.modelopt, "int4:asym"),
        (Tool.modelopt, "from:somewhere"),
    ],
)
def test_what_a_tool_cannot_be_told_is_refused_by_name(tool, scheme):
    with pytest.raises(SchemeError) as error:
        text(tool, {f"{BLOCK}.q_proj": scheme})
    assert f"{tool} has no setting for {BLOCK}.q_proj ({scheme}); it takes int" in str(error.value)


@pytest.mark.parametrize(
    ("tool", "name", "model_type", "why"),
    [
        (Tool.llm_compressor, "transformer.h.0.attn.c_attn", "gpt2", "passes over"),
        (Tool.gptqmodel, "lm_head", "llama", "in the layers"),
        (Tool.gptqmodel, "model.embed_tokens", "llama", "in the layers"),
        (Tool.modelopt, "model.layers.0.mlp.experts.3.up_proj", "qwen3_moe", "one module"),
    ],
)
def test_what_a_tool_would_leave_undone_is_refused_by_name(tool, name, model_type, why):
    with pytest.raises(SchemeError, match=why) as error:
        text(tool, {name: "int8"}, model_type=model_type)
    assert name in str(error.value)


@pytest.mark.parametrize("tool", Tool)
def test_a_plan_of_nothing_is_refused(tool):
    with pytest.raises(SchemeError, match="leaves every component as it is"):
        text(tool, {})


def test_a_scale_for_a_whole_matrix_is_told_of():
    notes = recipe(plan({f"{BLOCK}.q_proj": "int8:tensor"}), Tool.llm_compressor).notes
    assert "int8:tensor becomes int8" in notes[-1]


def test_an_architecture_that_no_gguf_has():
    with pytest.raises(SchemeError, match="'no_such' is not known here"):
        text(Tool.llama_cpp, {f"{BLOCK}.q_proj": "int8"}, model_type="no_such")


def test_what_a_tool_does_otherwise_is_told():
    def notes(tool, scheme):
        return " ".join(recipe(plan({f"{BLOCK}.q_proj": scheme}), tool).notes)

    assert "int4 becomes gptq:int4" in notes(Tool.gptqmodel, "int4:g64")
    assert "gptq:int4 is rounded to nearest" in notes(Tool.llama_cpp, "gptq:int4")
    assert "gptq:int4 is rounded to nearest" in notes(Tool.modelopt, "gptq:int4")
    assert "nearest" not in notes(Tool.modelopt, "int4")
    assert "absmax / 127," in notes(Tool.modelopt, "w8a8")


def test_every_tool_says_how_its_file_is_used():
    for tool in Tool:
        assert "FILE" in recipe(plan({f"{BLOCK}.q_proj": "int8"}), tool).notes[0]
