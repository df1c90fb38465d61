"""What each matrix's part of a cut costs, and how far saliencies told too little of it.

A saliency is of one weight that goes alone. Where many go at once it may tell far too little: what
goes of one matrix adds up (attention's queries most), and the others go too. So the KL that the
whole cut brings is shared among the matrices by integrated gradients (Sundararajan et al. 2017,
equation 1) along the straight way from the weights as they are to the cut. The shares add up to it,
less exactly the more goes at once, since only two points on the way are looked at.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.gradients import sequence_gradients
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.models import Model

N_SEQUENCES = 32
"""Sequences that a cut is looked at on."""
POINTS = ((0.0, 0.5), (1.0, 0.5))
"""Places on the way, and their weights: the trapezoid rule."""
DOUBT = 0.3
"""Of the average matrix's cost, added to what is told and to what is found: a ratio of two small
numbers says little."""
LEAST, MOST = 0.25, 64.0
"""No saliency is scaled by less or more: too little is told often, and by far; too much rarely."""


@torch.no_grad()
def costs_of(
    model: Model,
    components: Sequence[Component],
    gone: Sequence[Tensor],
    teacher: Model,
    ids: Tensor,
    *,
    moved: bool = True,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """What letting the weights `gone` [bool, of each component] go adds to KL(teacher ‖ model).

    In nats per token, on sequences `ids` [sequence, token], by component; not a number for experts
    that no token is sent to. A model that has not `moved` from its teacher has no slope, and one
    pass less is made. The model is left as it was; the teacher is another network. Memory: the
    weights that go, and single matrices' gradients.
    """
    weights = [weight_of(model.network, component) for component in components]
    found = np.zeros(len(components))
    for place, share in POINTS:
        if place or moved:
            with _part_of_the_way(weights, gone, place) as going:
                slopes = _slopes(model, components, gone, going, teacher, ids, progress)
            found -= share * slopes
    return found / (len(ids) * (ids.shape[1] - 1))


def _slopes(
    model: Model,
    components: Sequence[Component],
    gone: Sequence[Tensor],
    going: Sequence[Tensor],
    teacher: Model,
    ids: Tensor,
    progress: Progress,
) -> NDArray[np.float64]:
    """⟨∇ Σ KL(teacher ‖ model), what goes⟩, by component; not a number where nothing is met."""
    found = np.full(len(components), np.nan)

    def meet(i: int, gradients: Tensor) -> None:
        slope = gradients.sum(0)[gone[i]].double() @ going[i].double()
        found[i] = np.nansum([found[i], float(slope)])

    sequence_gradients(model, components, ids, meet, 0, find_head(teacher.network), progress)
    return found


@contextmanager
def _part_of_the_way(
    weights: Sequence[Tensor], gone: Sequence[Tensor], place: float
) -> Iterator[list[Tensor]]:
    """What goes is smaller for a while; yields what goes, whole, of each matrix."""
    going = [weight[mask] for weight, mask in zip(weights, gone, strict=True)]
    try:
        for weight, mask, own in zip(weights, gone, going, strict=True):
            weight[mask] = own * (1 - place)
        yield going
    finally:
        for weight, mask, own in zip(weights, gone, going, strict=True):
            weight[mask] = own


def scales(
    costs: NDArray[np.float64],
    told: NDArray[np.float64],
    scale: NDArray[np.float64] | float = 1.0,
) -> NDArray[np.float64]:
    """By what to scale saliencies, by component: what a cut costs over what they told, in doubt 1.

    Both in nats per token; `told` by saliencies that have this `scale` already, which stays where
    nothing is seen. Only shares count: saliencies are compared with each other.
    """
    found = np.broadcast_to(scale, costs.shape).astype(np.float64)
    told = told / scale
    seen = np.isfinite(costs)
    total, expected = costs[seen].sum(), told[seen].sum()
    if total <= 0 or expected <= 0:  # a cut of so little that nothing can be seen
        return found
    doubt = DOUBT / seen.sum()
    ratio = (costs[seen] / total + doubt) / (told[seen] / expected + doubt)
    found[seen] = np.clip(ratio, LEAST, MOST)
    return found
