"""Files of a hub repository, downloaded into the hub's own cache."""

import json
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from divergent_tokens.errors import ModelError
from divergent_tokens.quiet import one_line, quietly

# All that a repository says about a model beside its weights. Code is only read, never run here.
_DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


def download_description(hub_id: str) -> Path:
    """The folder with a repository's config, tokenizer and weight index, but not its weights.

    Raises ModelError if there is no such repository, or if the hub cannot be reached and the files
    have not been downloaded before.
    """
    with quietly():
        return _snapshot(hub_id, _DESCRIPTION)


def download_weights(hub_id: str, folder: Path, *, allow_pickle: bool) -> tuple[str, ...]:
    """Download the weights that transformers will read into the folder of the description.

    Only those: repositories often hold them in several formats. Shows the hub's progress bar.
    Where there are none, the names of the pickles that the repository has instead.
    """
    for name in _SINGLE if allow_pickle else _SINGLE[:1]:
        index = folder / f"{name}.index.json"
        patterns = _shard_names(index) if index.is_file() else (name,)
        # The folder is named by its commit: config and weights come from the same one.
        _snapshot(hub_id, patterns, commit=folder.name)
        if index.is_file() or (folder / name).is_file():
            return ()
    return tuple(name for name in _file_names(hub_id, folder.name) if name.endswith(".bin"))


def _file_names(hub_id: str, commit: str) -> list[str]:
    """The files of a repository, if it can still be reached: they only make a message better."""
    try:
        with quietly():
            return huggingface_hub.HfApi().list_repo_files(hub_id, revision=commit)
    except Exception:
        return []


def _shard_names(index: Path) -> tuple[str, ...]:
    try:
        return tuple(sorted(set(json.loads(index.read_text())["weight_map"].values())))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weight files; download it again") from error


def _snapshot(hub_id: str, patterns: tuple[str, ...], commit: str | None = None) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=commit, allow_patterns=list(patterns)
        )
        return Path(folder)
    except hub_errors.GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated on the hub; accept its terms on its page there, and log in with "
            "`hf auth login`"
        ) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise ModelError(
            f"{hub_id} is neither a file or folder here nor a repository that you can read on the "
            "hub; check the name, or log in with `hf auth login` if it is private"
        ) from error
    except Exception as error:  # of the hub's library, of its HTTP client, of the disk
        raise ModelError(
            f"{hub_id} is not a file or folder here, and could not be downloaded from the hub "
            f"({one_line(error)}); check the name and the connection, or give a folder's path"
        ) from error
