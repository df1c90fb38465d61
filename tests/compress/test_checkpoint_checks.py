"""The files of a checkpoint against plan and base: each edit is named by the check that sees it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from divergent_tokens.compress.checkpoint import PLAN, write_checkpoint
from divergent_tokens.compress.checkpoint_checks import check_files
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import Plan, size_bytes
from divergent_tokens.compress.plan_file import PlanFile, read_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.models import load_model, outline_model
from divergent_tokens.quiet import quietly

MIXED = {"q": "int4:g8", "k": "w8a8", "up": "fp8", "gate": "int8:tensor"}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("checks")


@pytest.fixture(scope="module")
def base(place):
    with quietly():
        tiny.network("llama").save_pretrained(place / "base")
    tiny.tokenizer().save_pretrained(place / "base")
    return load_model(place / "base", dtype="float32", device="cpu")


def written(base, out, schemes, **options):
    outline = outline_model(base.reference)
    components = find_components(outline.network)
    texts = {c.name: schemes[c.kind] for c in components if c.kind in schemes}
    plan = Plan({name: parse_scheme(text) for name, text in texts.items()})
    whole = sum(component.base_size_bytes for component in components)
    identity = {"reference": base.reference, "fingerprint": base.fingerprint}
    identity |= {"model_type": "llama", "config": {}}
    file = PlanFile(identity, texts, size_bytes(plan, components), whole)
    write_checkpoint(outline, file, out, **options)
    return out


@pytest.fixture(scope="module")
def mixed(base, place):
    return written(base, place / "mixed", MIXED)


@pytest.fixture
def copy(mixed, tmp_path):
    """A checkpoint to tamper with."""
    return shutil.copytree(mixed, tmp_path / "copy")


def checked(base, folder):
    file = read_plan(folder / PLAN)
    components = find_components(base.network, include=["*"])
    return {c.name: c for c in check_files(folder, base, file, file.plan(), components)}


def failed(base, folder):
    return {check.name: check.found for check in checked(base, folder).values() if not check.passed}


def edit(folder, change, name="config.json"):
    record = json.loads((folder / name).read_text())
    change(record)
    (folder / name).write_text(json.dumps(record))


def test_all_is_well(base, mixed):
    found = checked(base, mixed)
    assert list(found) == ["config", "files", "settings", "sizes"]
    assert all(check.passed for check in found.values())
    assert found["files"].found == "1 file of weights, no other"
    assert found["settings"].found == "of 4 schemes as planned"
    assert found["sizes"].found.endswith("of the format's own (+0.00%)")


def test_a_group_as_wide_as_a_matrix_is_a_channel(tmp_path):
    """One scheme, two settings: of qwen3's matrices q has 32 columns and o has 64."""
    with quietly():
        tiny.network("qwen3").save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", dtype="float32", device="cpu")
    folder = written(base, tmp_path / "out", {"q": "int4:g32", "o": "int4:g32"})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    strategies = {group["weights"]["strategy"] for group in config["config_groups"].values()}
    assert strategies == {"channel", "group"}
    assert failed(base, folder) == {}


def test_dense_weights_have_no_settings(base, tmp_path):
    dense = written(base, tmp_path / "dense", {"q": "int4:g8"}, dense=True)
    assert list(checked(base, dense)) == ["config", "files"]
    edit(dense, lambda plan: plan["components"].update({Q: "w8a8"}), PLAN)
    said = f"{Q} is planned as w8a8, and dense weights leave its inputs as they are"
    assert failed(base, dense) == {"settings": said}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(rms_norm_eps=1.0), "rms_norm_eps is 1.0, in the base 1e-06"),
        (lambda c: c.update(more=[1]), "more is [1], in the base None"),
        (lambda c: c.update(dtype="bfloat16"), "dtype is bfloat16, and the weights are float32"),
        (lambda c: c.update(dtype="nonsense"), "nonsense"),
        (lambda c: c.update(quantization_config=[1]), "'list' object"),
        (lambda c: c.pop("model_type"), "model_type"),
    ],
)
def test_an_edited_config(base, copy, change, said):
    edit(copy, change)
    assert said in failed(base, copy)["config"]


def test_scales_do_not_speak_for_the_dtype_of_the_weights(base, tmp_path):
    """nvfp4 has a float32 scale for each matrix of a bfloat16 checkpoint."""
    out = written(base, tmp_path / "out", {"q": "nvfp4"}, dtype=torch.bfloat16)
    assert "config" not in failed(base, out)
    edit(out, lambda c: c.update(dtype="float32"))
    assert failed(base, out)["config"] == "dtype is float32, and the weights are bfloat16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q: q.update(format="int-quantized"), "has format 'int-quantized'; expected 'mixed"),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "has kv_cache_scheme {'num_bits'"),
        (lambda q: q.update(sparsity_config={}), "has sparsity_config {}; expected None"),
        (lambda q: q["ignore"].remove("lm_head"), "does not name lm_head under ignore"),
        (lambda q: q["ignore"].append("re:.*mlp.*"), "names re:.*mlp.* under ignore"),
        (lambda q: group(q, "int", 4)["targets"].append("Linear"), "names Linear under targets"),
        (
            lambda q: group(q, "int", 4).update(output_activations=TOKENS),
            "other output_activations",
        ),
        (lambda q: group(q, "int", 4)["weights"].update(group_size=4), f"other weights for {Q} "),
        (lambda q: group(q, "float", 8).update(input_activations=None), "other input_activations"),
        (lambda q: q.update(quant_method="gptq"), "keeps its weights in the format 'gptq'"),
        (lambda q: q.update(config_groups=[]), "the installed compressed-tensors cannot read"),
    ],
)
def test_edited_settings(base, copy, change, said):
    edit(copy, lambda config: change(config["quantization_config"]))
    found = failed(base, copy)["settings"]
    assert said in found
    assert "donor" not in found


TOKENS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}


def group(config, kind, bits):
    """The group whose weights are so."""
    groups = config["config_groups"].values()
    return next(
        g for g in groups if (g["weights"]["type"], g["weights"]["num_bits"]) == (kind, bits)
    )


def test_a_shape_that_is_not_the_matrix(base, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors[f"{Q}.weight_shape"] = torch.tensor([16, 32])
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert failed(base, copy)["settings"] == f"{Q} is [16, 32] by its codes, in the base [32, 32]"


def test_weights_that_nobody_should_read(base, copy):
    (copy / "consolidated.safetensors").write_bytes(b"")
    said = "consolidated.safetensors holds weights that are not the checkpoint's; remove it"
    assert failed(base, copy) == {"files": said}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update({"lm_head.weight": "model-00009-of-00009.safetensors"}), None),
        (lambda m: m.pop("model.norm.weight"), "has model.norm.weight in None, and it lies in "),
        (lambda m: m.update(more=m["lm_head.weight"]), "has more in model-0000"),
    ],
)
def test_an_index_that_does_not_tell_where_tensors_lie(base, tmp_path, change, said):
    out = written(base, tmp_path / "out", MIXED, shard_bytes=20_000)
    found = checked(base, out)["files"]
    assert found.passed
    assert "files of weights, no other, as their index says" in found.found
    edit(out, lambda index: change(index["weight_map"]), "model.safetensors.index.json")
    found = failed(base, out)["files"]
    assert (said or "lacks 1 of the") in found


def test_an_index_beside_one_file(base, copy):
    (copy / "model.safetensors.index.json").write_text("{")
    assert "in None, and it lies in model.safetensors" in failed(base, copy)["files"]


def test_sizes_that_plan_json_does_not_have(base, copy):
    record = json.loads((copy / PLAN).read_text())
    for size, whole, said in (
        (record["size_bytes"] * 2, record["base_size_bytes"], "schemes take "),
        (1, 2, "schemes take more"),
    ):
        edit(copy, lambda p, s=size, w=whole: p.update(size_bytes=s, base_size_bytes=w), PLAN)
        found = failed(base, copy)
        assert found.keys() == {"sizes"}
        assert found["sizes"].startswith(f"plan.json promises {size} of {whole} bytes, and its ")
        assert said in found["sizes"]


def test_a_plan_made_in_another_dtype_promises_other_scales(base, tmp_path):
    """A sweep in bfloat16 counts scales of two bytes, and this checkpoint has four."""
    out = written(base, tmp_path / "out", {"q": "int4:g8", "up": "int4:g8"})
    components = find_components(base.network)
    plan = read_plan(out / PLAN).plan()
    n_scales = sum(c.n_parameters // 8 for c in components if c.name in plan.schemes)
    edit(out, lambda p: p.update(size_bytes=p["size_bytes"] - 2 * n_scales), PLAN)
    assert failed(base, out) == {}


def test_rows_that_do_not_fill_their_words(base, tmp_path):
    """Rows of 48 codes of 3 bits take 5 words of 32, and 4.5 would do."""
    out = written(base, tmp_path / "out", {"down": "int3"})
    assert checked(base, out)["sizes"].found.endswith("of the format's own (+0.00%)")


def test_nothing_to_read_is_said_and_not_raised(base, copy):
    (copy / "config.json").write_text("{")
    found = failed(base, copy)
    assert found.keys() == {"config", "settings"}
    assert all("config.json cannot be read as JSON" in said for said in found.values())
    (copy / "model.safetensors").unlink()
    found = failed(base, copy)
    assert found.keys() == {"config", "files"}
    assert "expected model.safetensors or model.safetensors.index.json" in found["files"]
