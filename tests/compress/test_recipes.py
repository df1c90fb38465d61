"""Plans as other tools read them, each held against the tool's own rules."""

import importlib.util
import json
import re

import pytest
import yaml
from compressed_tensors.quantization import QuantizationScheme

import tiny
from divergent_tokens.compress.components import find_components, weight_of
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.recipes import Tool, _any_of, recipe
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
    """Modules that the plan names are quantized to so many bits, and no others."""
    from llmcompressor import oneshot

    network = tiny.network("llama")
    schemes = {"q": "int8", "v": "int4:g8", "up": "int3:g16"}
    components = {c.name: c for c in find_components(network) if c.kind in schemes}
    chosen = {name: schemes[c.kind] for name, c in components.items()}
    file = tmp_path / "recipe.yaml"
    file.write_text(text(Tool.llm_compressor, chosen))
    network.save_pretrained(tmp_path / "base")
    network.config._name_or_path = str(tmp_path / "base")
    before = {c.name: weight_of(network, c).clone() for c in find_components(network)}
    oneshot(model=network, recipe=str(file), tokenizer=tiny.tokenizer())
    for name, module in network.named_modules():
        args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        assert (args is not None) == (name in chosen), name
        if args is not None:
            assert args.num_bits == int(re.findall(r"\d", chosen[name])[0])
            assert module.weight_scale.shape[0] == before[name].shape[0]


# --- GPTQModel ---


def dynamic_get(dynamic, name):
    """GPTQModel's rule: `-:` patterns come before the others; the first that matches decides."""
    for pattern, overrides in sorted(dynamic.items(), key=lambda item: item[0][0] != "-"):
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
            return None if pattern.startswith("-:") else overrides
    raise AssertionError("falls to the default")


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
    assert rows["q"] == {"bits": 8, "group_size": -1, "sym": True}
    assert rows["k"] == rows["v"] == {"bits": 4, "group_size": 64, "sym": True}
    assert rows["o"] == {"bits": 3, "group_size": 128, "sym": False}
    assert rows["gate"] is None
    assert dynamic_get(found["dynamic"], "model.layers.11.self_attn.q_proj") is None
    assert dynamic_get(found["dynamic"], f"{BLOCK}.q_proj.more") is None


@pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None, reason="GPTQModel is not installed"
)
def test_gptqmodel_reads_it_so():
    from gptqmodel import QuantizeConfig

    chosen = {f"{BLOCK}.q_proj": "int8", f"{BLOCK}.k_proj": "int4:g64"}
    config = QuantizeConfig(**json.loads(text(Tool.gptqmodel, chosen)))
    parts = ("q_proj", "k_proj", "v_proj")
    assert [config.dynamic_get(f"{BLOCK}.{part}") for part in parts] == [
        {"bits": 8, "group_size": -1, "sym": True},
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


def test_every_tool_says_how_its_file_is_used():
    for tool in Tool:
        assert "FILE" in recipe(plan({f"{BLOCK}.q_proj": "int8"}), tool).notes[0]
