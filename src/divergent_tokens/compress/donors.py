"""A component taken from a finished checkpoint of the same architecture, whatever tool made it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from divergent_tokens import gguf_files, model_files
from divergent_tokens.compress.checkpoint_weights import CheckpointWeights
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.formats import PerToken
from divergent_tokens.compress.gguf_weights import GgufWeights
from divergent_tokens.errors import ModelError, SchemeError
from divergent_tokens.fingerprints import checkpoint_fingerprint, file_digest


class _Weights(Protocol):
    """What a checkpoint holds, by our components; raises SchemeError for what it does not."""

    def shape(self, component: Component) -> tuple[int, ...]:
        """Of the component there, [out, in]."""

    def size_bytes(self, component: Component) -> int:
        """What it takes in the file."""

    @property
    def activations(self) -> PerToken | None:
        """What is done to the inputs of all that is quantized there."""

    def read(self, component: Component) -> Tensor:
        """It, decoded to floats. [out, in]"""


@dataclass(frozen=True)
class Donor:
    """`from:PATH`: the component as another checkpoint has it.

    PATH is a GGUF file of any ggml type, the folder or hub id of a checkpoint with dense or
    compressed-tensors weights, or `demo:smollm2`. It is not touched before `check`; a component is
    read when it is asked for, so that a donor of any size needs room for one matrix only.
    """

    path: str

    def __str__(self) -> str:
        """The text; whatever comes after the first colon is the path."""
        return f"from:{self.path}"

    def check(self, components: Sequence[Component]) -> None:
        """Refuse a donor of another architecture, or that lacks one of the components."""
        weights = self._weights
        for component in components:
            shape = weights.shape(component)
            if shape != component.shape:
                raise SchemeError(
                    f"the donor {self.path} has {component.name} as {list(shape)}, and the base as "
                    f"{list(component.shape)}; expected a version of the base"
                )

    @property
    def by_rows(self) -> bool:
        """False: which matrix it is decides what comes out."""
        return False

    @property
    def activations(self) -> PerToken | None:
        """What the donor itself does to the inputs of all that it has quantized."""
        return self._weights.activations

    def compress(self, weight: Tensor, component: Component) -> Tensor:
        """The donor's matrix, in the dtype and on the device of `weight`."""
        found = self._weights.read(component)
        if not bool(torch.isfinite(found).all()):
            raise SchemeError(
                f"the donor {self.path} holds NaN or infinite weights in {component.name}; "
                "expected finite numbers: make or download the checkpoint again"
            )
        return found.to(weight)

    def size_bytes(self, component: Component, size_before: int) -> int:
        """What it takes in the donor's file; dense weights count 16 bits at most."""
        return self._weights.size_bytes(component)

    @property
    def source(self) -> str:
        """A digest of the donor's files, which may change while the path stays."""
        return _digest(self.path, _stamp(self.path))

    @property
    def _weights(self) -> _Weights:
        try:
            return _opened(self.path, _stamp(self.path))
        except ModelError as error:
            raise SchemeError(f"{self}: {error}") from error


@lru_cache(maxsize=4)
def _opened(path: str, _stamp: tuple[object, ...]) -> _Weights:
    """A donor's weights, found but not read; opened again only when its files have changed."""
    found = _found(path)
    return GgufWeights(found, path) if found.is_file() else CheckpointWeights(found, path)


@lru_cache(maxsize=16)
def _digest(path: str, _stamp: tuple[object, ...]) -> str:
    """SHA-256 in hex over a donor's weights and config."""
    found = _found(path)
    if found.is_file():
        return file_digest(found)
    config = model_files.read_config(found, path)
    files = model_files.find_weights(found, path, config, allow_pickle=False)
    return checkpoint_fingerprint(files, config, ())


def _found(path: str) -> Path:
    return gguf_files.demo_file() if path == gguf_files.DEMO else model_files.find_model(path)


def _stamp(path: str) -> tuple[object, ...]:
    """What tells the files of a path from others that lay there before."""
    place = Path(path).expanduser().absolute()
    files = sorted(place.glob("*")) if place.is_dir() else [place]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return (place, *((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))
