"""A plan carried out in files: a checkpoint that plain transformers loads, tensor by tensor.

Only one tensor of the base and one shard of what is written are ever in memory.
"""

import json
import os
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from divergent_tokens.compress.checkpoint_weights import CheckpointWeights
from divergent_tokens.compress.components import Component, component_view, find_components
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.compress.model_card import measured_table, model_card
from divergent_tokens.compress.packed import Packed, quantization_config
from divergent_tokens.compress.plan import Plan, check_plan
from divergent_tokens.compress.plan_file import PlanFile, check_base, write_plan
from divergent_tokens.compress.servers import Problem, is_kept_dense, problems
from divergent_tokens.errors import ModelError, RecordError, SchemeError
from divergent_tokens.models import Outline
from divergent_tokens.store import clear_disk_errors, replacing_folder

PLAN = "plan.json"
SHARD_BYTES = 5 * 10**9
"""The most that one file of weights holds, and that is in memory at once."""
_SLAB_BYTES = 64 * 2**20
"""Tensors that wait to be written lie in stretches of this size, or larger if they are."""
_ALIGNED_BYTES = 16
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*")
_OURS = (
    *("README.md", "*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken"),
    *("merges.txt", "vocab.txt", "LICENSE*", "NOTICE*"),
)
"""Names in a checkpoint that may be replaced."""
_NOT_COPIED = (
    "config.json",
    "*.index.json",
    PLAN,
    "pruning.json",
    "adapter_*",
    "*_loading_report*",
)


@dataclass(frozen=True)
class Checkpoint:
    """What was written."""

    folder: Path
    n_files: int
    """Files of weights."""
    size_bytes: int
    """Of all tensors in them."""
    base_size_bytes: int
    """Of all tensors in the base's files."""
    dense: bool
    dtype: torch.dtype
    """Of the weights that are not in codes."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "folder": str(self.folder),
            "n_files": self.n_files,
            "size_bytes": self.size_bytes,
            "base_size_bytes": self.base_size_bytes,
            "dense": self.dense,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def write_checkpoint(
    base: Outline,
    file: PlanFile,
    out: Path,
    *,
    dense: bool = False,
    target: Coupling = Coupling.transformers,
    dtype: torch.dtype | None = None,
    ready: Plan | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Any = None,
) -> Checkpoint:
    """Write the base under a plan into the folder `out`, which appears whole or not at all.

    Packed components lie there in compressed-tensors' formats; with `dense` all are ordinary
    weights, whatever the scheme. The rest is copied: other weights (in another `dtype`, if one is
    given), tokenizer, chat template, generation config; the plan and a model card are added.
    `ready` is the file's plan with its codes at hand, for schemes that need them (GPTQ).

    Raises RecordError for a plan of another base, for a folder that holds something, unless it is
    a checkpoint of ours and to be overwritten, and for a full disk; SchemeError for what `target`
    would not load rightly, by name.
    """
    plan = ready or file.plan()
    check_base(file, base, "the plan")
    _check_apart(base, out)
    check_folder(out, overwrite=overwrite)
    measured = measured_table(file)
    source = _Source(base, plan, dtype)
    check_plan(plan, source.components)
    if dense:
        _check_dense(plan)
    else:
        _check_packable(source, target)
    with clear_disk_errors(out), replacing_folder(out) as folder:
        shards = _Shards(folder, shard_bytes)
        for name, tensor in source.written(dense=dense, progress=progress):
            shards.add(name, tensor)
        shards.finish()
        _copy_files(base.folder, folder)
        config = source.config(dense=dense)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_plan(folder / PLAN, file)
        card = model_card(
            file,
            base=base.reference,
            packed=source.packed_formats,
            size_bytes=shards.size_bytes,
            measured=measured,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Checkpoint(
        folder=out,
        n_files=shards.n_files,
        size_bytes=shards.size_bytes,
        base_size_bytes=source.base_size_bytes,
        dense=dense,
        dtype=source.dtype,
    )


def check_for(
    base: Outline, plan: Plan, target: Coupling, dtype: torch.dtype | None = None
) -> tuple[Problem, ...]:
    """What the target would not load rightly of the plan's packed checkpoint."""
    source = _Source(base, plan, dtype)
    return problems(plan, source.components, target, dtype=source.dtype)


def weights_dtype(base: Outline) -> torch.dtype:
    """What the base's files hold its weights in."""
    return _Source(base, Plan({}), None).dtype


# --- refused ---


def check_folder(out: Path, *, overwrite: bool) -> None:
    """Raise RecordError if no checkpoint may be written there."""
    if out.exists() and not out.is_dir():
        raise RecordError(f"{out} is a file; name a folder to write the checkpoint into")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise RecordError(
            f"the folder {out} is not empty; name another, or replace it with --overwrite"
        )
    if not (out / PLAN).is_file() or not (out / "config.json").is_file():
        raise RecordError(
            f"the folder {out} holds something else than a checkpoint of ours (it lacks {PLAN} or "
            "config.json), which is never overwritten; name another"
        )
    if out.resolve() == Path.cwd():
        raise RecordError(f"{out} is the folder that you are in; name another")
    foreign = [file.name for file in sorted(out.iterdir()) if not _may_be_ours(file)]
    if foreign:
        raise RecordError(
            f"the folder {out} holds what no checkpoint of ours has ({', '.join(foreign[:3])}), "
            "and would be replaced as a whole; move it away, or name another folder"
        )


def _may_be_ours(file: Path) -> bool:
    """Whether a file or folder has a name that `dtm compress` writes or copies."""
    if file.is_dir():
        return file.name == "additional_chat_templates"
    return any(fnmatch(file.name, pattern) for pattern in _OURS)


def _check_apart(base: Outline, out: Path) -> None:
    if base.folder.resolve().is_relative_to(out.resolve()):
        raise RecordError(
            f"the folder {out} holds the base {base.reference}, which is read; name another"
        )


def _check_dense(plan: Plan) -> None:
    active = {name: s for name, s in plan.schemes.items() if s.activations is not None}
    for name, scheme in active.items():
        raise SchemeError(
            f"{name} ({scheme}) and {len(active) - 1} more quantize what goes into them each time "
            "they run, which dense weights cannot say; leave out --dense, or plan a scheme of "
            "weights only, such as int8"
        )


def _check_packable(source: "_Source", target: Coupling) -> None:
    found = problems(source.plan, source.components, target, dtype=source.dtype)
    if found:
        more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        raise SchemeError(f"{target} would not load this plan rightly: {found[0]}{more}")
    for component, place in chain(*source.inside.values()):
        scheme = source.plan.schemes[component.name]
        if place.stack_index is not None and not is_kept_dense(scheme):
            raise SchemeError(
                f"{component.name} ({scheme}) lies in {component.parameter} with the other experts "
                f"of its layer in the files of {source.base.reference}, where nothing looks for "
                "codes; write the plan dense (--dense)"
            )


# --- tensors ---


class _Source:
    """The base's tensors, and what becomes of them."""

    def __init__(self, base: Outline, plan: Plan, dtype: torch.dtype | None) -> None:
        self.base, self.plan = base, plan
        self.weights = CheckpointWeights(base.folder, str(base.folder))
        if not self.weights.is_dense:
            raise ModelError(
                f"{base.reference} is compressed already; expected dense weights: take the model "
                "that it was made from"
            )
        found = find_components(base.network, include=["*"])
        self._to = dtype
        self.dtype = dtype or self._stored_dtype(found[0])
        self.components = tuple(replace(component, dtype=self.dtype) for component in found)
        self.packed: dict[str, Packed] = {}
        """By module, as they are made; their settings alone."""
        self.base_size_bytes = 0

    def _stored_dtype(self, component: Component) -> torch.dtype:
        place = self.weights.place(component)
        return self.weights.tensor(place[0]).dtype if place else torch.float32

    @property
    def packed_formats(self) -> tuple[str, ...]:
        """Those of the modules that were packed."""
        return tuple(sorted({packed.format for packed in self.packed.values()}))

    @cached_property
    def inside(self) -> Mapping[str, list[tuple[Component, Component]]]:
        """Tensor -> the planned components that it holds, each as named and as it lies there."""
        found: dict[str, list[tuple[Component, Component]]] = {}
        for component in self.components:
            if component.name not in self.plan.schemes:
                continue
            place = self.weights.place(component)
            if place is None:
                raise ModelError(
                    f"{self.base.reference} keeps {component.name} under a name that only "
                    "transformers knows; load the model and save it again (`save_pretrained`)"
                )
            found.setdefault(place[0], []).append((component, place[1]))
        return found

    def written(self, *, dense: bool, progress: Any = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the new checkpoint with its name, in the order of the base's."""
        inside, names = self.inside, self.weights.names
        for done, name in enumerate(names):
            tensor = self.weights.tensor(name)
            self.base_size_bytes += tensor.numel() * tensor.itemsize
            if self._to is not None and tensor.is_floating_point():
                tensor = tensor.to(self._to)
            yield from self._changed(name, tensor, inside.get(name, []), dense=dense)
            if progress is not None:
                progress("write", done + 1, len(names), "tensors")

    def _changed(
        self,
        name: str,
        tensor: Tensor,
        held: Sequence[tuple[Component, Component]],
        *,
        dense: bool,
    ) -> Iterator[tuple[str, Tensor]]:
        schemes = {component.name: self.plan.schemes[component.name] for component, _ in held}
        if not held:
            yield name, tensor
        elif dense or all(map(is_kept_dense, schemes.values())):
            tensor = tensor.clone()
            for component, place in held:
                view = component_view(tensor, place)
                view.copy_(schemes[component.name].compress(view.contiguous(), component))
            yield name, tensor
        else:
            ((component, place),) = held
            matrix = component_view(tensor, place).contiguous()
            packed = schemes[component.name].packed(matrix, component)
            self.packed[component.name] = replace(packed, tensors={})  # they are on their way
            module = name.removesuffix(".weight")
            for part, piece in packed.tensors.items():
                yield f"{module}.{part}", piece

    def config(self, *, dense: bool) -> dict[str, Any]:
        """config.json for what was written."""
        config = dict(self.base.config)
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(self.dtype).removeprefix("torch.")
        if not dense and self.packed:
            left = left_dense(self.base.network, self.components, self.packed)
            config["quantization_config"] = quantization_config(self.packed, left)
        return config


def left_dense(
    network: nn.Module, components: Sequence[Component], packed: Container[str]
) -> list[str]:
    """What has a matrix and keeps it, routers and experts too: servers want to be told."""
    modules = [
        name
        for name, module in network.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim == 2
        and not isinstance(module, nn.Embedding)
    ]
    experts = [component.name for component in components if component.expert is not None]
    return [name for name in (*modules, *experts) if name not in packed]


class _Shards:
    """Files of weights, each written when it is full; named when their number is known."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._tensors: dict[str, Tensor] = {}
        self._n_bytes = 0
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._slab_used = 0
        self._where: list[list[str]] = []
        """Tensor names of each file."""
        self.size_bytes = 0

    @property
    def n_files(self) -> int:
        return len(self._where)

    def add(self, name: str, tensor: Tensor) -> None:
        n_bytes = tensor.numel() * tensor.itemsize
        if self._tensors and self._n_bytes + n_bytes > self._most_bytes:
            self._write()
        self._tensors[name] = self._copied(tensor)
        self._n_bytes += n_bytes

    def finish(self) -> None:
        """Write what is left, give the files their names, and the index if there are several."""
        self._write()
        n = len(self._where)
        names = ["model.safetensors"]
        if n > 1:
            names = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        for i, name in enumerate(names):
            self._unnamed(i).rename(self._folder / name)
        if n > 1:
            index = {
                "metadata": {"total_size": self.size_bytes},
                "weight_map": {
                    tensor: name
                    for name, held in zip(names, self._where, strict=True)
                    for tensor in held
                },
            }
            text = json.dumps(index, indent=2) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _copied(self, tensor: Tensor) -> Tensor:
        """The tensor among the others that wait.

        Where it was made it would lie between large temporaries, and the system would get none of
        their room back: several times the shard.
        """
        n_bytes = tensor.numel() * tensor.itemsize
        start = -(-self._slab_used // _ALIGNED_BYTES) * _ALIGNED_BYTES
        if start + n_bytes > len(self._slab):
            self._slab, start = torch.empty(max(n_bytes, _SLAB_BYTES), dtype=torch.uint8), 0
        self._slab_used = start + n_bytes
        room = self._slab[start : self._slab_used].view(tensor.dtype)
        return room.view(tensor.shape).copy_(tensor)

    def _write(self) -> None:
        path = self._unnamed(len(self._where))
        path.touch()
        mode = path.stat().st_mode  # as the umask has it; the library's own is for one user only
        with _plain_disk_errors():
            save_file(self._tensors, path, {"format": "pt"})
        path.chmod(mode)
        self._where.append(list(self._tensors))
        self.size_bytes += self._n_bytes
        self._tensors, self._n_bytes, self._slab_used = {}, 0, 0

    def _unnamed(self, i: int) -> Path:
        return self._folder / f"part-{i}"


@contextmanager
def _plain_disk_errors() -> Iterator[None]:
    """What safetensors, written in Rust, makes of a full disk, as the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _copy_files(source: Path, folder: Path) -> None:
    """What belongs to a checkpoint besides weights and config."""
    for file in sorted(source.iterdir()):
        wanted = any(fnmatch(file.name, pattern) for pattern in _COPIED)
        if file.is_file() and wanted and not any(fnmatch(file.name, p) for p in _NOT_COPIED):
            shutil.copyfile(file, folder / file.name)
    templates = source / "additional_chat_templates"
    with suppress(FileNotFoundError, NotADirectoryError):
        shutil.copytree(templates, folder / templates.name)
