"""The files of a checkpoint: found here or on the hub, and checked before anything is loaded."""

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from divergent_tokens.errors import ModelError
from divergent_tokens.gguf_files import DEMO, MAGIC
from divergent_tokens.hub import download_description, download_weights

_SAFE, _SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE, _PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PICKLE_ENDINGS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
_TOKENIZER_PATTERNS = (
    "tokenizer.json",
    "tekken.json",
    "vocab.*",
    "*.tiktoken",
    "*.model",
    "tokenization*.py",
)
_LFS = b"version https://git-lfs"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_model(reference: str) -> Path:
    """The folder or GGUF file of a reference; a hub id's config and tokenizer are downloaded.

    Raises ModelError when there is none, with close names if the parent folder has any.
    """
    if not reference.strip():
        raise ModelError(
            "the reference of a model is empty; expected the folder of a checkpoint, a .gguf "
            f"file, a hub id or {DEMO}"
        )
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf" or _first_bytes(path, len(MAGIC)) == MAGIC:
            return path
        raise ModelError(
            f"{reference} is a file, but not a GGUF; expected the folder of a checkpoint, a .gguf "
            f"file, a hub id or {DEMO}"
        )
    if reference.startswith("demo:"):
        raise ModelError(f"{reference} is not known; the only demo model is {DEMO}")
    looks_local = path.is_absolute() or reference.startswith((".", "~")) or "\\" in reference
    if looks_local or path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(reference):
        raise ModelError(
            f"{reference} does not exist; expected the folder of a checkpoint, a .gguf file, a hub "
            f"id or {DEMO}{_close_names(path)}"
        )
    try:
        return download_description(reference)
    except ModelError as error:
        raise ModelError(f"{error}{_close_names(path)}") from error


def read_config(folder: Path, reference: str) -> dict[str, Any]:
    """The checkpoint's config.json; ModelError if it is missing or not a JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{reference} has no config.json{_what_it_is_instead(folder)}")
    config = _read_json(file)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{reference} holds an adapter beside its weights (adapter_config.json), and a whole "
            "model is expected; merge it first (peft: `merge_and_unload`)"
        )
    return config


def find_tokenizer(folder: Path, reference: str) -> None:
    """Nothing; ModelError if the folder has no file that could hold a vocabulary."""
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_PATTERNS):
        raise ModelError(
            f"{reference} has no tokenizer (no tokenizer.json, tokenizer.model, vocab.json, ...); "
            "copy the tokenizer's files from the model that it was made from into the folder"
        )


def find_weights(
    folder: Path, reference: str, config: Mapping[str, Any], *, allow_pickle: bool
) -> tuple[Path, ...]:
    """The weight files that transformers will read, in order, each present and whole.

    A hub id's weights are downloaded. Raises ModelError for missing shards, truncated files, and
    pickles unless `allow_pickle`.
    """
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_ENDINGS)
    if not Path(reference).expanduser().is_dir():
        pickles.extend(download_weights(reference, folder, allow_pickle=allow_pickle))
    entry = _weights_entry(folder, config, allow_pickle=allow_pickle)
    if entry is None:
        raise _no_weights(folder, reference, pickles, allow_pickle=allow_pickle)
    files = _shards(entry, reference) if entry.suffix == ".json" else (entry,)
    for file in files:
        _check_whole(file)
    return files


def _weights_entry(folder: Path, config: Mapping[str, Any], *, allow_pickle: bool) -> Path | None:
    """The weight file, or the index of several, by the order in which transformers looks."""
    named = config.get("transformers_weights")
    names = [str(named)] if named else [_SAFE, _SAFE_INDEX]
    if allow_pickle:
        names += [_PICKLE, _PICKLE_INDEX]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _no_weights(
    folder: Path, reference: str, pickles: list[str], *, allow_pickle: bool
) -> ModelError:
    if pickles and not allow_pickle:
        return ModelError(
            f"{reference} has its weights only as pickle ({', '.join(pickles[:3])}), which can run "
            "code when read; expected safetensors: convert them, or, if you trust their author, "
            "pass --allow-pickle (allow_pickle=True) to a command that runs the model"
        )
    others = pickles + sorted(file.name for file in folder.glob("*.safetensors"))
    expected = f"{_SAFE} or {_SAFE_INDEX}" + (f", {_PICKLE} or its index" if allow_pickle else "")
    return ModelError(
        f"{reference} has a config, but its weights are missing: expected {expected}, found "
        f"{', '.join(others[:3]) or 'none'}; download the checkpoint again"
    )


def _shards(index: Path, reference: str) -> tuple[Path, ...]:
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index} has no weight_map, the table of tensors; download it again")
    files = tuple(index.parent / name for name in sorted(set(names.values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{reference} lacks {len(missing)} of the {len(files)} weight files that {index.name} "
            f"names: {', '.join(missing[:3])}; download them again"
        )
    return files


def _check_whole(file: Path) -> None:
    """A safetensors file's header must cover the file to its last byte."""
    size_bytes = file.stat().st_size
    if _first_bytes(file, len(_LFS)) == _LFS:
        raise ModelError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull`")
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{file} is truncated or corrupt ({error}; it has {size_bytes} bytes); expected a "
            "whole safetensors file: download it again"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ModelError(
            f"{file} cannot be read as JSON ({error}); download it again or repair it"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a JSON {type(content).__name__}; expected an object")
    return content


def _first_bytes(file: Path, n_bytes: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(n_bytes)


def _what_it_is_instead(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f", but a GGUF file; name the file itself: {ggufs[0]}"
    if (folder / "adapter_config.json").is_file():
        return ": it is an adapter; merge it into its base first (peft: `merge_and_unload`)"
    inner = sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())
    if inner:
        return f", but folders that have one; name one of them: {', '.join(inner[:3])}"
    return "; expected the folder of a checkpoint as transformers writes it"


def _close_names(path: Path) -> str:
    parent = path.parent
    names = [child.name for child in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names)
    return f"; did you mean {' or '.join(str(parent / name) for name in close)}?" if close else ""
