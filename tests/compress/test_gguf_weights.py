"""GGUF files of every type: what is read is what the gguf library decodes, in our order of rows."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import ggufs
import tiny
from divergent_tokens.compress.components import Component, find_components, weight_of
from divergent_tokens.compress.gguf_weights import GgufWeights
from divergent_tokens.errors import SchemeError

Type = gguf.GGMLQuantizationType
N_OUT, N_IN = 4, 512
COMPONENT = Component(
    "model.layers.0.mlp.up_proj",
    "up",
    0,
    (N_OUT, N_IN),
    torch.bfloat16,
    "model.layers.0.mlp.up_proj.weight",
    model_type="llama",
)


def _decodable() -> list[Type]:
    return [kind for kind in Type if kind in gguf.quants._type_traits or kind in (0, 1)]


def _file(path: Path, tensors: dict[str, np.ndarray], kind: Type, architecture: str) -> GgufWeights:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv([2, 1])  # a number for each layer
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    return GgufWeights(ggufs.finish(writer, path), path.name)


def _random(kind: Type, *rows: int) -> np.ndarray:
    """Bytes that decode to something."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    size = (*rows, N_IN // block * n_bytes)
    values = np.random.default_rng(int(kind)).integers(0, 60, size, dtype=np.uint8)
    types = {Type.F32: np.float32, Type.F16: np.float16}
    return values.view(types[kind]) if kind in types else values


@pytest.mark.parametrize("kind", _decodable(), ids=lambda kind: kind.name)
def test_every_type_that_the_library_decodes(kind: Type, tmp_path: Path) -> None:
    stored = _random(kind, N_OUT)
    weights = _file(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": stored}, kind, "llama")
    assert weights.shape(COMPONENT) == (N_OUT, N_IN)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert weights.size_bytes(COMPONENT) == N_OUT * N_IN // block * n_bytes
    found = weights.read(COMPONENT)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), gguf.dequantize(stored, kind))
    assert found.any()
    found += 1  # its own memory
    assert not torch.equal(found, weights.read(COMPONENT))


def test_q8_0_by_hand(tmp_path: Path) -> None:
    """A block: a float16 scale, here 0.5, and 32 codes of 8 bits."""
    block = np.concatenate([np.float16([0.5]).view(np.uint8), np.arange(-16, 16, dtype=np.int8)])
    stored = np.stack([block.astype(np.uint8)] * 2)
    weights = _file(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": stored}, Type.Q8_0, "llama")
    component = replace(COMPONENT, shape=(2, 32))
    assert weights.read(component).tolist() == [[i / 2 for i in range(-16, 16)]] * 2
    assert weights.size_bytes(component) == 2 * 34


def test_rows_of_q_and_k_go_back_to_their_places(tmp_path: Path) -> None:
    """llama.cpp puts row i of a head's second half beside row i of its first."""
    rows = np.repeat(np.arange(16, dtype=np.float32)[:, None], 8, axis=1)
    tensors = {f"blk.1.attn_{part}.weight": rows for part in "qkv"}
    weights = _file(tmp_path / "x.gguf", tensors, Type.F32, "llama")
    found = {}
    for part in "qkv":
        name = f"model.layers.1.self_attn.{part}_proj"
        component = replace(COMPONENT, name=name, layer=1, shape=(16, 8))
        found[part] = weights.read(component)[:, 0].int().tolist()
    assert found["q"] == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]  # 4 heads of 4
    assert found["k"] == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]  # 1 head of 16
    assert found["v"] == list(range(16))


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.IQ4_XS, Type.Q8_0])
def test_an_expert_is_a_slice_of_its_layer_s_tensor(kind: Type, tmp_path: Path) -> None:
    stored = _random(kind, 3, N_OUT)
    weights = _file(tmp_path / "x.gguf", {"blk.1.ffn_up_exps.weight": stored}, kind, "qwen3moe")
    for expert in range(3):
        component = replace(
            COMPONENT,
            name=f"model.layers.1.mlp.experts.{expert}.up_proj",
            layer=1,
            expert=expert,
            stack_index=expert,
            model_type="qwen3_moe",
        )
        assert weights.shape(component) == (N_OUT, N_IN)
        assert weights.size_bytes(component) == stored.nbytes // 3
        np.testing.assert_array_equal(
            weights.read(component).numpy(), gguf.dequantize(stored[expert], kind)
        )
    beyond = replace(component, name="model.layers.1.mlp.experts.3.up_proj", expert=3)
    with pytest.raises(
        SchemeError, match=r"has 3 experts, so no model\.layers\.1\.mlp\.experts\.3"
    ):
        weights.shape(beyond)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_mixed_file_as_quantizers_write_it(name: str, tmp_path: Path) -> None:
    network = tiny.network(name)

    def types(tensor: str) -> Type:
        if "attn" in tensor:
            return Type.Q8_0
        return Type.Q5_1 if "gate" in tensor or "up" in tensor else Type.F16

    path = ggufs.write(tmp_path / "x.gguf", name, network, types=types)
    weights = GgufWeights(path, "x.gguf")
    for component in find_components(network, include=["*"]):
        short = "attn" if ".self_attn." in component.name else component.name
        kind = types(short)
        expected = ggufs.decoded(weight_of(network, component), kind)
        assert torch.equal(weights.read(component), expected), component.name
        bits = {Type.Q8_0: 8.5, Type.Q5_1: 6, Type.F16: 16}[kind]
        assert weights.size_bytes(component) == component.n_parameters * bits / 8


def test_a_head_that_the_file_ties_to_its_embedding(tmp_path: Path) -> None:
    network = tiny.network("llama")
    path = ggufs.write(tmp_path / "x.gguf", "llama", network, leave_out="output")
    (head,) = find_components(network, include=["lm_head"])
    read = GgufWeights(path, "x.gguf").read(head)
    assert torch.equal(read, network.get_input_embeddings().weight)


# --- refused ---


def test_a_type_that_the_library_cannot_decode_is_named(tmp_path: Path) -> None:
    stored = np.ones((N_OUT, N_IN), np.float64)
    weights = _file(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": stored}, Type.F64, "llama")
    with pytest.raises(SchemeError, match=r"layers\.0\.mlp\.up_proj in the type F64.*requantize"):
        weights.shape(COMPONENT)


def test_architectures_that_are_not_known_are_refused(tmp_path: Path) -> None:
    stored = {"blk.0.ffn_up.weight": _random(Type.F32, N_OUT)}
    weights = _file(tmp_path / "x.gguf", stored, Type.F32, "bloom")
    with pytest.raises(SchemeError, match=r"matrices of 'bloom' is not known here.*folder instead"):
        weights.shape(replace(COMPONENT, model_type="bloom"))
    with pytest.raises(SchemeError, match="'nonesuch', which the installed gguf library"):
        _file(tmp_path / "y.gguf", stored, Type.F32, "nonesuch")


def test_files_that_are_cut_or_split_are_refused(tmp_path: Path) -> None:
    path = ggufs.write(tmp_path / "x.gguf", "llama", tiny.network("llama"))
    cut = tmp_path / "cut.gguf"
    for kept in (0, 3, 20, 200, path.stat().st_size - 1000):
        cut.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(SchemeError, match=r"cut\.gguf cannot be read as a GGUF.*download"):
            GgufWeights(cut, "cut.gguf")
    split = ggufs.write(tmp_path / "s.gguf", "llama", tiny.network("llama"), n_files=2)
    with pytest.raises(SchemeError, match=r"one of several files.*llama-gguf-split --merge"):
        GgufWeights(split, "s.gguf")


def test_a_name_that_gguf_has_no_tensor_for(tmp_path: Path) -> None:
    stored = {"blk.0.ffn_up.weight": _random(Type.F32, N_OUT)}
    weights = _file(tmp_path / "x.gguf", stored, Type.F32, "llama")
    with pytest.raises(SchemeError, match=r"has no model\.layers\.0\.odd \(expected any tensor"):
        weights.shape(replace(COMPONENT, name="model.layers.0.odd"))
