"""A language model as it runs, loaded from a folder, the hub, a GGUF file or the demo's package."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from divergent_tokens import gguf_files, model_files
from divergent_tokens.errors import ModelError
from divergent_tokens.fingerprints import checkpoint_fingerprint, file_digest, network_fingerprint
from divergent_tokens.network_checks import (
    refuse_not_finite,
    refuse_other_kinds,
    refuse_unfit_weights,
    refuse_unknown,
)
from divergent_tokens.offload import StoredWeights, pin_weights, placement, running_device
from divergent_tokens.quiet import loading, one_line, quietly
from divergent_tokens.store import default_cache
from divergent_tokens.vocabularies import first_difference

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Model:
    """A network with its tokenizer, and what identifies it."""

    network: PreTrainedModel
    """In eval mode. After `load_model`, no parameter of it requires a gradient."""
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer that belongs to it."""
    reference: str
    """What the user called it."""
    fingerprint: str
    """SHA-256 in hex: the same for the same checkpoint, wherever it lies and in whatever dtype."""

    @classmethod
    def of(
        cls,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference: str = "network",
    ) -> Self:
        """The Model of a network that Python already holds; the network itself is not changed.

        Its fingerprint is over the tensors as they are now: build a new Model after changing them.
        Raises ModelError for a network that is in training mode, is no decoder-only language model,
        or has NaN or infinite weights.
        """
        if network.training:
            raise ModelError(
                f"{reference} is in training mode, where dropout makes every pass another one; "
                "expected eval mode: call its .eval() first"
            )
        refuse_other_kinds(network.config, reference)
        refuse_not_finite(network, reference)
        # Only a saved config names its architecture; the class always does.
        config = network.config.to_dict() | {"architectures": [type(network).__name__]}
        eos_ids = _eos_ids(network, tokenizer)
        fingerprint = network_fingerprint(StoredWeights(network), config, eos_ids)
        return cls(network, tokenizer, reference, fingerprint)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that the activations run in: that of the input embedding."""
        weight = getattr(self.network.get_input_embeddings(), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            return weight.dtype
        return self.network.dtype

    @property
    def dtype_name(self) -> str:
        """As records say it: float32, bfloat16, float16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the input embedding."""
        embedding: Any = self.network.get_input_embeddings()
        weight = getattr(embedding, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_meta:
            return running_device(embedding) or weight.device
        return weight.device if isinstance(weight, torch.Tensor) else self.network.device

    @property
    def vocabulary_size(self) -> int:
        """The rows of the logits; padding rows, which no token of the tokenizer has, count."""
        network: Any = self.network
        head = network.get_output_embeddings()
        # A quantized head packs its weight, but still says how many rows come out.
        rows = getattr(head, "out_features", None)
        weight = getattr(head, "weight", None)
        if rows is None and isinstance(weight, torch.Tensor):
            rows = weight.shape[0]
        return int(rows or self.network.config.get_text_config(decoder=True).vocab_size)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: the generation config's, else the config's or tokenizer's."""
        return _eos_ids(self.network, self.tokenizer)

    @property
    def max_positions(self) -> int | None:
        """The most tokens that fit into one sequence; None where the model sets no limit."""
        config = self.network.config.get_text_config(decoder=True)
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            found = getattr(config, name, None)
            if isinstance(found, int) and found > 0:
                return found
        return None


def load_model(
    reference: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    max_memory: int | None = None,
    cache: Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """The Model of a hub id, a checkpoint's folder, a `.gguf` file or `demo:smollm2`.

    `dtype`: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, elsewhere the
    checkpoint's own (float32 for a GGUF). `device`: as torch names it, or "auto": cuda if there is
    one, else the CPU. Where the weights do not fit one accelerator, the layers fill all of them
    ("auto"), or the one that was named, and the rest waits in CPU memory and on disk until it is
    read. `max_memory`: bytes of weights that each device may hold (on a CPU the rest waits on
    disk). Weights are dense floats, except those of a checkpoint in a quantized format
    that transformers reads, which run as transformers runs them.

    A GGUF is dequantized once, in tens of seconds; the dense copy stays in `cache` (default: the
    user's cache folder) under the file's SHA-256. The weights of `demo:smollm2` were dequantized
    from Q4_1 (blocks of 32 with a scale and a minimum): 4-bit schemes with groups of 32 and a zero
    point are nearly lossless on it.

    Raises ModelError, with one message, for whatever is not a whole decoder-only language model
    with its tokenizer: before the weights are read, where that can be seen before.
    """
    reference = str(reference)
    where = _device(device)
    spread = _devices(where) if device == "auto" else [where]
    precision = _precision(dtype, where)
    path = gguf_files.demo_file() if reference == gguf_files.DEMO else None
    path = path or model_files.find_model(reference)
    if path.is_dir():
        load = partial(_load_folder, path, reference, precision, spread, max_memory)
        return load(allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    fingerprint, folder = _dense_copy(path, reference, cache)
    try:
        config = AutoConfig.from_pretrained(folder)
        placed = _placement(config, spread, precision, max_memory, reference)
        network = _load_network(folder, reference, dtype=precision, **placed)
        tokenizer = _load_tokenizer(folder, reference)
    except ModelError as error:
        raise ModelError(
            f"{error}; if its dense copy in {folder} is damaged, delete that folder"
        ) from error
    return Model(network, tokenizer, reference, fingerprint)


@dataclass(frozen=True)
class Outline:
    """A checkpoint without its weights in memory: what it is, and where they lie."""

    folder: Path
    """With safetensors; of a GGUF its dense copy in float32."""
    network: PreTrainedModel
    """On the meta device, its weights without numbers."""
    config: Mapping[str, Any]
    """config.json, as it stands there."""
    reference: str
    fingerprint: str
    """The same that the loaded Model has."""


def outline_model(reference: str | Path, *, cache: Path | None = None) -> Outline:
    """The Outline of a hub id, a folder, a `.gguf` file or `demo:smollm2`.

    Needs memory for no weight, and reads the files once for the fingerprint. Raises ModelError as
    `load_model` does, though what only the numbers show (NaN, say) is not seen.
    """
    reference = str(reference)
    path = gguf_files.demo_file() if reference == gguf_files.DEMO else None
    path = path or model_files.find_model(reference)
    fingerprint = None
    if not path.is_dir():
        fingerprint, path = _dense_copy(path, reference, cache)
    described = model_files.read_config(path, reference)
    refuse_unknown(described, reference, trust_remote_code=False)
    with loading(reference, "config"):
        config = AutoConfig.from_pretrained(path)
    refuse_other_kinds(config, reference)
    where = reference if fingerprint is None else str(path)
    files = model_files.find_weights(path, where, described, allow_pickle=False)
    with loading(reference, "config"), torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    network.eval()
    if (path / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(path)
    if fingerprint is None:
        eos_ids = _eos_ids(network, _load_tokenizer(path, reference))
        fingerprint = checkpoint_fingerprint(files, described, eos_ids)
    return Outline(path, network, described, reference, fingerprint)


def check_same_vocabulary(base: Model, candidate: Model) -> None:
    """Nothing; ModelError, with the first difference, if token ids do not mean the same in both.

    Compared are the vocabularies, how they encode two lines of mixed scripts (special tokens
    included), and the number of rows of the logits.
    """
    pair = f"candidate {candidate.reference} and base {base.reference}"
    difference = first_difference(base.tokenizer, candidate.tokenizer)
    if difference:
        raise ModelError(
            f"{pair} have different tokenizers: {difference}; expected the base's own tokenizer: "
            "a model can be compared only with versions of itself"
        )
    if base.vocabulary_size != candidate.vocabulary_size:
        raise ModelError(
            f"{pair} have the same {len(base.tokenizer)} tokens, but their logits are padded to "
            f"different numbers of rows: {base.vocabulary_size} in the base and "
            f"{candidate.vocabulary_size} in the candidate; resize one of the two (transformers: "
            "`resize_token_embeddings`)"
        )


def _load_folder(
    folder: Path,
    reference: str,
    dtype: str | torch.dtype,
    devices: Sequence[torch.device],
    max_memory: int | None,
    *,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> Model:
    described = model_files.read_config(folder, reference)
    refuse_unknown(described, reference, trust_remote_code=trust_remote_code)
    with loading(reference, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    refuse_other_kinds(config, reference, trust_remote_code=trust_remote_code)
    model_files.find_tokenizer(folder, reference)
    files = model_files.find_weights(folder, reference, described, allow_pickle=allow_pickle)
    tokenizer = _load_tokenizer(folder, reference, trust_remote_code=trust_remote_code)
    network = _load_network(
        folder,
        reference,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=None if allow_pickle else True,
        **_placement(
            config, devices, dtype, max_memory, reference, trust_remote_code=trust_remote_code
        ),
    )
    if trust_remote_code:
        files += tuple(sorted(folder.glob("*.py")))  # code of its own is part of what it computes
    fingerprint = checkpoint_fingerprint(files, described, _eos_ids(network, tokenizer))
    return Model(network, tokenizer, reference, fingerprint)


def _dense_copy(gguf: Path, reference: str, cache: Path | None) -> tuple[str, Path]:
    """A GGUF's fingerprint, and the folder of its dense copy."""
    fingerprint = file_digest(gguf)
    folder = gguf_files.dense_copy(
        fingerprint,
        cache or default_cache(),
        write=partial(_write_dense, gguf, reference),
        header=partial(gguf_files.check_gguf, gguf, reference),
    )
    return fingerprint, folder


def _write_dense(gguf: Path, reference: str, folder: Path) -> None:
    """Write a GGUF's network in float32 and its tokenizer into a folder, as transformers does."""
    # Read through a link in the new folder: beside the file itself, transformers would take
    # another tokenizer's files for its own.
    link = folder / "source.gguf"
    try:
        link.symlink_to(gguf.resolve())
    except OSError:  # Windows lets only some users make links
        shutil.copyfile(gguf, link)
    options: dict[str, Any] = {"gguf_file": link.name}
    with loading(reference, "config"):
        config = AutoConfig.from_pretrained(folder, **options)
    refuse_other_kinds(config, reference)
    tokenizer = _load_tokenizer(folder, reference, **options)
    # Versions that know this class would keep the blocks packed where they have kernels for them.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    network = _load_network(folder, reference, dtype=torch.float32, **options)
    link.unlink()
    with quietly():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _load_tokenizer(folder: Path, reference: str, **options: Any) -> PreTrainedTokenizerBase:
    with loading(reference, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer


def _load_network(folder: Path, reference: str, **options: Any) -> PreTrainedModel:
    """The network, with all of its weights from the file and all of them finite."""
    # Shapes that do not fit come in the report as well, by name, rather than as an exception.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    rewritten = None
    if "disk" in options.get("device_map", {}).values():  # what is not stored as it runs goes there
        rewritten = tempfile.TemporaryDirectory(prefix="divergent-tokens-")
        options["offload_folder"] = rewritten.name
    loaded: Any
    with loading(reference, "weights"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    network, report = loaded
    if rewritten is not None:
        weakref.finalize(network, rewritten.cleanup)
    refuse_unfit_weights(report, reference)
    refuse_not_finite(network, reference)
    network.eval()
    network.requires_grad_(False)
    if torch.cuda.is_available():
        pin_weights(network)
    if getattr(network.config, "quantization_config", None) is not None:
        with loading(reference, "weights"), torch.no_grad():  # some unpack them when first run
            network(torch.zeros(1, 1, dtype=torch.long, device=network.device))
    return network  # type: ignore[no-any-return]


def _eos_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    config = network.config.get_text_config(decoder=True)
    for holder in (getattr(network, "generation_config", None), config, tokenizer):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            ids = found if isinstance(found, list | tuple) else [found]
            return tuple(dict.fromkeys(int(number) for number in ids))
    return ()


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found).item()  # meta has no numbers, others may not be there
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used ({one_line(error)}); expected auto, cpu, or "
            "an accelerator that this torch has, such as cuda or cuda:0"
        ) from error
    return found


def _precision(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    """The dtype to load in; "auto" where the checkpoint decides."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise ModelError(f"dtype {dtype} is not known; expected auto, {', '.join(_DTYPES)}")
    return found


def _devices(first: torch.device) -> list[torch.device]:
    """All accelerators of a kind, or the CPU."""
    if first.type != "cuda":
        return [first]
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _placement(
    config: PretrainedConfig,
    devices: Sequence[torch.device],
    dtype: str | torch.dtype,
    max_memory: int | None,
    reference: str,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """from_pretrained's arguments that load straight to where the weights shall be."""
    first = devices[0]
    whole = {} if first.type == "cpu" else {"device_map": {"": first}}
    quantized = getattr(config, "quantization_config", None) is not None
    if max_memory is None and (first.type == "cpu" or quantized):
        return whole
    if quantized:
        raise ModelError(
            "a quantized checkpoint is loaded whole; leave --max-memory out, or give the dense one"
        )
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    running = dtype if isinstance(dtype, torch.dtype) else stored
    make: Any = AutoModelForCausalLM.from_config
    with loading(reference, "config"), torch.device("meta"):
        outline = make(config, trust_remote_code=trust_remote_code)
    outline.tie_weights()
    found = placement(outline, devices, dtype=running, max_memory=max_memory)
    return whole if found is None else {"device_map": found}
