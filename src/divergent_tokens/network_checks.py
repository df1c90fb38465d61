"""What a network must be: a decoder-only language model, with every weight there and a number."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from divergent_tokens.errors import ModelError
from divergent_tokens.offload import StoredWeights


def refuse_unknown(config: Mapping[str, Any], reference: str, *, trust_remote_code: bool) -> None:
    """ModelError for a config.json that this transformers has no code for."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if known or (config.get("auto_map") and trust_remote_code):
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


def refuse_other_kinds(
    config: PretrainedConfig, reference: str, *, trust_remote_code: bool = False
) -> None:
    """ModelError for a network that is no decoder-only language model, by its config.

    With code of its own (`trust_remote_code`), an architecture unknown to transformers is taken to
    be one.
    """
    named = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    ):
        kind = "an encoder-only model"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (
        trust_remote_code and getattr(config, "auto_map", None)
    ):
        kind = "no language model that transformers can run as a decoder"
    else:
        return
    raise ModelError(
        f"{reference} ({config.model_type}: {named}) is {kind}; expected a decoder-only language "
        "model, one that predicts the next token"
    )


# Buffers that older versions of transformers saved, and parts that a text model has no use for.
_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn\.(masked_)?bias"
    r"|attention\.(masked_)?bias)$"
    r"|(^|\.)(vision_tower|vision_model|visual|audio_tower|multi_modal_projector)\.|^mtp\."
)


def refuse_unfit_weights(report: Mapping[str, Any], reference: str) -> None:
    """ModelError for parameters that the weights lack, hold in another shape, or have no use for.

    `report` is transformers' loading info. transformers itself re-initialises at random what is
    missing, and only warns. Tied parameters are not missing.
    """
    _refuse_names(report["missing_keys"], "lacks weights of", reference)
    shapes = [
        f"{name} (shape {list(found)}, expected {list(expected)})"
        for name, found, expected in report["mismatched_keys"]
    ]
    _refuse_names(shapes, "has weights of the wrong shape for", reference)
    unexpected = [name for name in report["unexpected_keys"] if not _HARMLESS.search(name)]
    _refuse_names(unexpected, "has weights that have no place in", reference)


def _refuse_names(names: Collection[str], problem: str, reference: str) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        raise ModelError(
            f"{reference} {problem} its network ({len(names)}): {shown}; expected weights that fit "
            "its config.json exactly: download or export the checkpoint again"
        )


def refuse_not_finite(network: PreTrainedModel, reference: str) -> None:
    """ModelError for NaN or infinite weights, by the parameter's name."""
    for name, tensor in StoredWeights(network).items():
        # Quantized layers may keep other things than tensors there.
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        if not _is_finite(tensor):
            n_bad = int((~torch.isfinite(tensor.float())).sum())
            raise ModelError(
                f"{reference}: {n_bad} of {tensor.numel()} weights of {name} are NaN or infinite; "
                "expected finite numbers: download or export the checkpoint again"
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8-bit floats have no sum
    # A sum is one pass without a copy; only where it overflows is every weight looked at.
    return bool(torch.isfinite(wide.sum())) or bool(torch.isfinite(wide).all())
