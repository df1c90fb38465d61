"""What would not be loaded rightly: packed components that transformers or vLLM refuse or misread.

Rules, tried on transformers 5.17 and 5.24 with compressed-tensors 0.19 and 0.20 (see
tests/compress/test_servers.py), or read in vLLM's sources and issues.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from divergent_tokens.compress.components import Component
from divergent_tokens.compress.couplings import Coupling, coupled
from divergent_tokens.compress.plan import Plan
from divergent_tokens.compress.schemes import Magnitude, Scheme

_VLLM_GROUPS = (32, 64, 128)
"""Group sizes that its kernels for weight-only integers know."""
_SET_WEIGHTS = {
    "falcon": "",
    "falcon_mamba": ".out_proj",
    "gpt_bigcode": ".c_proj",
    "mamba": ".out_proj",
    "mamba2": ".out_proj",
}
"""How the modules end whose `.weight` transformers' `_init_weights` speaks of, by model type."""
_BATCHED_SHARED = (
    "aria_text",
    "bailing_hybrid",
    "deepseek_v4",
    "dots1",
    "exaone_moe",
    "glm4_moe",
    "kimi_linear",
    "nemotron_h",
    "sarvam_moe",
    "solar_open",
)
"""Whose shared experts are given [prompt, token, hidden], as seen in transformers 5.24; those of
others mostly [token, hidden]."""


@dataclass(frozen=True)
class Problem:
    """A component that the target would not load as it is planned."""

    component: str
    scheme: str
    """Its scheme; 'unchanged' if it has none."""
    why: str
    instead: str
    """What it would take."""

    def __str__(self) -> str:
        """As a message says it."""
        return f"{self.component} ({self.scheme}): {self.why}; {self.instead}"


def problems(
    plan: Plan,
    components: Sequence[Component],
    target: Coupling,
    *,
    dtype: torch.dtype,
) -> tuple[Problem, ...]:
    """What the target refuses or misreads of a packed checkpoint, in the components' order.

    `components` are all of the network, the ends too, and `dtype` is that of its weights in the
    file. Empty if all is well.
    """
    rules = _TRANSFORMERS if target is Coupling.transformers else _VLLM
    found = [
        Problem(component.name, str(scheme), *said)
        for component in components
        if (scheme := plan.schemes.get(component.name)) is not None and not is_kept_dense(scheme)
        for rule in (*_COMMON, *rules)
        if (said := rule(component, scheme, dtype)) is not None
    ]
    if target is Coupling.transformers:
        found += _dense_experts(plan, components)
    return (*found, *_broken_groups(plan, components, target))


def is_kept_dense(scheme: Scheme) -> bool:
    """Whether what comes out is dense weights, which any checkpoint holds: a pruned matrix."""
    return all(isinstance(step, Magnitude) for step in scheme.steps)


# --- one component, whose codes lie in the file ---

_Rule = Callable[[Component, Scheme, torch.dtype], tuple[str, str] | None]


def _packable(_c: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    if scheme.is_packable:
        return None
    return (
        "it leaves no codes that a compressed-tensors checkpoint could hold",
        "write the plan dense (--dense), or plan int8, int4:g64, w8a8 or fp8",
    )


def _no_end(component: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    if not component.is_end:
        return None
    return (
        "packed embeddings and heads are not loaded everywhere, tied ones nowhere",
        "write the plan dense (--dense), or leave them out of it",
    )


def _no_conv1d(component: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    if not component.transposed or component.stack_index is not None:
        return None
    return (
        f"the Conv1D layers of {component.model_type} would be filled with new weights, in silence",
        "write the plan dense (--dense)",
    )


def _known_experts(component: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    if component.stack_index is None or not component.transposed:
        return None
    return (
        f"no server unpacks the experts of {component.model_type}, which lie as [in, out]",
        "write the plan dense (--dense)",
    )


def _no_set_weight(component: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    ending = _SET_WEIGHTS.get(component.model_type)
    bytewise = scheme.activations is not None  # whose codes are called `weight`
    if ending is None or not component.name.endswith(ending) or bytewise:
        return None
    return (
        f"transformers sets the weight of this module of {component.model_type} itself while it "
        "loads, and finds codes in its place",
        "leave it out of the plan, plan w8a8 or fp8, or write the plan dense (--dense)",
    )


def _batched_inputs(
    component: Component, scheme: Scheme, _d: torch.dtype
) -> tuple[str, str] | None:
    opt = component.model_type == "opt" and component.name.endswith((".fc1", ".fc2"))
    shared = ".shared_expert" in component.name and component.model_type not in _BATCHED_SHARED
    if not (opt or shared) or scheme.activations is None:
        return None
    return (
        "this module is given [token, hidden], of which compressed-tensors makes one scale for all "
        "tokens instead of one for each",
        "plan a scheme of weights only for it, such as int8",
    )


def _fp4_in_bf16(_c: Component, scheme: Scheme, dtype: torch.dtype) -> tuple[str, str] | None:
    if dtype is torch.bfloat16 or str(scheme.steps[-1]) not in ("mxfp4", "nvfp4"):
        return None
    return (
        f"compressed-tensors decodes 4-bit floats to bfloat16 only, and the weights are {dtype}",
        "write the checkpoint in bfloat16 (--dtype bfloat16)",
    )


def _symmetric(_c: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    if not str(scheme.steps[-1]).endswith(":asym"):
        return None
    return (
        "transformers expects packed zero points in another shape and does not load them",
        "plan the scheme without ':asym', or write for vLLM (--target vllm)",
    )


def _plain_experts(component: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    if component.expert is None or re.match(r"(?:gptq:)?int", str(scheme.steps[-1])):
        return None
    return (
        "transformers unpacks experts to dense weights from packed integers alone, and never "
        "quantizes their inputs",
        "plan int8 or int4:gN for them, or write for vLLM (--target vllm)",
    )


def _vllm_bits(_c: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    found = re.match(r"(?:gptq:)?int(\d)(?::g(\d+))?", str(scheme.steps[-1]))
    if found is None or (found[1] in "48" and int(found[2] or 32) in _VLLM_GROUPS):
        return None
    sizes = ", ".join(map(str, _VLLM_GROUPS))
    return (
        f"vLLM loads integers of 4 and 8 bits, by channel or in groups of {sizes}",
        "plan such a scheme (dtm search --couple vllm)",
    )


def _vllm_nvfp4(component: Component, scheme: Scheme, _d: torch.dtype) -> tuple[str, str] | None:
    fused = component.kind in ("q", "k", "v", "gate", "up", "expert")
    if not fused or str(scheme.steps[-1]) != "nvfp4":
        return None
    return (
        "it has a scale of its own over its groups' scales, and vLLM takes one for all that it "
        "fuses",
        "plan another scheme for it, such as int4:g32 or fp8",
    )


def _vllm_symmetric_experts(
    component: Component, scheme: Scheme, _d: torch.dtype
) -> tuple[str, str] | None:
    if component.expert is None or not str(scheme.steps[-1]).endswith(":asym"):
        return None
    return (
        "vLLM takes symmetric integers only for experts",
        "plan the scheme without ':asym'",
    )


_COMMON: tuple[_Rule, ...] = (_packable, _no_end, _no_conv1d, _known_experts)
_TRANSFORMERS: tuple[_Rule, ...] = (
    _no_set_weight,
    _batched_inputs,
    _fp4_in_bf16,
    _symmetric,
    _plain_experts,
)
_VLLM: tuple[_Rule, ...] = (_vllm_bits, _vllm_nvfp4, _vllm_symmetric_experts)


# --- components that share a scheme ---


def _broken_groups(
    plan: Plan, components: Sequence[Component], target: Coupling
) -> Iterator[Problem]:
    """Components that must share a scheme and do not."""
    names, kinds = [c.name for c in components], [c.kind for c in components]
    for group in coupled(names, kinds, target):
        schemes = [str(plan.schemes.get(names[i], "unchanged")) for i in group]
        if len(set(schemes)) == 1:
            continue
        at = next(i for i, scheme in enumerate(schemes) if scheme != schemes[0])
        of = "routed experts" if kinds[group[0]] == "expert" else "matrices that are fused there"
        yield Problem(
            names[group[at]],
            schemes[at],
            f"{target} takes one scheme for all {len(group)} {of}, and {names[group[0]]} has "
            f"{schemes[0]}",
            f"search again with --couple {target}, over a sweep of all of them, or write the plan "
            "dense (--dense)",
        )


def _dense_experts(plan: Plan, components: Sequence[Component]) -> list[Problem]:
    """Experts that stay dense in a checkpoint where something else is in codes."""
    packed = any(not is_kept_dense(scheme) for scheme in plan.schemes.values())
    for component in components:
        scheme = plan.schemes.get(component.name)
        if packed and component.expert is not None and (scheme is None or is_kept_dense(scheme)):
            return [
                Problem(
                    component.name,
                    "unchanged" if scheme is None else str(scheme),
                    "transformers unpacks all experts of a compressed checkpoint, and loses those "
                    "that are not in codes",
                    "give all of them one scheme, such as int8, or write the plan dense (--dense)",
                )
            ]
    return []
