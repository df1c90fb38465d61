"""What identifies a model: SHA-256 over its weights, its config and its end-of-sequence ids."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# Config keys that say where a checkpoint came from or how it is run, not what it computes.
VOLATILE_CONFIG_KEYS = frozenset(
    {
        "_commit_hash",
        "_model_name_or_path",
        "_name_or_path",
        "dtype",
        "name_or_path",
        "torch_dtype",
        "transformers_version",
    }
)
_PIECE_BYTES = 64 * 2**20


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_fingerprint(
    weight_files: Sequence[Path], config: Mapping[str, object], eos_ids: Sequence[int]
) -> str:
    """A digest of weight files and config: of neither the folder nor the dtype that runs.

    The files count in the order given and without their names. End-of-sequence ids count because
    completions end there, and a checkpoint may keep them outside of its config.
    """
    pieces = [(path, start) for path in weight_files for start in _piece_starts(path)]
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter while it works
        digests = list(pool.map(_piece_digest, pieces))
    return _combined(digests, config, eos_ids)


def network_fingerprint(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, object], eos_ids: Sequence[int]
) -> str:
    """The same for a network in memory: over its tensors' names, dtypes, shapes and bytes."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: _tensor_digest(name, tensors[name]), sorted(tensors)))
    return _combined(digests, config, eos_ids)


def _piece_starts(path: Path) -> range:
    return range(0, max(path.stat().st_size, 1), _PIECE_BYTES)


def _piece_digest(piece: tuple[Path, int]) -> str:
    """The digest of one stretch of a file and of the place where it starts in it."""
    path, start = piece
    digest = hashlib.sha256(start.to_bytes(8, "little"))
    with path.open("rb") as file:
        file.seek(start)
        digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest()


def _tensor_digest(name: str, tensor: torch.Tensor) -> str:
    header = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
    digest = hashlib.sha256(header.encode())
    # Through bytes, because numpy knows neither bfloat16 nor the 8-bit floats.
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(data.numpy().data)
    return digest.hexdigest()


def _combined(digests: Iterable[str], config: Mapping[str, object], eos_ids: Sequence[int]) -> str:
    content = {
        "fingerprint": 1,  # the version of this recipe
        "weights": list(digests),
        "config": _without_volatile(config),
        "eos_ids": list(eos_ids),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _without_volatile(value: object) -> object:
    """A config without what does not change the function, in every sub-config too."""
    if isinstance(value, Mapping):
        kept = {
            str(key): item for key, item in value.items() if str(key) not in VOLATILE_CONFIG_KEYS
        }
        return {key: _without_volatile(item) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        return [_without_volatile(item) for item in value]
    return value
