"""Checkpoints: what plain transformers makes of them, and that none is ever half written."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from divergent_tokens.compress import checkpoint
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.checkpoint import check_for, write_checkpoint
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.compress.plan_file import PlanFile, read_plan
from divergent_tokens.errors import ModelError, RecordError, SchemeError
from divergent_tokens.models import load_model, outline_model
from divergent_tokens.quiet import quietly


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Architecture -> a saved base."""
    place = tmp_path_factory.mktemp("bases")

    def saved(architecture, dtype=torch.float32):
        folder = place / f"{architecture}-{dtype}"
        if not folder.is_dir():
            with quietly():
                tiny.network(architecture).to(dtype).save_pretrained(folder)
            tiny.tokenizer().save_pretrained(folder)
            (folder / "chat_template.jinja").write_text("{{ messages }}")
        return folder

    return saved


def plan_of(folder, scheme, *, include=()):
    """The scheme for all components, or one for each by a function."""
    outline = outline_model(folder)
    components = find_components(outline.network, include=include)
    schemes = {c.name: scheme(c) if callable(scheme) else scheme for c in components}
    base = {
        "reference": str(folder),
        "fingerprint": outline.fingerprint,
        "model_type": outline.network.config.model_type,
        "config": {},
    }
    return outline, PlanFile(base, {k: v for k, v in schemes.items() if v}, 1, 2)


def write(folder, scheme, out, *, include=(), **options):
    outline, file = plan_of(folder, scheme, include=include)
    return write_checkpoint(outline, file, out, **options)


def planned(folder, out, dtype=torch.float32):
    """The state of the base under the plan that lies in the checkpoint, in memory."""
    model = load_model(folder, dtype=dtype, device="cpu")
    components = find_components(model.network, include=["*"])
    with lent_plan(model, read_plan(out / "plan.json").plan(), components=components) as lent:
        return {name: tensor.clone() for name, tensor in lent.network.state_dict().items()}


def reloaded(out, ids=(5, 6, 7)):
    """By plain transformers: every tensor, and the logits of some tokens."""
    with quietly():
        network, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        with torch.no_grad():
            logits = network.eval()(torch.tensor([ids])).logits
    assert not any(info.values()), info
    return network.state_dict(), logits


def assert_as_planned(folder, out, dtype=torch.float32):
    state, _ = reloaded(out)
    for name, tensor in planned(folder, out, dtype).items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


# --- packed ---


@pytest.mark.parametrize("scheme", ["int8", "int4:g8", "int3", "w8a8", "fp8", "int8:tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_reloaded_as_planned(bases, tmp_path, scheme, dtype):
    folder = bases("llama", dtype)
    write(folder, scheme, tmp_path / "out")
    assert_as_planned(folder, tmp_path / "out", dtype)


@pytest.mark.parametrize("scheme", ["nvfp4", "magnitude:0.5+int4:g16"])
def test_in_bfloat16_alone(bases, tmp_path, scheme):
    folder = bases("llama", torch.bfloat16)
    write(folder, scheme, tmp_path / "out")
    assert_as_planned(folder, tmp_path / "out", torch.bfloat16)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gemma2", "cohere", "opt", "granite"])
def test_other_architectures(bases, tmp_path, architecture):
    folder = bases(architecture)
    write(folder, "int4:g8", tmp_path / "out")
    assert_as_planned(folder, tmp_path / "out")


def test_a_mixed_plan_with_dense_and_pruned_parts(bases, tmp_path):
    by_kind = {"q": "int8", "k": "int8", "v": "w8a8", "up": "int4:g8", "down": "magnitude:0.5"}
    write(bases("llama"), lambda c: by_kind.get(c.kind), tmp_path / "out")
    assert_as_planned(bases("llama"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {name.rpartition(".")[2] for name in config["ignore"]} == {
        "lm_head",
        "o_proj",
        "gate_proj",
        "down_proj",
    }


@pytest.mark.parametrize("scheme", ["int8", "int4:g8"])
def test_a_mixture_of_experts_with_one_scheme_for_all(bases, tmp_path, scheme):
    def mixed(component):
        return scheme if component.kind == "expert" else "int8:tensor"

    write(bases("qwen3-moe"), mixed, tmp_path / "out")
    assert_as_planned(bases("qwen3-moe"), tmp_path / "out")


def test_inputs_are_quantized_as_in_memory(bases, tmp_path):
    folder = bases("llama")
    write(folder, "w8a8", tmp_path / "out")
    model = load_model(folder, device="cpu")
    plan = read_plan(tmp_path / "out" / "plan.json").plan()
    with torch.no_grad(), lent_plan(model, plan) as lent:
        wanted = lent.network(torch.tensor([[5, 6, 7]])).logits
    assert torch.allclose(reloaded(tmp_path / "out")[1], wanted, atol=1e-5)


def test_in_another_dtype(bases, tmp_path):
    write(bases("llama"), "int8", tmp_path / "out", dtype=torch.bfloat16)
    state, _ = reloaded(tmp_path / "out")
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.bfloat16}
    wanted = planned(bases("llama"), tmp_path / "out", torch.bfloat16)
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


# --- dense ---


@pytest.mark.parametrize("architecture", sorted(set(tiny.CONFIGS) - {"mamba2"}))
def test_any_plan_is_written_dense(bases, tmp_path, architecture):
    write(bases(architecture), "magnitude:0.3+int4", tmp_path / "out", dense=True)
    assert_as_planned(bases(architecture), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_experts_of_many_schemes_and_the_ends_dense(bases, tmp_path):
    def one_by_one(component):
        return "int3" if component.expert == 1 else "int8:tensor" if component.is_end else None

    write(bases("gpt-oss"), one_by_one, tmp_path / "out", include=["*"], dense=True)
    assert_as_planned(bases("gpt-oss"), tmp_path / "out")


# --- what else lies there ---


def test_everything_that_belongs_to_it(bases, tmp_path):
    found = write(bases("llama"), "int8", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "plan.json", "README.md"}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names >= {"generation_config.json"}
    text = tiny.SENTENCES[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text).input_ids == tiny.tokenizer()(text).input_ids
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert found.size_bytes == sum(t.numel() * t.itemsize for t in tensors.values())
    assert found.size_bytes < found.base_size_bytes
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_shards_with_an_index(bases, tmp_path):
    found = write(bases("llama"), "int8", tmp_path / "out", shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    n = found.n_files
    assert n > 2
    assert files == [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == found.size_bytes
    assert_as_planned(bases("llama"), tmp_path / "out")


def test_a_base_in_shards(bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases("llama"), folder)
    (folder / "model.safetensors").unlink()
    with quietly():
        tiny.network("llama").save_pretrained(folder, max_shard_size="20KB")
    write(folder, "int8", tmp_path / "out")
    assert_as_planned(folder, tmp_path / "out")


def test_the_model_card(bases, tmp_path):
    outline, file = plan_of(bases("llama"), "int8")
    estimate = {"value": 0.0123456, "low": 0.01, "high": 0.02}
    step = {
        "step": "measured",
        "prompts": {"n_prompts": 32, "new_tokens": 64},
        "metrics": {"kl": estimate, "sdt": estimate},
    }
    base = {**file.base, "reference": "org/model"}
    file = PlanFile(base, file.components, 50, 100, (step,))
    write_checkpoint(outline, file, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    front = card.split("---\n")[1].splitlines()
    assert "base_model: org/model" in front
    assert "base_model_relation: quantized" in front
    assert "- compressed-tensors" in front
    assert "| KL, nats per token | 0.0123 | 0.01 to 0.02 |" in card
    assert "| SDT, share of divergent tokens | 1.23% | 1.00% to 2.00% |" in card
    assert "on 32 prompts" in card
    assert "50.0 % of the bytes" in card


def test_golden_bytes(bases, tmp_path):
    """The same base and plan give the same files, whatever wrote them before."""
    write(bases("llama"), "int4:g8", tmp_path / "one")
    write(bases("llama"), "int4:g8", tmp_path / "two")
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
    assert digest.hexdigest() == "1057a507343d1895de614e6139be1123a5355f274a4f9084317e71a2dfa24300"


# --- refused ---


def test_a_plan_of_another_base(bases, tmp_path):
    outline, file = plan_of(bases("llama"), "int8")
    with pytest.raises(RecordError, match="the plan was made for"):
        write_checkpoint(outline_model(bases("qwen3")), file, tmp_path / "out")
    unknown = PlanFile(file.base, {"model.layers.9.mlp.up_proj": "int8"}, 1, 2)
    with pytest.raises(SchemeError, match=r"layers\.9\.mlp\.up_proj.*is no component"):
        write_checkpoint(outline, unknown, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "scheme", "options", "said"),
    [
        ("gpt2", "int8", {}, "transformers would not load this plan rightly: .*Conv1D.*7 more"),
        ("llama", "int6", {"target": Coupling.vllm}, "vllm would not load this plan rightly"),
        ("qwen3-moe", "fp8", {}, "from packed integers alone"),
        ("llama", "w8a8", {"dense": True}, "which dense weights cannot say"),
    ],
)
def test_what_would_be_loaded_wrongly(bases, tmp_path, architecture, scheme, options, said):
    with pytest.raises(SchemeError, match=said):
        write(bases(architecture), scheme, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_compressed_already(bases, tmp_path):
    write(bases("llama"), "int8", tmp_path / "once")
    with pytest.raises(ModelError, match="is compressed already"):
        write(tmp_path / "once", "int4", tmp_path / "twice")


def test_a_folder_that_holds_something(bases, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(bases("llama"), "int8", out)  # empty: fine
    with pytest.raises(RecordError, match="is not empty"):
        write(bases("llama"), "int4", out)
    write(bases("llama"), "int4", out, overwrite=True)
    assert set(read_plan(out / "plan.json").components.values()) == {"int4"}
    (out / "plan.json").unlink()
    with pytest.raises(RecordError, match="something else than a checkpoint of ours"):
        write(bases("llama"), "int8", out, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="is a file; name a folder"):
        write(bases("llama"), "int8", tmp_path / "file")


def test_what_another_server_says(bases):
    outline, file = plan_of(bases("llama"), "int6")
    assert check_for(outline, file.plan(), Coupling.transformers) == ()
    assert len(check_for(outline, file.plan(), Coupling.vllm)) == 14


# --- never half ---


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_error_at_any_file_leaves_the_old_folder_or_the_new(bases, tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    write(bases("llama"), "int8", out, shard_bytes=20_000)
    old = contents(out)
    write(bases("llama"), "int4", tmp_path / "new", shard_bytes=20_000)
    new = contents(tmp_path / "new")
    calls = {"n": 0, "stop": 0}

    def failing(function):
        def call(*arguments, **options):
            calls["n"] += 1
            if calls["n"] == calls["stop"]:
                raise error
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(checkpoint, "save_file", failing(checkpoint.save_file))
    monkeypatch.setattr(checkpoint.shutil, "copyfile", failing(shutil.copyfile))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    n_stopped = 0
    while True:
        calls["n"], calls["stop"] = 0, calls["stop"] + 1
        try:
            write(bases("llama"), "int4", out, overwrite=True, shard_bytes=20_000)
        except (KeyboardInterrupt, RecordError):
            n_stopped += 1
            assert contents(out) in (old, new), calls["stop"]
        else:
            break
    assert n_stopped > 10
    assert contents(out) == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]
