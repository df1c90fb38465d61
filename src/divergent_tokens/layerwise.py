"""The probe of a model that is larger than the device: layer by layer, forward and then back.

All prompts pass one layer before the next is at hand, so that each layer's weights are read once
for each direction. What goes into a layer is kept, and on the way back the layer runs again from
it: four thirds of the work, and the activations of one layer at a time.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.backward import Sums
from divergent_tokens.errors import ModelError
from divergent_tokens.labels import at_completions
from divergent_tokens.measure.batches import BatchSize, in_batches, padded
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head
from divergent_tokens.measure.progress import Progress
from divergent_tokens.measure.segments import Segments, kept_for_later, through, walks
from divergent_tokens.models import Model
from divergent_tokens.offload import at_hand


def probe_by_layers(
    base: Model,
    head: Head,
    completions: Completions,
    sums: Sums,
    seed: int,
    order: Sequence[int],
    size: BatchSize,
    progress: Progress,
) -> Iterator[tuple[Sequence[int], NDArray[np.float32]]]:
    """Batches of prompts with their s [component, scheme, prompt, draw].

    Call it before the sums watch, and go through it while they do. Raises ModelError for a network
    whose layers cannot be run one by one.
    """
    sequences = completions.sequences()
    batches = in_batches(order, size)
    ids = [padded([sequences[i] for i in batch], base.device) for batch in batches]
    if not walks(head, ids[0]):
        raise ModelError(
            f"layers of {base.reference} hand on more than hidden states, so they cannot be run "
            "one by one while their weights wait outside the device; load the model whole, or use "
            "--method measure"
        )
    return _both_ways(base, head, completions, sums, seed, batches, ids, size, progress)


def _both_ways(
    base: Model,
    head: Head,
    completions: Completions,
    sums: Sums,
    seed: int,
    batches: Sequence[Sequence[int]],
    ids: Sequence[Tensor],
    size: BatchSize,
    progress: Progress,
) -> Iterator[tuple[Sequence[int], NDArray[np.float32]]]:
    segments = Segments(head)
    n = len(segments.layers)
    inputs = _forward(segments, ids, size, progress)
    found = [sums.start(own) for own in ids]
    gradients: list[list[Tensor]] = [[] for _ in ids]
    for layer in reversed(range(n)):
        with at_hand(segments.layers[layer]), torch.enable_grad():
            for k, own in enumerate(ids):
                sums.start(own, found[k])
                start = _start(inputs[layer][k], own) if layer else None
                out = segments.run(own, start=layer, kept=start, stop=layer + 1)
                if layer == n - 1:
                    out, given = at_completions(
                        base, head, completions, sums, seed, batches[k], own, out
                    )
                    gradients[k] = list(given)
                gradients[k] = _back(sums, out, start, gradients[k], len(ids))
        inputs[layer] = []
        sums.changes.forget()
        progress("probe", 2 * n - 1 - layer, 2 * n - 1, "layers")
    for k, batch in enumerate(batches):
        sums.start(ids[k], found[k])
        yield batch, sums.take()


@torch.no_grad()
def _forward(
    segments: Segments, ids: Sequence[Tensor], size: BatchSize, progress: Progress
) -> list[list[Tensor]]:
    """What goes into each layer, by batch; the last layer does not run."""
    n = len(segments.layers)
    inputs = [[kept_for_later(segments.run(own, stop=0), n * len(ids)) for own in ids]]
    for layer in range(n - 1):
        with at_hand(segments.layers[layer]):
            outputs = [
                through(segments, own, kept, size, start=layer, stop=layer + 1)
                for own, kept in zip(ids, inputs[-1], strict=True)
            ]
        inputs.append([kept_for_later(out, n * len(ids)) for out in outputs])
        progress("probe", layer + 1, 2 * n - 1, "layers")
    return inputs


def _start(kept: Tensor, ids: Tensor) -> Tensor:
    """A layer's input, from which a graph begins."""
    return kept.to(ids.device).detach().requires_grad_(True)


def _back(
    sums: Sums, out: Tensor, start: Tensor | None, gradients: Sequence[Tensor], n_like_it: int
) -> list[Tensor]:
    """Gradients at a layer's input, of those at its output, by draw; None: at the embeddings."""
    leaf = sums.leaf if start is None else start
    found = []
    for draw, gradient in enumerate(gradients):
        sums.draw = draw
        more = draw < len(gradients) - 1
        (at,) = torch.autograd.grad(out, leaf, gradient.to(out.device), retain_graph=more)
        found.append(kept_for_later(at, n_like_it * len(gradients)))
    return found
