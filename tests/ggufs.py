"""GGUF files of tiny networks, written as llama.cpp's converter does, names and all by hand."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

Type = gguf.GGMLQuantizationType

_LLAMA = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_GPT2 = {
    "transformer.wte": "token_embd",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
NAMES = {
    "llama": ("llama", _LLAMA),
    "llama-padded": ("llama", _LLAMA),
    "granite": ("granite", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "qwen3-moe": ("qwen3moe", _LLAMA),
    "gemma2": ("gemma2", _LLAMA),
    "gemma3": ("gemma3", _LLAMA),
    "cohere": ("command-r", _LLAMA),
    "gpt-oss": ("gpt-oss", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
}
"""Of each tiny network, GGUF's name of its architecture, and of its matrices."""
_PERMUTED = ("llama", "granite")


def write(
    path: Path,
    name: str,
    network: PreTrainedModel,
    *,
    types: Callable[[str], Type] = lambda name: Type.F32,
    architecture: str | None = None,
    leave_out: str = "",
    n_files: int = 1,
) -> Path:
    """Write a tiny network's matrices; `types` says what each GGUF tensor is quantized to."""
    own, names = NAMES[name]
    config = network.config
    writer = gguf.GGUFWriter(path, architecture or own)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    kv = getattr(config, "num_key_value_heads", None)
    if kv is not None:
        writer.add_head_count_kv(kv)
    if n_files > 1:
        writer.add_uint16("split.count", n_files)
    heads = {"attn_q": config.num_attention_heads, "attn_k": kv} if own in _PERMUTED else {}
    for tensor_name, tensor in matrices(network, names).items():
        if leave_out and leave_out in tensor_name:
            continue
        n_heads = heads.get(tensor_name.rpartition(".")[2])
        stored = permuted(tensor, n_heads) if n_heads else tensor
        add(writer, f"{tensor_name}.weight", stored, types(tensor_name))
    return finish(writer, path)


def matrices(network: PreTrainedModel, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Every matrix as [out, in], experts as [expert, out, in], by GGUF's name."""
    found = {}
    for name, tensor in network.state_dict().items():
        stem = name.removesuffix(".weight")
        if tensor.ndim < 2 or "bias" in name or "conv" in name or "wpe" in name:
            continue
        transposed = network.config.model_type == "gpt_oss" and "experts" in name
        transposed |= network.config.model_type == "gpt2" and ".c_" in name
        tensor = tensor.transpose(-1, -2) if transposed else tensor
        parts = {stem: tensor}
        if stem.endswith("gate_up_proj"):
            base = stem.removesuffix("gate_up_proj")
            half = tensor.shape[1] // 2
            gate, up = tensor[:, :half], tensor[:, half:]
            if network.config.model_type == "gpt_oss":
                gate, up = tensor[:, ::2], tensor[:, 1::2]
            parts = {f"{base}gate_proj": gate, f"{base}up_proj": up}
        for part, piece in parts.items():
            short = re.sub(r"^(model\.layers|transformer\.h)\.(\d+)\.(.*)", r"\2 \3", part)
            layer, _, rest = short.rpartition(" ")
            if part == "lm_head" and network.config.tie_word_embeddings:
                continue
            found[f"blk.{layer}.{names[rest]}" if layer else names[rest]] = piece
    return found


def permuted(weight: Tensor, n_heads: int) -> Tensor:
    """The order of rows in which llama.cpp keeps the q and k of a Llama."""
    rows, columns = weight.shape
    halves = weight.reshape(n_heads, 2, rows // n_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: Type) -> None:
    values = tensor.detach().float().contiguous().numpy()
    writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decoded(tensor: Tensor, kind: Type) -> Tensor:
    """What comes back after quantizing to a ggml type, row by row."""
    stored = gguf.quantize(tensor.detach().float().contiguous().numpy(), kind)
    return torch.from_numpy(np.array(gguf.dequantize(stored, kind)))
