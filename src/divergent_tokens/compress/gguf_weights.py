"""The matrices of a GGUF file by our names, dequantized one at a time."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.compress.components import Component
from divergent_tokens.errors import SchemeError

_SAME_ROWS = {
    "apertus": "apertus",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_oss": "gpt-oss",
    "llama4_text": "llama4",
    "nemotron": "nemotron",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "olmoe": "olmoe",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "seed_oss": "seed_oss",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""transformers' model types and GGUF's names for them, where llama.cpp's converter leaves all
matrices as [out, in] with their rows in order."""
_Q_AND_K_PERMUTED = {
    "arcee": "arcee",
    "granite": "granite",
    "llama": "llama",
    "ministral3": "mistral3",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo": "olmo",
    "smollm3": "smollm3",
}
"""Where it reorders the rows of q and k head by head (`LlamaModel.permute`)."""
_NAMES = _SAME_ROWS | _Q_AND_K_PERMUTED
_EXPERT = re.compile(r"\.experts\.\d+\.")


def gguf_architecture(model_type: str) -> gguf.MODEL_ARCH:
    """What the gguf library calls an architecture of transformers."""
    numbers = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    if _NAMES.get(model_type) not in numbers:
        raise SchemeError(
            f"how a GGUF keeps the matrices of {model_type!r} is not known here (known: "
            f"{', '.join(sorted(_NAMES))})"
        )
    return numbers[_NAMES[model_type]]


class GgufWeights:
    """An open GGUF file. Raises SchemeError, as all of its methods do."""

    def __init__(self, path: Path, reference: str) -> None:
        """Read the header; the file is mapped into memory, not read."""
        self._reference = reference
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise self._error(
                f"cannot be read as a GGUF file ({error}); download it again"
            ) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._architecture = str(self._value("general.architecture", "?"))
        if int(self._value("split.count", 1)) > 1:
            raise self._error(
                "is one of several files that a model was split into; join them first with "
                "`llama-gguf-split --merge FIRST OUT`"
            )
        names = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
        if self._architecture not in names:
            raise self._error(
                f"is of the architecture {self._architecture!r}, which the installed gguf library "
                "does not know; upgrade it"
            )
        n_blocks = int(self._value(f"{self._architecture}.block_count", 0))
        self._name_map = gguf.get_tensor_name_map(names[self._architecture], n_blocks)

    @property
    def activations(self) -> None:
        """Nothing: how the matrices of a GGUF are multiplied is its engine's affair."""

    def shape(self, component: Component) -> tuple[int, ...]:
        """Of the component in the file, [out, in]."""
        tensor = self._tensor(component)
        sizes = tuple(int(size) for size in reversed(tensor.shape))
        with self._decoding(component):  # the type is known or not, whatever the row
            gguf.dequantize(self._stored(component)[:1], tensor.tensor_type)
        return sizes[1:] if len(sizes) == 3 else sizes

    def size_bytes(self, component: Component) -> int:
        """Blocks with their scales, as they lie in the file."""
        return int(self._stored(component).nbytes)

    def read(self, component: Component) -> Tensor:
        """The component, dequantized to float32. [out, in]"""
        tensor = self._tensor(component)
        with self._decoding(component):
            values = gguf.dequantize(self._stored(component), tensor.tensor_type)
        matrix = torch.from_numpy(np.array(values, np.float32))  # a copy: the map is read-only
        n_heads = self._n_permuted_heads(tensor.name, component)
        if n_heads is None:
            return matrix
        pairs = matrix.view(n_heads, -1, 2, matrix.shape[1])  # [head, pair, half, in]
        return pairs.transpose(1, 2).reshape(matrix.shape)

    def _tensor(self, component: Component) -> Any:
        self._check_architecture(component)
        merged = _EXPERT.sub(".experts.", component.name)  # all experts of a part lie in one tensor
        name = self._name_map.get_name(merged)
        tensor = self._tensors.get(f"{name}.weight")
        if tensor is None and component.kind == "head":
            tensor = self._tensors.get("token_embd.weight")  # tied there
        if tensor is None or len(tensor.shape) != (2 if merged == component.name else 3):
            held = f"{name}.weight" if name else "any tensor that stands for it"
            raise self._error(f"has no {component.name} (expected {held}); exclude it")
        if component.expert is not None and component.expert >= tensor.shape[-1]:
            raise self._error(f"has {tensor.shape[-1]} experts, so no {component.name}; exclude it")
        return tensor

    def _stored(self, component: Component) -> NDArray[Any]:
        """Its blocks, row by row. [out, byte]"""
        data: NDArray[Any] = self._tensor(component).data
        return data if data.ndim == 2 else data[component.expert]

    def _check_architecture(self, component: Component) -> None:
        kind = component.model_type
        if kind not in _NAMES:
            raise self._error(
                f"is a GGUF, and how these keep the matrices of {kind!r} is not known here (known: "
                f"{', '.join(sorted(_NAMES))}); give the checkpoint's folder instead"
            )
        if _NAMES[kind] != self._architecture:
            raise self._error(
                f"is of the architecture {self._architecture!r}, and the base is {kind!r}; "
                f"expected {_NAMES[kind]!r}: only a version of the base can be a donor"
            )

    def _n_permuted_heads(self, tensor: str, component: Component) -> int | None:
        """How many heads' rows were reordered; None where they lie as the base has them."""
        if component.model_type not in _Q_AND_K_PERMUTED:
            return None
        counts = {".attn_q.": "head_count", ".attn_k.": "head_count_kv"}
        name = next((count for part, count in counts.items() if part in tensor), None)
        if name is None:
            return None
        prefix = f"{self._architecture}.attention."
        found = self._value(prefix + name, self._value(f"{prefix}head_count", None))
        if isinstance(found, list):  # a number for each layer
            found = found[component.layer or 0]
        return int(found)

    def _value(self, key: str, default: Any) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    @contextmanager
    def _decoding(self, component: Component) -> Iterator[None]:
        try:
            yield
        except NotImplementedError as error:
            name = self._tensor(component).tensor_type.name
            raise self._error(
                f"holds {component.name} in the type {name}, which the installed gguf library "
                "cannot dequantize; upgrade it, or requantize with another type"
            ) from error

    def _error(self, problem: str) -> SchemeError:
        return SchemeError(f"the donor {self._reference} {problem}")
