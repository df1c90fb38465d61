"""Which components must share a scheme, and which schemes there are, so that a server loads it."""

import re
from collections.abc import Sequence
from enum import StrEnum

from divergent_tokens.errors import SchemeError


class Coupling(StrEnum):
    """Whose rules a plan keeps to."""

    vllm = "vllm"
    """One scheme for q, k and v, one for gate and up, one for all routed experts of a layer;
    integer weights in 4 or 8 bits."""
    transformers = "transformers"
    """One scheme for every routed expert of every layer: two of them load silently wrong."""


_FUSED = (
    {"q_a_proj", "kv_a_proj_with_mqa"},  # latent attention (DeepSeek)
    {"in_proj_qkv", "in_proj_z"},  # linear attention (Qwen3-Next and later)
    {"in_proj_b", "in_proj_a"},
)
"""What vLLM joins into one matrix besides q, k, v and gate, up, by the last part of the name."""
_FUSED_KINDS = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate up", "up": "gate up"}
_OF_LATENT_ATTENTION = re.compile(r"_[ab]_proj")
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_INTEGERS = re.compile(r"(?:gptq:)?int(\d+)\b")


def coupled(
    names: Sequence[str], kinds: Sequence[str], coupling: Coupling | None
) -> tuple[tuple[int, ...], ...]:
    """The components by position in groups that share a scheme, first members in order.

    A fused module of which the sweep left out a part cannot be seen here: the rest is coupled.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        groups.setdefault(_shared(name, kind, coupling), []).append(i)
    return tuple(map(tuple, groups.values()))


def _shared(name: str, kind: str, coupling: Coupling | None) -> tuple[str, ...]:
    """The same for components that must share a scheme."""
    parent, _, last = name.rpartition(".")
    if coupling is None:
        return (name,)
    if kind == "expert":
        return ("experts", name.partition(".experts.")[0] if coupling is Coupling.vllm else "")
    if coupling is Coupling.transformers:
        return (name,)
    for fused in _FUSED:
        if last in fused:
            return (parent, *sorted(fused))
    if kind in _FUSED_KINDS and not _OF_LATENT_ATTENTION.search(last):
        return (parent, _FUSED_KINDS[kind])
    return (name,)


def loadable(
    schemes: Sequence[str], coupling: Coupling | None, model_type: str | None
) -> tuple[str, ...]:
    """Those of the schemes that it can load, in order.

    Raises SchemeError, naming each with its reason, if none is left.
    """
    reasons = {scheme: _unloadable(scheme, coupling, model_type) for scheme in schemes}
    fit = tuple(scheme for scheme, reason in reasons.items() if reason is None)
    if not fit:
        said = "; ".join(f"{scheme}: {reason}" for scheme, reason in reasons.items())
        raise SchemeError(
            f"--couple {coupling} leaves none of the sweep's schemes ({said}); sweep others, such "
            "as int8 or int4:g128, or leave out --couple"
        )
    return fit


def _unloadable(scheme: str, coupling: Coupling | None, model_type: str | None) -> str | None:
    """Why it cannot be loaded, or None."""
    if coupling is Coupling.transformers and model_type in _CONV1D_MODELS:
        return f"transformers fills the Conv1D layers of {model_type} with new weights"
    if coupling is Coupling.vllm and not scheme.startswith("from:"):  # a path may hold anything
        for step in scheme.split("+"):
            bits = _INTEGERS.match(step)
            if bits and bits[1] not in ("4", "8"):
                return f"vLLM loads 4 and 8 bits, not {bits[1]}"
    return None
