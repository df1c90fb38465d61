"""How much each weight matters, and how much harm it does to let the least of them go.

Fisher: a weight's own second-order term of KL(model ‖ model without it), ½ w² F with F the mean
square of the gradients of drawn labels, sequence by sequence; the criterion of Optimal Brain Damage
(LeCun et al. 1990) with the true Fisher. The draws are noisy for one weight, so half of F is
smoothed to the product of its row and column means, which has Wanda's form: an input's norm times
an output's (Sun et al. 2024).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.expert_forward import (
    ExpertInputs,
    check_experts,
    open_experts,
    stack_members,
)
from divergent_tokens.compress.units import Unit, whole
from divergent_tokens.errors import ModelError, SchemeError
from divergent_tokens.gradients import BATCH, sequence_gradients
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.models import Model
from divergent_tokens.offload import is_offloaded

Criterion = Literal["magnitude", "wanda", "fisher"]
SMOOTHED = 0.5
"""The share of F that is smoothed."""
LEVELS = tuple(np.round([*np.arange(0, 0.96, 0.05), 0.98, 0.99], 2).tolist())
"""Shares that harm is told for."""


@dataclass(frozen=True)
class Saliencies:
    """Of every weight of some components, and the harm of letting the least of each unit go."""

    units: tuple[Unit, ...]
    """What gets a sparsity of its own, component by component."""
    values: tuple[Tensor, ...]
    """Of each component, [out, in], float32, not negative; in nats per token for `fisher`."""
    harm: NDArray[np.float64] | None
    """KL in nats per token by `LEVELS`, second order, by the gradients; [unit, level]"""
    unseen: tuple[str, ...] = ()
    """Experts that no token was sent to; they count as the average of their layer's others."""


def check_components(
    network: PreTrainedModel,
    components: Sequence[Component],
    criterion: str,
    *,
    sees_inputs: bool = False,
) -> None:
    """Raise SchemeError for what is not pruned, ModelError for experts that cannot be seen."""
    ends = [c.name for c in components if c.is_end]
    if ends:
        raise SchemeError(f"{ends[0]} is not pruned: only matrices of the layers are; exclude it")
    if criterion != "magnitude" or sees_inputs:
        check_experts(network, components)


def check_whole(model: Model) -> None:
    """Raise ModelError for a model whose weights are not all on their devices."""
    if is_offloaded(model.network):
        raise ModelError(
            f"layers of {model.reference} wait outside {model.device}, where weights are not "
            "pruned; load the model whole: another --device, or a smaller model"
        )


@torch.no_grad()
def find_saliencies(
    model: Model,
    components: Sequence[Component],
    criterion: Criterion,
    sequences: Sequences,
    *,
    n_sequences: int = 64,
    units: Sequence[Unit] | None = None,
    by_rows: bool = False,
    with_harm: bool = False,
    teacher: Model | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Saliencies:
    """Saliencies of the model as it is now, on some sequences drawn by the seed.

    `units`: whole components if left out. `by_rows`: harm is of letting the least of each row of a
    unit go. `with_harm` costs backward passes for every criterion; with a `teacher`, from which the
    model has moved, the slope of KL(teacher ‖ model) is part of it. Memory: one float32 copy of the
    weights, a byte of each for harm, and single matrices beside it.
    """
    check_components(model.network, components, criterion, sees_inputs=with_harm)
    units = whole(components) if units is None else tuple(units)
    check_whole(model)
    rng = np.random.default_rng(seed)
    n = min(n_sequences, len(sequences.ids))
    ids = torch.from_numpy(sequences.ids[rng.permutation(len(sequences.ids))[:n]])
    weights = [weight_of(model.network, c) for c in components]
    seen = frozenset(range(len(components)))
    if criterion == "wanda":
        norms, seen = _input_norms(model, components, ids)
        values = [w.float().abs() * norm for w, norm in zip(weights, norms, strict=True)]
        for i in _unseen(components, seen):
            values[i] = weights[i].float().abs()
    elif criterion == "fisher":
        squares = [torch.zeros_like(w, dtype=torch.float32) for w in weights]

        def add_squares(i: int, gradients: Tensor) -> None:
            for one in gradients:
                squares[i].addcmul_(one, one)

        seen = sequence_gradients(model, components, ids, add_squares, seed, None, progress)
        for i, others in _unseen(components, seen).items():
            squares[i].fill_(float(np.mean([float(squares[j].mean()) for j in others])))
        n_tokens = n * (ids.shape[1] - 1)
        for weight, square in zip(weights, squares, strict=True):
            square.copy_(0.5 * weight.float().square() * _smoothed(square / n_tokens))
        values = squares
    else:
        values = [w.float().abs() for w in weights]
    harm = None
    if with_harm:
        harm, seen = _harm(model, components, units, values, ids, by_rows, teacher, seed, progress)
    unseen = tuple(components[i].name for i in _unseen(components, seen))
    return Saliencies(tuple(units), tuple(values), harm, unseen)


def _unseen(components: Sequence[Component], seen: Set[int]) -> dict[int, list[int]]:
    """Every expert that no token was sent to -> its layer's others, the same part, that saw some.

    Raises SchemeError where there is no other.
    """
    # As harmless as they look they would go first, and whole, and another text may need them. So
    # they count as an average expert, which is more than a rare one is worth.
    others: dict[tuple[Any, ...], list[int]] = defaultdict(list)

    def like(component: Component) -> tuple[Any, ...]:
        return component.layer, component.name.rpartition(".")[2], component.shape

    for i in sorted(seen):
        if components[i].expert is not None:
            others[like(components[i])].append(i)
    found = {
        i: others[like(component)]
        for i, component in enumerate(components)
        if component.expert is not None and i not in seen
    }
    for i, alike in found.items():
        if not alike:
            raise SchemeError(
                f"no token was sent to {components[i].name}, nor to another expert beside it that "
                "is pruned, so that nothing is known of it; exclude it, or give more --data"
            )
    return found


def _smoothed(fisher: Tensor) -> Tensor:
    rows, columns = fisher.mean(1, keepdim=True), fisher.mean(0, keepdim=True)
    whole = rows * columns / fisher.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (1 - SMOOTHED) * fisher + SMOOTHED * whole


def _input_norms(
    model: Model, components: Sequence[Component], ids: Tensor
) -> tuple[list[Tensor], frozenset[int]]:
    """‖x‖₂ over all tokens, of each input of each component [in]; and who saw a token."""
    devices = [weight_of(model.network, c).device for c in components]
    sums = [
        torch.zeros(c.shape[1], device=device)
        for c, device in zip(components, devices, strict=True)
    ]
    seen: set[int] = set()
    members = stack_members(components)

    def add(i: int, x: Tensor) -> None:
        if x.numel():
            seen.add(i)
            sums[i] += x.detach().float().square().flatten(0, -2).sum(0)

    def at_experts(inputs: ExpertInputs, times: Callable[[Tensor], Tensor]) -> Tensor:
        rows = torch.split(inputs.x, inputs.counts.tolist())
        for expert, i in members[inputs.stack, inputs.part].items():
            add(i, rows[expert])
        return times(inputs.x)

    head = find_head(model.network)
    with ExitStack() as stack:
        for i, component in enumerate(components):
            if component.stack_index is None:
                module = model.network.get_submodule(component.parameter.rpartition(".")[0])
                hook = module.register_forward_pre_hook(partial(_at_module, partial(add, i)))
                stack.callback(hook.remove)
        stack.enter_context(open_experts(model.network, components, at_experts))
        for batch in torch.split(ids, BATCH):
            head.hidden(batch.to(model.device))
    return [total.sqrt() for total in sums], frozenset(seen)


def _at_module(add: Callable[[Tensor], None], _module: nn.Module, inputs: tuple[Any, ...]) -> None:
    add(inputs[0])


# --- harm ---


def _harm(
    model: Model,
    components: Sequence[Component],
    units: Sequence[Unit],
    values: Sequence[Tensor],
    ids: Tensor,
    by_rows: bool,
    teacher: Model | None,
    seed: int,
    progress: Progress,
) -> tuple[NDArray[np.float64], frozenset[int]]:
    """KL by level: E[s²] / (2L), s = −Σ ⟨g, w⟩ over what goes, and the slope. [unit, level]

    With it which components saw a token.

    Each weight is put once into the stretch between two levels in which it goes, so that a
    sequence costs one pass over the weights for all levels of all units.
    """
    own: list[list[int]] = [[] for _ in components]
    for u, unit in enumerate(units):
        own[unit.owner].append(u)
    levels = [
        _levels_by_unit(value, [units[u] for u in which], by_rows)
        for value, which in zip(values, own, strict=True)
    ]
    n_tokens = len(ids) * (ids.shape[1] - 1)
    found = np.zeros((len(units), len(LEVELS)))

    def moved(i: int, gradients: Tensor) -> Tensor:
        """Σ −⟨g, w⟩ up to each level. [sequence, unit, level]"""
        products = (gradients * weight_of(model.network, components[i]).float()).flatten(1)
        shape = (len(products), len(own[i]), len(LEVELS) + 1)
        sums = products.new_zeros(shape, dtype=torch.float64).flatten(1)
        places = levels[i].long()
        for place, u in enumerate(own[i]):
            units[u].of(places).add_(place * (len(LEVELS) + 1))
        sums.scatter_add_(1, places.flatten().expand(len(products), -1), products.double())
        return -sums.view(shape)[..., :-1].cumsum(-1)

    def add_squares(i: int, gradients: Tensor) -> None:
        found[own[i]] += moved(i, gradients).square().sum(0).cpu().numpy() / (2 * n_tokens)

    def add_slope(i: int, gradients: Tensor) -> None:
        found[own[i]] += moved(i, gradients).sum(0).cpu().numpy() / n_tokens

    seen = sequence_gradients(model, components, ids, add_squares, seed + 1, None, progress)
    if teacher is not None:
        head = find_head(teacher.network)
        sequence_gradients(model, components, ids, add_slope, seed, head, progress)
    for i, others in _unseen(components, seen).items():
        found[own[i]] = np.mean([found[own[j]] for j in others], 0)
    return found, seen


def _levels_by_unit(saliency: Tensor, units: Sequence[Unit], by_rows: bool) -> Tensor:
    """`levels_of` each of these units of a component. uint8 [out, in]"""
    found = torch.empty_like(saliency, dtype=torch.uint8)
    for unit in units:
        unit.of(found).copy_(levels_of(unit.of(saliency), by_rows))
    return found


def levels_of(saliency: Tensor, by_rows: bool) -> Tensor:
    """At which of the `LEVELS` each weight goes, by its number: the first whose share it is within.

    What never goes has the number behind the last level. One sort, of the whole or of each row.
    uint8, in the saliency's shape.
    """
    rows = saliency if by_rows else saliency.flatten()[None]
    order = rows.argsort(dim=1, stable=True)
    ends = torch.tensor([round(level * rows.shape[1]) for level in LEVELS], device=rows.device)
    ranks = torch.arange(rows.shape[1], device=rows.device)
    level = torch.searchsorted(ends, ranks, right=True).to(torch.uint8)
    found = torch.empty_like(rows, dtype=torch.uint8)
    found.scatter_(1, order, level.expand(len(rows), -1).contiguous())
    return found.view(saliency.shape)
