"""Checkpoints: what plain transformers makes of them, and that none is ever half written."""

import errno
import hashlib
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tiny
from divergent_tokens.compress import checkpoint
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.checkpoint import check_for, write_checkpoint
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.compress.packed import quantization_config
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


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
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


def test_what_is_written_is_let_go_of(bases, tmp_path, monkeypatch):
    """Tensors wait for their shard, the largest in room of their own, and nobody else has them."""
    told, room = [], []

    def noted(modules, dense):
        told.extend(modules.values())
        return quantization_config(modules, dense)

    def saved(tensors, *arguments):
        room.append(
            sum(
                {
                    t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in tensors.values()
                }.values()
            )
        )
        save_file(tensors, *arguments)

    monkeypatch.setattr(checkpoint, "quantization_config", noted)
    monkeypatch.setattr(checkpoint, "save_file", saved)
    monkeypatch.setattr(checkpoint, "_SLAB_BYTES", 2_000)
    write(bases("llama"), "int8", tmp_path / "out", shard_bytes=40_000)
    assert len(told) == 14
    assert not any(packed.tensors for packed in told)
    assert max(room) < 2 * 40_000
    assert_as_planned(bases("llama"), tmp_path / "out")


def test_a_base_in_shards(bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases("llama"), folder)
    (folder / "model.safetensors").unlink()
    with quietly():
        tiny.network("llama").save_pretrained(folder, max_shard_size="20KB")
    write(folder, "int8", tmp_path / "out")
    assert_as_planned(folder, tmp_path / "out")


def test_the_model_card_names_the_base_by_how_it_was_called(bases, tmp_path):
    outline, file = plan_of(bases("llama"), "int8")
    write_checkpoint(outline, file, tmp_path / "a")
    assert "base_model" not in (tmp_path / "a" / "README.md").read_text()
    write_checkpoint(replace(outline, reference="org/model"), file, tmp_path / "b")
    assert "base_model: org/model\n" in (tmp_path / "b" / "README.md").read_text()


# --- golden bytes ---

GOLDEN_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "vocab_size": tiny.VOCABULARY,
}
GOLDEN = {
    "README.md": "c9fc642912b7ad2a2f39fa0fd3c367a79ba9593abd5fd3f3bdda91ce84ce76de",
    "config.json": "63bb6a419ce7e241c7010bc8d78d72382dcea05faf42cff36040f75845e842d1",
    "model.safetensors": "b067c7a6bbe6b19c9712fff3e0a71d95a09f4baf83a6b582173d4afcc52d535a",
    "plan.json": "dfff6e0822dc01fcf72650783a6838c5f2dcb51fc9ce33400947214827102499",
}


def golden_base(folder):
    """Of numbers that no library has a say in: multiples of 1/64."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GOLDEN_CONFIG))
    tiny.tokenizer().save_pretrained(folder)
    tensors = {}
    for i, (name, tensor) in enumerate(outline_network(folder).state_dict().items()):
        steps = torch.arange(tensor.numel()) * (37 + 2 * i) % 127 - 63
        tensors[name] = (steps / 64).reshape(tensor.shape).bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def outline_network(folder):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_golden_bytes(tmp_path):
    """The same base and plan give the same files, whatever machine writes them."""
    folder = golden_base(tmp_path / "base")
    schemes = {"q": "int4:g8", "k": "int4:g8", "v": "int4:g8", "up": "w8a8", "gate": "w8a8"}
    schemes |= {"o": "fp8", "down": "int8:tensor"}
    outline, file = plan_of(folder, lambda c: schemes.get(c.kind))
    file = replace(file, base={**file.base, "reference": "org/model"})
    write_checkpoint(replace(outline, reference="org/model"), file, tmp_path / "out")
    assert_as_planned(folder, tmp_path / "out", torch.bfloat16)
    left = {path.name: path for path in (tmp_path / "out").iterdir()}
    for path in folder.iterdir():  # what is written anew is golden, the rest is copied
        if path.name not in GOLDEN:
            assert left.pop(path.name).read_bytes() == path.read_bytes(), path.name
    text = left["config.json"].read_text()
    assert text == json.dumps(json.loads(text), indent=2) + "\n"
    found = {name: path.read_bytes() for name, path in left.items()}
    found["config.json"] = json.dumps(without_nothing(json.loads(text))).encode()
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == GOLDEN


def without_nothing(value):
    """Some versions of compressed-tensors write the settings that they do not use, as null."""
    if not isinstance(value, dict):
        return value
    return {k: without_nothing(v) for k, v in value.items() if v is not None and v != {}}


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
        ("mamba2", "int8", {}, "out_proj .*transformers sets the weight"),
        ("llama", "w8a8", {"dense": True}, "which dense weights cannot say"),
    ],
)
def test_what_would_be_loaded_wrongly(bases, tmp_path, architecture, scheme, options, said):
    with pytest.raises(SchemeError, match=said):
        write(bases(architecture), scheme, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_experts_in_one_tensor_are_written_dense_alone(bases, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(bases("qwen3-moe"), folder)
    fused = {k: v.contiguous() for k, v in tiny.network("qwen3-moe").state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    save_file(fused, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        SchemeError, match=r"experts\.0\.gate_proj.*with the other experts.*--dense"
    ):
        write(folder, "int8", tmp_path / "out")
    write(folder, "int8", tmp_path / "out", dense=True)
    assert_as_planned(folder, tmp_path / "out")


def test_a_step_of_the_trail_that_holds_something_else(bases, tmp_path):
    outline, file = plan_of(bases("llama"), "int8")
    file = replace(file, trail=({"step": "measured", "metrics": {}},))
    with pytest.raises(RecordError, match="'measured' of the plan's trail does not hold"):
        write_checkpoint(outline, file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_never_overwritten(bases, tmp_path):
    shutil.copytree(bases("llama"), tmp_path / "base")
    outline, file = plan_of(tmp_path / "base", "int8")
    (tmp_path / "base" / "plan.json").write_text("{}")
    for out in (tmp_path / "base", tmp_path):
        (out / "plan.json").write_text("{}")
        with pytest.raises(RecordError, match="which is read; name another"):
            write_checkpoint(outline, file, out, overwrite=True)
    assert outline_model(tmp_path / "base").fingerprint == outline.fingerprint


def test_a_base_that_is_compressed_already(bases, tmp_path):
    write(bases("llama"), "int8", tmp_path / "once")
    with pytest.raises(ModelError, match="is compressed already"):
        write(tmp_path / "once", "int4", tmp_path / "twice")


@pytest.mark.parametrize("name", ["sweep.db", "thesis.txt", "results"])
def test_what_is_not_of_a_checkpoint_is_never_replaced(bases, tmp_path, name):
    out = tmp_path / "out"
    write(bases("llama"), "int8", out)
    (out / name).mkdir() if name == "results" else (out / name).write_text("mine")
    with pytest.raises(RecordError, match=f"what no checkpoint of ours has \\({name}\\)"):
        write(bases("llama"), "int4", out, overwrite=True)
    assert (out / name).exists()


def test_the_folder_that_one_is_in_is_never_replaced(bases, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(bases("llama"), "int8", out)
    monkeypatch.chdir(out)
    with pytest.raises(RecordError, match="is the folder that you are in"):
        write(bases("llama"), "int4", Path(), overwrite=True)


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


@pytest.fixture
def small_disk():
    """A function that lets no file grow beyond so many bytes."""
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the error alone
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_no_room_for_the_weights(bases, tmp_path, small_disk):
    """The system's own error, which reaches us through the library that writes them."""
    out = tmp_path / "out"
    write(bases("llama"), "int8", out)
    old = contents(out)
    small_disk(20_000)
    with pytest.raises(RecordError, match=r"could not write .*out: .*nothing was left half"):
        write(bases("llama"), "int4", out, overwrite=True)
    assert contents(out) == old
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
