"""Completions written by vLLM, where it is installed and asked for."""

import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from divergent_tokens.errors import ModelError
from divergent_tokens.models import Model

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHARE = 0.9
"""Of the memory that is free beside the base, for vLLM's weights and cache."""


def generate_by_vllm(
    model: Model,
    prompt_ids: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    eos_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Greedy new ids of each prompt, of whatever lengths; a sequence ends with its first end.

    vLLM loads the checkpoint again, beside the base, in the base's dtype; its kernels round
    otherwise, so that the base's own argmax differs from its text where two tokens are nearly
    equal: the noise floor shows it. Raises ModelError where vLLM is not installed, and for a model
    that vLLM could not load by its reference.
    """
    if not (Path(model.reference).is_dir() or _HUB_ID.fullmatch(model.reference)):
        raise ModelError(
            f"vLLM loads a folder or a hub id, and {model.reference} is neither; leave "
            "--generate-with out"
        )
    if model.device.index not in (None, 0):
        raise ModelError(f"vLLM takes the first GPU, and the base is on {model.device}")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ModelError(
            "completions by vLLM need the package vllm, which is not installed; "
            "pip install vllm, or leave --generate-with out"
        ) from error
    longest = max(map(len, prompt_ids)) + new_tokens
    engine: Any = LLM(
        model=model.reference,
        dtype=model.dtype_name,
        max_model_len=longest,
        gpu_memory_utilization=_share(model.device),
        generation_config="vllm",  # nothing of the checkpoint's own
        seed=0,
    )
    settings = SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        stop_token_ids=list(eos_ids),
        ignore_eos=True,  # only the ids given end a text, not the tokenizer's own
        detokenize=False,
    )
    outputs = engine.generate([{"prompt_token_ids": list(row)} for row in prompt_ids], settings)
    written = [list(output.outputs[0].token_ids) for output in outputs]
    del engine
    gc.collect()
    return written


def _share(device: torch.device) -> float:
    """vLLM counts in shares of the whole memory."""
    if device.type != "cuda":
        return SHARE
    free, total = torch.cuda.mem_get_info(device)
    return SHARE * free / total
