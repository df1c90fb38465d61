"""Single experts inside the fused 3-D tensors of a mixture: which slice, which axis, which half.

A wrong axis would be silent: a square [out, in] and its transpose look the same. So the layout is
taken from what transformers declares on the module, or from a table of classes that were read, is
then checked against the shapes, and is otherwise said to be unknown.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from divergent_tokens.errors import ModelError


@dataclass(frozen=True)
class ExpertSlice:
    """One matrix of one expert, and where it lies in the module's parameters."""

    part: str
    """gate_proj, up_proj or down_proj."""
    parameter: str
    """The module's own parameter that holds it, [expert, ., .]."""
    index: int
    """Along the first axis."""
    shape: tuple[int, int]
    """[out, in]."""
    transposed: bool
    """The slice is stored as [in, out]."""
    rows: tuple[int, int, int] | None
    """Start, stop, step of its rows among the output rows of gate and up together."""


@dataclass(frozen=True)
class _Layout:
    transposed: bool
    """Slices are [in, out] instead of [out, in]."""
    interleaved: bool
    """Output rows go gate, up, gate, up; otherwise all of gate before all of up."""


_READ = {
    # modeling_llama4.py: bmm(x, gate_up_proj).chunk(2)
    "Llama4TextExperts": _Layout(transposed=True, interleaved=False),
    # modeling_longcat_flash.py: linear(x, gate_up_proj[e]).chunk(2); the experts beyond those
    # of down_proj are identities, whose gate_up rows are never used
    "LongcatFlashExperts": _Layout(transposed=False, interleaved=False),
    # modeling_step3p7.py: linear(x, gate_up_proj[e]).chunk(2)
    "Step3p7Experts": _Layout(transposed=False, interleaved=False),
    # modeling_inkling.py: gate_proj [E, I, H], up_proj and down_proj on their own
    "InklingSharedExperts": _Layout(transposed=False, interleaved=False),
}
"""Classes of transformers that hold fused experts and declare nothing, as their code reads."""


def is_expert_stack(module: nn.Module) -> bool:
    """Whether the module itself holds weights that are neither a matrix nor a convolution.

    True for every class of transformers that stacks experts, known or not: a 3-D parameter, or
    (DBRX) several experts below each other in a 2-D parameter of a class named for its experts.
    """
    named_so = "expert" in type(module).__name__.lower()
    return not isinstance(module, nn.modules.conv._ConvNd) and any(
        (parameter.ndim == 3 and min(parameter.shape) > 1)
        or (parameter.ndim == 2 and named_so and not name.endswith("bias"))
        for name, parameter in module.named_parameters(recurse=False)
    )


def expert_slices(module: nn.Module) -> Iterator[ExpertSlice]:
    """Every matrix of every expert, expert by expert.

    Raises ModelError if the layout is not known or the shapes contradict it.
    """
    layout = _layout(module)
    weights = dict(module.named_parameters(recurse=False))
    if "down_proj" not in weights or not {"gate_up_proj", "up_proj"} & weights.keys():
        raise ModelError(
            f"{type(module).__name__} holds {sorted(weights)}, expected down_proj and either "
            "gate_up_proj or up_proj"
        )
    n_experts = weights["down_proj"].shape[0]
    parts = _parts(module, weights, layout)
    for index in range(n_experts):
        for part, parameter, shape, rows in parts:
            yield ExpertSlice(part, parameter, index, shape, layout.transposed, rows)


_Part = tuple[str, str, tuple[int, int], tuple[int, int, int] | None]


def _parts(module: nn.Module, weights: Mapping[str, Tensor], layout: _Layout) -> list[_Part]:
    """Name, parameter, [out, in] and rows of the matrices that each expert has."""
    hidden, inner = _out_in(weights["down_proj"], layout)  # down: inner -> hidden
    down: _Part = ("down_proj", "down_proj", (hidden, inner), None)
    shape = (inner, hidden)
    if "gate_up_proj" in weights:
        _check_shape(module, "gate_up_proj", weights, layout, (2 * inner, hidden))
        gate_rows, up_rows = (0, inner, 1), (inner, 2 * inner, 1)
        if layout.interleaved:
            gate_rows, up_rows = (0, 2 * inner, 2), (1, 2 * inner, 2)
        return [
            ("gate_proj", "gate_up_proj", shape, gate_rows),
            ("up_proj", "gate_up_proj", shape, up_rows),
            down,
        ]
    parts: list[_Part] = [
        (name, name, shape, None) for name in ("gate_proj", "up_proj") if name in weights
    ]
    for name, *_ in parts:
        _check_shape(module, name, weights, layout, shape)
    return [*parts, down]


def _layout(module: nn.Module) -> _Layout:
    declared = [getattr(module, name, None) for name in ("is_transposed", "is_concatenated")]
    if all(isinstance(flag, bool) for flag in declared):
        # Set by transformers' `use_experts_implementation`, whose own kernels go by it.
        transposed, concatenated = declared
        return _Layout(transposed=bool(transposed), interleaved=not concatenated)
    name = type(module).__name__
    if name in _READ and type(module).__module__.startswith("transformers.models."):
        return _READ[name]
    shapes = {n: list(p.shape) for n, p in module.named_parameters(recurse=False)}
    raise ModelError(
        f"the layout of its stacked weights is not known ({name} holds {shapes}, and does not "
        "declare is_transposed and is_concatenated)"
    )


def _out_in(stack: Tensor, layout: _Layout) -> tuple[int, int]:
    _, first, second = stack.shape
    return (second, first) if layout.transposed else (first, second)


def _check_shape(
    module: nn.Module,
    name: str,
    weights: Mapping[str, Tensor],
    layout: _Layout,
    expected: tuple[int, int],
) -> None:
    n_experts = weights["down_proj"].shape[0]
    found = weights[name]
    if _out_in(found, layout) != expected or found.shape[0] < n_experts:
        raise ModelError(
            f"{type(module).__name__}.{name} is {list(found.shape)}, which does not go with "
            f"down_proj {list(weights['down_proj'].shape)} and {layout}: expected "
            f"{n_experts} experts of [out, in] = {list(expected)}"
        )
