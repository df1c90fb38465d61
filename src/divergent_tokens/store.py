"""Results on disk: arrays under a content key, and files that appear whole or not at all."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError

from divergent_tokens.errors import RecordError

_UNFINISHED = ".unfinished"
_DAY_SECONDS = 24 * 60 * 60


def default_cache() -> Path:
    """The folder for what can be made again: $XDG_CACHE_HOME, or what the system has for it."""
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        parent = Path(local) if local else Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        named = os.environ.get("XDG_CACHE_HOME", "")
        # The specification has relative paths ignored.
        parent = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"
    return parent / "divergent-tokens"


def content_key(**fields: Any) -> str:
    """A sha256 (hex) of everything that a result depends on; the order of the fields is free."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """What lies under one key: a header, and arrays that are mapped from disk and read only."""

    header: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def read_entry(cache: Path | None, key: str) -> Entry | None:
    """The entry under the key, or nothing; a damaged entry counts as nothing and is made again."""
    if cache is None:
        return None
    folder = cache / key
    try:
        header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
        names = header.pop("arrays")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Entry(header, arrays)


class EntryWriter:
    """An entry in the making; its folder gets its final name when everything is in it."""

    def __init__(self, folder: Path) -> None:
        """Write into `folder`, which is private to this writer."""
        self.folder = folder
        self.header: dict[str, Any] = {}
        self._names: list[str] = []

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A writable array mapped on disk, its room taken at once.

        A full disk is met here, as an OSError; writing into a hole of a mapped file would
        kill the process with a bus error instead.
        """
        path = self.folder / f"{name}.npy"
        array: NDArray[Any] = open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        if hasattr(os, "posix_fallocate") and array.nbytes:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self._names.append(name)
        return array

    def finish(self) -> None:
        """Write the header, last."""
        header = {**self.header, "arrays": self._names}
        (self.folder / "header.json").write_text(json.dumps(header), encoding="utf-8")


@contextmanager
def writing_entry(cache: Path, key: str) -> Iterator[EntryWriter]:
    """Write an entry that appears whole, or not at all when anything goes wrong on the way."""
    with clear_disk_errors(cache / key), replacing_folder(cache / key) as folder:
        writer = EntryWriter(folder)
        yield writer
        writer.finish()


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A fresh folder beside `target` that takes its name at the end; gone if the body fails.

    Then what was there before is there still.

    What the system says about the disk is raised as it is. Of two processes that write the same
    the later one wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target.parent)
    folder, old = _private_name(target), _private_name(target)
    folder.mkdir()
    try:
        yield folder
        while not _moved(folder, target):
            # To be replaced, damaged, or another process was quicker: ours is as good.
            with suppress(FileNotFoundError):  # a third process moved it away
                target.rename(old)
            try:
                if _moved(folder, target):
                    break
            except BaseException:
                with suppress(OSError):  # what was there stays, whole
                    old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _moved(folder: Path, target: Path) -> bool:
    """Rename a folder; False if there is one already that holds something."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _remove_stale(parent: Path) -> None:
    """Remove the folders that killed processes left unfinished more than a day ago."""
    for folder in parent.glob(f".*{_UNFINISHED}"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _DAY_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """A fresh file beside `target` that takes its name at the end; gone if the body fails."""
    with clear_disk_errors(target):
        if target.exists() and not target.is_file():  # /dev/stdout, a pipe: nothing to replace
            yield target
            return
        path = _private_name(target)
        path.touch(exist_ok=False)
        try:
            yield path
            path.replace(target)
        finally:
            path.unlink(missing_ok=True)


def _private_name(target: Path) -> Path:
    """A name beside the target that nobody else has; what is made there obeys the umask."""
    return target.with_name(f".{target.name[:16]}-{secrets.token_hex(6)}{_UNFINISHED}")


def write_text(target: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with replacing_file(target) as path:
        path.write_text(text, encoding="utf-8")


def check_writable(target: Path) -> None:
    """Raise RecordError at once where `target` could not be written after an hour's work."""
    if target.is_dir():
        raise RecordError(f"{target} is a folder; name the file to write")
    if target.exists() and not target.is_file():  # written through, see replacing_file
        if not os.access(target, os.W_OK):
            raise RecordError(f"{target} cannot be written to; name another")
        return
    if not target.parent.is_dir():
        raise RecordError(f"the folder {target.parent} does not exist; make it first")
    if not os.access(target.parent, os.W_OK):
        raise RecordError(f"the folder {target.parent} cannot be written to; name another")


@contextmanager
def clear_disk_errors(target: Path) -> Iterator[None]:
    """Turn what the system says about a disk into a message that names the file."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise RecordError(
            f"could not write {target}: {error.strerror or error}; nothing was left half written. "
            + ("Free some room or choose another place" if full else "Choose another place")
        ) from error
    except SafetensorError as error:  # what it makes of a full disk
        raise RecordError(
            f"could not write {target}: {error}; nothing was left half written. Free some room or "
            "choose another place"
        ) from error
