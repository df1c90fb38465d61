"""How much each weight matters, and how much harm it does to let the least of them go.

Fisher: a weight's own second-order term of KL(model ‖ model without it), ½ w² F with F the mean
square of the gradients of drawn labels, sequence by sequence; the criterion of Optimal Brain Damage
(LeCun et al. 1990) with the true Fisher. The draws are noisy for one weight, so half of F is
smoothed to the product of its row and column means, which has Wanda's form: an input's norm times
an output's (Sun et al. 2024).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from divergent_tokens.backward import outer
from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.units import Unit, whole
from divergent_tokens.errors import ModelError, SchemeError
from divergent_tokens.labels import draw_labels
from divergent_tokens.measure.head import Head, find_head
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.scores import chunk_tokens
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.models import Model
from divergent_tokens.offload import is_offloaded

Criterion = Literal["magnitude", "wanda", "fisher"]
SMOOTHED = 0.5
"""The share of F that is smoothed."""
BATCH = 4
"""Sequences at once; each one's gradient is looked at on its own."""
LEVELS = tuple(np.round([*np.arange(0, 0.96, 0.05), 0.98, 0.99], 2).tolist())
"""Shares that harm is told for."""

Meet = Callable[[int, Tensor], None]
"""A component's number and its gradients by sequence [sequence, out, in]."""


@dataclass(frozen=True)
class Saliencies:
    """Of every weight of some components, and the harm of letting the least of each unit go."""

    units: tuple[Unit, ...]
    """What gets a sparsity of its own, component by component."""
    values: tuple[Tensor, ...]
    """Of each component, [out, in], float32, not negative; in nats per token for `fisher`."""
    harm: NDArray[np.float64] | None
    """KL in nats per token by `LEVELS`, second order, by the gradients; [unit, level]"""


def check_components(
    components: Sequence[Component], criterion: Criterion, *, with_harm: bool = False
) -> None:
    """Raise SchemeError for what is not pruned, or a criterion cannot see."""
    ends = [c.name for c in components if c.is_end]
    if ends:
        raise SchemeError(f"{ends[0]} is not pruned: only matrices of the layers are; exclude it")
    stacked = [c.name for c in components if c.expert is not None]
    if stacked and (criterion != "magnitude" or with_harm):
        raise SchemeError(
            f"{criterion}{', allotted by kl,' if with_harm else ''} needs what goes into each "
            f"matrix, and experts ({stacked[0]}) see some tokens only; exclude them, or take "
            "--criterion magnitude --allocate uniform"
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
    unit go. `with_harm` costs backward passes for
    every criterion; with a `teacher`, from which the model has moved, the slope of
    KL(teacher ‖ model) is part of it.
    """
    check_components(components, criterion, with_harm=with_harm)
    units = whole(components) if units is None else tuple(units)
    if is_offloaded(model.network):
        raise ModelError(
            f"layers of {model.reference} wait outside {model.device}, where weights are not "
            "pruned; load the model whole: another --device, or a smaller model"
        )
    rng = np.random.default_rng(seed)
    n = min(n_sequences, len(sequences.ids))
    ids = torch.from_numpy(sequences.ids[rng.permutation(len(sequences.ids))[:n]])
    weights = [weight_of(model.network, c).float() for c in components]
    if criterion == "wanda":
        norms = _input_norms(model, components, ids)
        values = [w.abs() * norm for w, norm in zip(weights, norms, strict=True)]
    elif criterion == "fisher":
        squares = [torch.zeros_like(w) for w in weights]

        def add_squares(i: int, gradients: Tensor) -> None:
            squares[i] += gradients.square().sum(0)

        _gradients(model, components, ids, add_squares, seed, None, progress)
        n_tokens = n * (ids.shape[1] - 1)
        values = [
            0.5 * w.square() * _smoothed(square / n_tokens)
            for w, square in zip(weights, squares, strict=True)
        ]
    else:
        values = [w.abs() for w in weights]
    harm = None
    if with_harm:
        harm = _harm(model, components, units, values, ids, by_rows, teacher, seed, progress)
    return Saliencies(tuple(units), tuple(values), harm)


def _smoothed(fisher: Tensor) -> Tensor:
    rows, columns = fisher.mean(1, keepdim=True), fisher.mean(0, keepdim=True)
    whole = rows * columns / fisher.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (1 - SMOOTHED) * fisher + SMOOTHED * whole


def _input_norms(model: Model, components: Sequence[Component], ids: Tensor) -> list[Tensor]:
    """‖x‖₂ over all tokens, of each input of each component. [in]"""
    devices = [weight_of(model.network, c).device for c in components]
    sums = [
        torch.zeros(c.shape[1], device=device)
        for c, device in zip(components, devices, strict=True)
    ]

    def add(i: int, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        sums[i] += inputs[0].detach().float().square().flatten(0, -2).sum(0)

    head = find_head(model.network)
    with ExitStack() as stack:
        for i, component in enumerate(components):
            hook = _module(model, component).register_forward_pre_hook(partial(add, i))
            stack.callback(hook.remove)
        for batch in torch.split(ids, BATCH):
            head.hidden(batch.to(model.device))
    return [total.sqrt() for total in sums]


def _module(model: Model, component: Component) -> nn.Module:
    return model.network.get_submodule(component.parameter.rpartition(".")[0])


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
) -> NDArray[np.float64]:
    """KL by level: E[s²] / (2L), s = −Σ ⟨g, w⟩ over what goes, and the slope. [unit, level]

    Each weight is put once into the stretch between two levels in which it goes, so that a
    sequence costs one pass over the weights for all levels of all units.
    """
    own: list[list[int]] = [[] for _ in components]
    for u, unit in enumerate(units):
        own[unit.owner].append(u)
    places = [
        _places(value, [units[u] for u in which], by_rows)
        for value, which in zip(values, own, strict=True)
    ]
    n_tokens = len(ids) * (ids.shape[1] - 1)
    found = np.zeros((len(units), len(LEVELS)))

    def moved(i: int, gradients: Tensor) -> Tensor:
        """Σ −⟨g, w⟩ up to each level. [sequence, unit, level]"""
        products = (gradients * weight_of(model.network, components[i]).float()).flatten(1)
        shape = (len(products), len(own[i]), len(LEVELS) + 1)
        sums = products.new_zeros(shape, dtype=torch.float64).flatten(1)
        index = places[i].flatten().long().expand(len(products), -1)
        sums.scatter_add_(1, index, products.double())
        return -sums.view(shape)[..., :-1].cumsum(-1)

    def add_squares(i: int, gradients: Tensor) -> None:
        found[own[i]] += moved(i, gradients).square().sum(0).cpu().numpy() / (2 * n_tokens)

    def add_slope(i: int, gradients: Tensor) -> None:
        found[own[i]] += moved(i, gradients).sum(0).cpu().numpy() / n_tokens

    _gradients(model, components, ids, add_squares, seed + 1, None, progress)
    if teacher is not None:
        _gradients(model, components, ids, add_slope, seed, find_head(teacher.network), progress)
    return found


def _places(saliency: Tensor, units: Sequence[Unit], by_rows: bool) -> Tensor:
    """Where each weight's product is added up: by unit, then by stretch. int32 [out, in]"""
    found = torch.empty_like(saliency, dtype=torch.int32)
    for place, unit in enumerate(units):
        stretches = _stretches(unit.of(saliency), by_rows)
        unit.of(found).copy_(stretches.int() + place * (len(LEVELS) + 1))
    return found


def _stretches(saliency: Tensor, by_rows: bool) -> Tensor:
    """At which of the `LEVELS` each weight goes: the first whose share it is within.

    What never goes has the number behind the last level. uint8, in the saliency's shape.
    """
    rows = saliency if by_rows else saliency.flatten()[None]
    order = rows.argsort(dim=1, stable=True)
    ends = torch.tensor([round(level * rows.shape[1]) for level in LEVELS], device=rows.device)
    ranks = torch.arange(rows.shape[1], device=rows.device)
    level = torch.searchsorted(ends, ranks, right=True).to(torch.uint8)
    found = torch.empty_like(rows, dtype=torch.uint8)
    found.scatter_(1, order, level.expand(len(rows), -1).contiguous())
    return found.view(saliency.shape)


# --- gradients ---


def _gradients(
    model: Model,
    components: Sequence[Component],
    ids: Tensor,
    meet: Meet,
    seed: int,
    teacher: Head | None,
    progress: Progress,
) -> None:
    """Every component's gradients, sequence by sequence, handed to `meet`.

    Of the summed log-probability of labels drawn from the model itself; with a teacher, of the
    summed KL(teacher ‖ model).
    """
    head = find_head(model.network)
    generator = torch.Generator().manual_seed(seed)
    shape: list[int] = []
    with _watching(model, components, meet, shape) as start:
        for done, batch in enumerate(torch.split(ids, BATCH)):
            own = batch.to(model.device)
            shape[:] = own.shape
            uniforms = torch.rand(own[:, 1:].numel(), generator=generator, dtype=torch.float64)
            with torch.enable_grad():
                hidden = head.hidden(own)[:, :-1].flatten(0, 1)
                soft = None if teacher is None else _states(teacher, own)
                gradient = _at_hidden(head, hidden.detach(), uniforms, teacher, soft)
                torch.autograd.grad(hidden, start(), gradient)
            progress("saliency", (done + 1) * BATCH, len(ids), "sequences")


def _states(head: Head, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return head.hidden(ids)[:, :-1].flatten(0, 1)


def _at_hidden(
    head: Head, hidden: Tensor, uniforms: Tensor, teacher: Head | None, soft: Tensor | None
) -> Tensor:
    """The gradient at hidden states [token, hidden], a chunk of the vocabulary's rows at a time."""
    found = torch.empty_like(hidden)
    with torch.no_grad():
        n = max(1, chunk_tokens(head, hidden) // 2)
    for a in range(0, len(hidden), n):
        part = hidden[a : a + n].clone().requires_grad_(True)
        logps = head.logits(part).log_softmax(-1)
        if teacher is None or soft is None:
            labels = draw_labels(logps.detach().exp(), uniforms[None, a : a + n])[0]
            value = logps.gather(-1, labels[:, None]).sum()
        else:
            with torch.no_grad():
                wanted = teacher.logits(soft[a : a + n]).log_softmax(-1)
            value = (wanted.exp() * (wanted - logps)).sum()
        (found[a : a + n],) = torch.autograd.grad(value, part)
    return found


@contextmanager
def _watching(
    model: Model, components: Sequence[Component], meet: Meet, shape: Sequence[int]
) -> Iterator[Callable[[], Tensor]]:
    """Components' products meet their gradients; what is yielded gives where the graph starts.

    `shape` holds how many sequences a batch has, and tokens each.
    """
    leaves: list[Tensor] = []

    def at_embedding(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        leaves[:] = [output.detach().requires_grad_(True)]
        return leaves[0]

    def at_module(i: int, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(partial(meet_with, i, x))  # type: ignore[no-untyped-call]

    def meet_with(i: int, x: Tensor, delta: Tensor) -> None:
        if x.shape[:-1].numel() != shape[0] * shape[1]:
            raise SchemeError(
                f"{components[i].name} does not see every token, so that its gradients cannot be "
                "told apart by sequence; exclude it"
            )
        left = delta.reshape(shape[0], -1, delta.shape[-1])
        meet(i, outer(left, x.reshape(shape[0], -1, x.shape[-1])))

    network: Any = model.network
    with ExitStack() as stack:
        stack.callback(network.get_input_embeddings().register_forward_hook(at_embedding).remove)
        for i, component in enumerate(components):
            hook = partial(at_module, i)
            stack.callback(_module(model, component).register_forward_hook(hook).remove)
        yield lambda: leaves[0]
