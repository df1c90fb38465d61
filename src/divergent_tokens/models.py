"""A language model as it runs: loaded from a folder, the hub, a GGUF file, or the demo's package."""

import io
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from divergent_tokens import gguf_files, model_files
from divergent_tokens.errors import ModelError
from divergent_tokens.fingerprints import checkpoint_fingerprint, file_digest, network_fingerprint

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
                f"{reference} is in training mode, where dropout makes every pass another one; call "
                "its .eval() first"
            )
        _refuse_other_kinds(network.config, reference)
        _check_finite(network, reference)
        return cls(
            network,
            tokenizer,
            reference,
            network_fingerprint(
                network.state_dict(), network.config.to_dict(), _eos_ids(network, tokenizer)
            ),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that the activations run in: that of the input embedding."""
        weight = getattr(self.network.get_input_embeddings(), "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            return weight.dtype
        return self.network.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device of the input embedding."""
        weight = getattr(self.network.get_input_embeddings(), "weight", None)
        return weight.device if isinstance(weight, torch.Tensor) else self.network.device

    @property
    def vocabulary_size(self) -> int:
        """The rows of the logits; padding rows, which no token of the tokenizer has, count."""
        head = self.network.get_output_embeddings()
        # A quantized head packs its weight, but still says how many rows come out.
        rows = getattr(head, "out_features", None)
        weight = getattr(head, "weight", None)
        if rows is None and isinstance(weight, torch.Tensor):
            rows = weight.shape[0]
        return int(rows or self.network.config.get_text_config(decoder=True).vocab_size)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a completion: the generation config's, else the config's or tokenizer's."""
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
    cache: Path | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """The Model of a hub id, a checkpoint's folder, a `.gguf` file or `demo:smollm2`.

    `dtype`: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, elsewhere the
    checkpoint's own (float32 for a GGUF). `device`: as torch names it, or "auto": cuda if there is
    one, else the CPU. Weights are dense floats, except those of a checkpoint in a quantized format
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
    precision = _precision(dtype, where)
    path = gguf_files.demo_file() if reference == gguf_files.DEMO else None
    path = path or model_files.find_model(reference)
    if path.is_dir():
        load = partial(_load_folder, path, reference, precision, where)
        return load(allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    fingerprint = file_digest(path)
    folder = gguf_files.dense_copy(
        fingerprint,
        cache or gguf_files.default_cache(),
        write=partial(_write_dense, path, reference),
        header=partial(gguf_files.check_gguf, path, reference),
    )
    network = _load_network(folder, reference, dtype=precision, **_placement(where))
    return _finished(network, _load_tokenizer(folder, reference), reference, fingerprint)


def check_same_vocabulary(base: Model, candidate: Model) -> None:
    """Nothing; ModelError if the two models' token ids do not mean the same.

    Compared are the tokenizers' vocabularies, how they encode two lines of mixed scripts (special
    tokens included), and the number of rows of the logits.
    """
    pair = f"candidate {candidate.reference} and base {base.reference}"
    advice = "expected the base's own tokenizer: compare a model only with versions of itself"
    ours, theirs = base.tokenizer.get_vocab(), candidate.tokenizer.get_vocab()
    if ours != theirs:
        raise ModelError(f"{pair} have different tokenizers: {_difference(ours, theirs)}; {advice}")
    for text in _PROBES:
        here, there = base.tokenizer(text)["input_ids"], candidate.tokenizer(text)["input_ids"]
        if here != there:
            raise ModelError(
                f"{pair} have the same tokens but encode text differently: of {text!r} the base "
                f"makes {_shown(base, here)}, the candidate {_shown(candidate, there)}; {advice}"
            )
    if base.vocabulary_size != candidate.vocabulary_size:
        raise ModelError(
            f"{pair} have the same {len(base.tokenizer)} tokens but differently padded rows of "
            f"logits: {base.vocabulary_size} in the base, {candidate.vocabulary_size} in the "
            "candidate; resize one of them (transformers: `resize_token_embeddings`)"
        )


_PROBES = (
    "Hello, world! Zwölf Boxkämpfer jagen Виктора 12345 быстро\n\tdef f(x): return x ** 2",
    " 東京は日本の首都です。 مرحبا بالعالم 😀 e\u0301 <s></s>",
)


def _difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """The first id whose token differs, in words."""
    base_tokens = {number: token for token, number in ours.items()}
    candidate_tokens = {number: token for token, number in theirs.items()}
    for number in sorted(base_tokens.keys() | candidate_tokens.keys()):
        here, there = base_tokens.get(number), candidate_tokens.get(number)
        if here != there:
            return (
                f"id {number} is {_named(here)} in the base and {_named(there)} in the candidate "
                f"({len(ours)} and {len(theirs)} tokens)"
            )
    return f"{len(ours)} and {len(theirs)} tokens"  # two tokens of one share an id


def _named(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _shown(model: Model, ids: list[int]) -> str:
    return f"{len(ids)} tokens beginning {model.tokenizer.convert_ids_to_tokens(ids[:3])}"


def _load_folder(
    folder: Path,
    reference: str,
    dtype: str | torch.dtype,
    device: torch.device,
    *,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> Model:
    described = model_files.read_config(folder, reference)
    _refuse_unknown(described, reference, trust_remote_code=trust_remote_code)
    with _loading(reference, "config"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        _refuse_other_kinds(config, reference)
    model_files.find_tokenizer(folder, reference)
    files = model_files.find_weights(folder, reference, described, allow_pickle=allow_pickle)
    tokenizer = _load_tokenizer(folder, reference, trust_remote_code=trust_remote_code)
    network = _load_network(
        folder,
        reference,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=None if allow_pickle else True,
        **_placement(device),
    )
    eos_ids = _eos_ids(network, tokenizer)
    fingerprint = checkpoint_fingerprint(files, described, eos_ids)
    return _finished(network, tokenizer, reference, fingerprint)


def _write_dense(gguf: Path, reference: str, folder: Path) -> None:
    """Write a GGUF's network in float32 and its tokenizer into a folder, as transformers does."""
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with _loading(reference, "GGUF's config"):
        config = AutoConfig.from_pretrained(**place)
    _refuse_other_kinds(config, reference)
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    # Versions that know this class would keep the blocks packed where they have kernels for them.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = _load_tokenizer(gguf.parent, reference, gguf_file=gguf.name)
    network = _load_network(gguf.parent, reference, **options)
    with _quiet():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _load_tokenizer(folder: Path, reference: str, **options: Any) -> PreTrainedTokenizerBase:
    with _loading(reference, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **options)
    return tokenizer


def _load_network(folder: Path, reference: str, **options: Any) -> PreTrainedModel:
    """The network, with every parameter from the file and every tensor of the file used."""
    with _loading(reference, "weights"):
        network, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # transformers re-initialises at random what is missing or of another shape, and only warns.
    _refuse_keys(reference, "lacks parameters of its network", report["missing_keys"])
    mismatched = [
        f"{name} ({list(found)}, expected {list(expected)})"
        for name, found, expected in report["mismatched_keys"]
    ]
    _refuse_keys(reference, "has parameters of the wrong shape", mismatched)
    unexpected = [name for name in report["unexpected_keys"] if not _is_harmless(name)]
    _refuse_keys(reference, "has tensors that its network does not use", unexpected)
    return network  # type: ignore[no-any-return]


# Buffers that older versions of transformers saved, and parts that a text model has no use for.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn\.(masked_)?bias"
    r"|attention\.(masked_)?bias)$"
    r"|(^|\.)(vision_tower|vision_model|visual|audio_tower|multi_modal_projector)\.|^mtp\."
)


def _is_harmless(name: str) -> bool:
    return _HARMLESS.search(name) is not None


def _refuse_keys(reference: str, problem: str, names: Collection[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise ModelError(
            f"{reference} {problem} ({len(names)}): {shown}; expected weights that fit its "
            "config.json exactly: download or export the checkpoint again"
        )


def _finished(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reference: str, fingerprint: str
) -> Model:
    """The Model, once its weights are known to be numbers."""
    _check_finite(network, reference)
    network.eval()
    network.requires_grad_(False)
    return Model(network, tokenizer, reference, fingerprint)


def _check_finite(network: PreTrainedModel, reference: str) -> None:
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            n_bad = int((~torch.isfinite(tensor.float())).sum())
            raise ModelError(
                f"{reference}: {name} has {n_bad} NaN or infinite of {tensor.numel()} weights; "
                "expected finite numbers: download or export the checkpoint again"
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8-bit floats have no sum
    # A sum is one pass without a copy; only where it overflows is every weight looked at.
    return bool(torch.isfinite(wide.sum())) or bool(torch.isfinite(wide).all())


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
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ModelError(
            f"device {str(device)!r} cannot be used ({_first_line(error)}); expected auto, cpu, or "
            "an accelerator that this torch has, such as cuda or cuda:0"
        ) from error
    return found


def _precision(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    """The dtype to load in; "auto" where the checkpoint decides."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise ModelError(f"dtype {dtype} is not known; expected auto, {', '.join(_DTYPES)}")
    return found


def _placement(device: torch.device) -> dict[str, Any]:
    """from_pretrained's argument that loads straight onto an accelerator."""
    return {} if device.type == "cpu" else {"device_map": {"": device}}


def _refuse_unknown(config: Mapping[str, Any], reference: str, *, trust_remote_code: bool) -> None:
    """Refuse a config.json that this transformers has no code for."""
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING or (config.get("auto_map") and trust_remote_code):
        return
    if config.get("auto_map"):
        raise ModelError(
            f"{reference} needs Python code of its own (auto_map in its config.json), which would "
            "run on this machine; read it, and pass --trust-remote-code (trust_remote_code=True) "
            "if you trust it"
        )
    found = f"is of the architecture {kind!r}" if kind else "names no model_type in its config.json"
    raise ModelError(
        f"{reference} {found}, which transformers {transformers.__version__} does not know; "
        "expected a decoder-only language model: a newer transformers may know it"
    )


def _refuse_other_kinds(config: PretrainedConfig, reference: str) -> None:
    """Refuse a network that is no decoder-only language model, by its config."""
    named = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    ):
        kind = "an encoder-only model"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "no language model that transformers can run as a decoder"
    else:
        return
    raise ModelError(
        f"{reference} ({config.model_type}: {named}) is {kind}; expected a decoder-only language "
        "model, one that predicts the next token"
    )


@contextmanager
def _loading(reference: str, part: str) -> Iterator[None]:
    """Quiet inside; whatever transformers raises comes out as one ModelError."""
    try:
        with _quiet():
            yield
    except ImportError as error:
        raise ModelError(
            f"{reference}: its {part} cannot be loaded without another package: {_one_line(error)}"
        ) from error
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(
            error
        ):
            raise ModelError(
                f"{reference}: out of memory while loading its {part} ({_first_line(error)}); load "
                "it in bfloat16 (dtype), on another device, or take a smaller model"
            ) from error
        raise ModelError(
            f"{reference}: transformers {transformers.__version__} cannot load its {part}: "
            f"{type(error).__name__}: {_one_line(error)}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, log lines or progress bars inside; everything as it was afterwards."""
    loggers = [logging.getLogger(name) for name in ("transformers", "compressed_tensors")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        # Some progress bars of transformers have no switch; all of them go to stderr.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else text[:400] + " ..."
