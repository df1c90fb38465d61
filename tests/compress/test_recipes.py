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
from divergent_tokens.compress.recipes import Tool, recipe
from divergent_tokens.errors import SchemeError

BLOCK = "model.layers.1.self_attn"


def plan(components, model_type="llama"):
    base = {"reference": "b", "fingerprint": "0" * 64, "model_type": model_type, "config": {}}
    return PlanFile(base, components, 1, 2)


def text(tool, components, **base):
    return recipe(plan(components, **base), tool).text


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
    """GPTQModel's rule: the first pattern that matches from the start; `-:` leaves out."""
    for pattern, overrides in dynamic.items():
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
    assert sorted(types.values()) == ["mxfp4", "q4_0", "q5_1", "q6_K", "q8_0"]

    def of(tensor):
        return [kind for pattern, kind in types.items() if re.search(pattern, tensor)]

    assert of("blk.1.attn_q.weight") == ["q8_0"]
    assert of("blk.1.attn_output.weight") == ["q6_K"]
    assert of("blk.1.ffn_down.weight") == ["q4_0"]
    assert of("blk.11.ffn_down.weight") == ["q5_1"]
    assert of("blk.1.attn_k.weight") == []
    assert not any(character.isspace() for line in found.splitlines() for character in line)


def test_experts_of_a_layer_are_one_tensor():
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj": "int4" for i in range(4)}
    found = text(Tool.llama_cpp, experts, model_type="qwen3_moe")
    assert found == r"^blk\.0\.ffn_up_exps\.weight$=q4_0" + "\n"
    experts["model.layers.0.mlp.experts.3.up_proj"] = "int8"
    with pytest.raises(SchemeError, match=r"in one tensor, blk\.0\.ffn_up_exps"):
        text(Tool.llama_cpp, experts, model_type="qwen3_moe")


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


def test_an_architecture_that_no_gguf_has():
    with pytest.raises(SchemeError, match="'no_such' is not known here"):
        text(Tool.llama_cpp, {f"{BLOCK}.q_proj": "int8"}, model_type="no_such")


def test_every_tool_says_how_its_file_is_used():
    for tool in Tool:
        assert "FILE" in recipe(plan({f"{BLOCK}.q_proj": "int8"}), tool).notes[0]
