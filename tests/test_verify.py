"""A checkpoint against its plan: what is right passes, and whatever was tampered with is named."""

import json
import shutil
import subprocess
from importlib import resources
from importlib.util import find_spec

import pytest
import torch
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file

import runs
import sweeps
import tiny
from divergent_tokens.calibrated import ready_schemes
from divergent_tokens.compress.checkpoint import write_checkpoint
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import size_bytes, uniform_plan
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import ModelError, PromptError, RecordError
from divergent_tokens.models import load_model, outline_model
from divergent_tokens.quiet import quietly
from divergent_tokens.sensitivities import PromptRow, open_sensitivities
from divergent_tokens.verify import verify

FILE = resources.files("divergent_tokens") / "data" / "schemas" / "verification-1.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("verify")


def base_of(place, architecture="llama", dtype=torch.float32):
    folder = place / f"{architecture}-{dtype}"
    if not folder.is_dir():
        with quietly():
            tiny.network(architecture).to(dtype).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return folder


def written(folder, out, scheme, **options):
    outline = outline_model(folder)
    components = find_components(outline.network)
    schemes = {c.name: scheme(c) if callable(scheme) else scheme for c in components}
    model_type = outline.network.config.model_type
    base = {
        "reference": str(folder),
        "fingerprint": outline.fingerprint,
        "model_type": model_type,
        "config": {},
    }
    texts = {name: text for name, text in schemes.items() if text}
    plan = PlanFile(base, texts, 0, 0).plan()
    whole = sum(component.base_size_bytes for component in components)
    file = PlanFile(base, texts, size_bytes(plan, components), whole)
    write_checkpoint(outline, file, out, **options)
    return out


def verified(folder, out, dtype="float32"):
    model = load_model(folder, dtype=dtype, device="cpu")
    return verify(out, model, runs.prompts(n=4, length=8), new_tokens=6, batch_size=4)


def failed(found):
    return {check.name: check.found for check in found.checks if not check.passed}


@pytest.fixture(scope="module")
def int8(place):
    return written(base_of(place), place / "int8", "int8")


@pytest.fixture
def copy(int8, tmp_path):
    """A checkpoint to tamper with."""
    shutil.copytree(int8, tmp_path / "copy")
    return tmp_path / "copy"


# --- what is right ---


def test_all_is_as_planned_and_said_in_the_form_of_the_schema(place, int8):
    found = verified(base_of(place), int8)
    assert failed(found) == {}
    assert [check.name for check in found.checks] == [
        "loads",
        "keys",
        "weights",
        "tokenizer",
        "generation",
        "config",
        "files",
        "settings",
        "sizes",
        "divergence",
    ]
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    problems = [
        f"{error.json_path}: {error.message[:200]}"
        for error in Draft202012Validator(json.loads(FILE.read_text())).iter_errors(record)
    ]
    assert problems == []
    candidates = record["measured"]["candidates"]
    assert candidates["in memory"] == candidates["reloaded"]
    assert record["measured"]["overlap"] is None  # nobody searched for this plan
    assert record["servers"] == {"vllm": [], "transformers": []}


@pytest.mark.parametrize(
    ("architecture", "scheme", "options"),
    [
        ("llama", "w8a8", {}),
        ("llama", lambda c: {"q": "int4:g8", "up": "fp8"}.get(c.kind), {}),
        ("qwen3-moe", "int4:g8", {}),
        ("gpt2", "int4", {"dense": True}),
        ("gpt-oss", lambda c: f"int{3 + (c.expert or 0)}", {"dense": True}),
    ],
)
def test_other_plans_and_architectures(place, tmp_path, architecture, scheme, options):
    folder = base_of(place, architecture)
    found = verified(folder, written(folder, tmp_path / "out", scheme, **options))
    assert failed(found) == {}
    assert (found.to_json()["passed"], found.worst) == (True, None)


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_in_bfloat16(place, tmp_path, scheme):
    folder = base_of(place, dtype=torch.bfloat16)

    def in_groups(component):
        return scheme if component.shape[1] % 32 == 0 else None

    out = written(folder, tmp_path / "out", in_groups)
    assert failed(verified(folder, out, "bfloat16")) == {}


@pytest.mark.skipif(find_spec("llmcompressor") is None, reason="llm-compressor is not installed")
def test_codes_by_gptq_are_written_as_they_were_measured(place, tmp_path):
    folder, cache = base_of(place), tmp_path / "cache"
    model = load_model(folder, dtype="float32", device="cpu")
    components = find_components(model.network)
    scheme = parse_scheme("gptq:int4:g8")
    (ready,) = ready_schemes(model, components, [scheme], cache=cache)
    out = written(folder, tmp_path / "out", str(scheme), ready=uniform_plan(components, ready))
    prompts = runs.prompts(n=4, length=8)
    assert failed(verify(out, model, prompts, new_tokens=6, batch_size=4, cache=cache)) == {}


# --- what was tampered with ---


def changed(copy, change):
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})


def test_a_changed_byte_names_the_component(place, copy):
    name = "model.layers.1.mlp.up_proj"

    def flip(tensors):
        tensors[f"{name}.weight_packed"].view(torch.uint8)[3, 5] ^= 64

    changed(copy, flip)
    found = verified(base_of(place), copy)
    said = failed(found)
    assert said.keys() == {"weights", "divergence"}
    assert said["weights"].startswith(f"{name} differs most from its plan, by ")
    assert name in said["divergence"]
    assert found.worst[0] == name


def test_a_changed_byte_of_what_is_not_compressed(place, copy):
    def flip(tensors):
        tensors["model.norm.weight"].view(torch.uint8)[7] ^= 16

    changed(copy, flip)
    assert failed(verified(base_of(place), copy))["weights"].startswith("model.norm.weight differs")


def test_a_scale_that_was_cut_off(place, copy):
    def cut(tensors):
        name = "model.layers.0.self_attn.q_proj.weight_scale"
        tensors[name] = tensors[name][:-1].contiguous()

    changed(copy, cut)
    said = failed(verified(base_of(place), copy))
    # Some versions of transformers report a shape that does not fit, others stop there.
    assert "self_attn.q_proj.weight_scale" in said.get("keys", said.get("loads"))


def test_a_file_cut_short(place, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = verified(base_of(place), copy)
    said = failed(found)
    assert said.keys() == {"loads", "files"}
    assert "model.safetensors is truncated or corrupt" in said["files"]
    assert found.comparison is None


def test_missing_and_unexpected_keys(place, copy):
    def rename(tensors):
        name = "model.layers.0.mlp.down_proj"
        tensors[f"{name}.weight_packet"] = tensors.pop(f"{name}.weight_packed")

    changed(copy, rename)
    said = failed(verified(base_of(place), copy))
    assert "missing" in said["keys"]
    assert "down_proj.weight_pack" in said["keys"]


@pytest.mark.parametrize(
    ("edit", "check", "said"),
    [
        (lambda c: c.update(rms_norm_eps=1e-3), "config", "rms_norm_eps is 0.001"),
        (
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                num_bits=4
            ),
            "settings",
            "other weights for model.layers.0.self_attn.q_proj",
        ),
        (lambda c: c.pop("quantization_config"), "keys", "unexpected"),
        (lambda c: c.update(model_type="no_such"), "loads", "no_such"),
    ],
)
def test_a_config_edited_by_hand(place, copy, edit, check, said):
    config = json.loads((copy / "config.json").read_text())
    edit(config)
    (copy / "config.json").write_text(json.dumps(config))
    assert said in failed(verified(base_of(place), copy))[check]


def test_inputs_that_are_not_quantized_any_more(place, tmp_path):
    out = written(base_of(place), tmp_path / "out", "w8a8")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (out / "config.json").write_text(json.dumps(config))
    said = failed(verified(base_of(place), out))
    assert said.keys() == {"settings", "divergence"}
    assert "no weight, so that inputs are quantized" in said["divergence"]


def test_the_checkpoint_of_another_plan(place, int8, tmp_path):
    other = written(base_of(place), tmp_path / "other", "int4:g8")
    shutil.copy(int8 / "plan.json", other / "plan.json")
    said = failed(verified(base_of(place), other))
    assert said.keys() == {"weights", "settings", "sizes", "divergence"}


def test_no_plan_and_a_plan_of_another_base(place, copy):
    with pytest.raises(RecordError, match="is another model"):
        verified(base_of(place, "qwen3"), copy)
    (copy / "plan.json").unlink()
    with pytest.raises(RecordError, match=r"plan\.json does not exist"):
        verified(base_of(place), copy)


def test_the_sign_of_a_zero_is_a_bit(place, tmp_path):
    out = written(base_of(place), tmp_path / "out", "int8", dense=True)

    def flip(tensors):
        weight = tensors["model.layers.0.mlp.up_proj.weight"].view(-1)
        weight[(weight == 0).nonzero()[0]] = -0.0

    changed(out, flip)
    said = failed(verified(base_of(place), out))
    assert said == {"weights": "model.layers.0.mlp.up_proj differs most from its plan, by 0"}


def test_a_scale_that_is_no_number_differs_most(place, copy):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.k_proj.weight_scale"][3] = 5.0
        tensors["model.layers.1.self_attn.q_proj.weight_scale"][2] = float("nan")

    changed(copy, spoil)
    found = verified(base_of(place), copy)
    assert found.worst == ("model.layers.1.self_attn.q_proj", float("inf"))
    assert found.to_json()["worst"]["difference"] is None
    assert "are NaN or infinite" in failed(found)["divergence"]


def test_what_lies_beside_the_weights(place, copy):
    config = json.loads((copy / "generation_config.json").read_text())
    edited = json.dumps(config | {"repetition_penalty": 1.5})
    (copy / "generation_config.json").write_text(edited)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]  # the same tokens, made in another order
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert failed(verified(base_of(place), copy)) == {
        "tokenizer": "other vocabulary and rules and chat template than the base's",
        "generation": "repetition_penalty is 1.5, in the base None",
    }


def test_positions_that_the_checkpoint_lost_and_those_the_base_never_had(place, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10}))
    said = failed(verified(base_of(place), copy))
    assert said.keys() == {"config", "divergence"}
    assert "copy has 10. Use a smaller --prefix" in said["divergence"]
    model = load_model(base_of(place), dtype="float32", device="cpu")
    with pytest.raises(PromptError, match="has 256"):
        verify(copy, model, runs.prompts(n=2, length=8), new_tokens=250, batch_size=2)


def test_no_room_to_reload_is_no_fault_of_the_checkpoint(place, copy, monkeypatch):
    def ended(command, **_options):
        return subprocess.CompletedProcess(command, -9, "", "")

    monkeypatch.setattr(subprocess, "run", ended)
    with pytest.raises(ModelError, match=r"ended with -9 before it could say .*free some room"):
        verified(base_of(place), copy)


def test_prompts_that_chose_the_plan(place, copy, tmp_path):
    sweep, prompts = sweeps.sweep(n_prompts=3), runs.prompts(n=4, length=8).prompts
    swept = [PromptRow(i, prompt.digest, None, None) for i, prompt in enumerate(prompts[1:])]
    file, run = tmp_path / "sweep.db", {**sweep.run, "rounding_kl": None}
    with open_sensitivities(file, run, sweep.components, swept, sweep.margins):
        pass
    plan = json.loads((copy / "plan.json").read_text())
    for digest, overlap in ((run["prompts"]["digest"], 3), ("ab" * 32, None)):
        step = {"step": "search", "sweep": {"file": str(file), "prompts": digest}}
        (copy / "plan.json").write_text(json.dumps(plan | {"trail": [step]}))
        found = verified(base_of(place), copy)
        assert found.to_json()["measured"]["overlap"] == overlap  # None: another sweep lies there
