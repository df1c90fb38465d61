"""A network from the middle on: what comes before a changed layer is not computed again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from divergent_tokens.measure.batches import BatchSize, in_batches, padded
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head
from divergent_tokens.measure.progress import silent
from divergent_tokens.measure.segments import CHECKED, Segments, kept_for_later, through
from divergent_tokens.measure.states import by_length, completion_states, hidden_batches
from divergent_tokens.models import Model
from divergent_tokens.offload import at_hand

Batches = list[tuple[Sequence[int], list[Tensor]]]
"""Prompts with their hidden states [token, hidden], as `hidden_batches` gives them."""


class LayerRuns:
    """The base's inputs of one layer after the other, from which the rest is run again.

    That this is the same computation is checked, bit for bit, on some prompts; where it is not
    (what some networks hand from layer to layer beside the hidden states), everything runs in full.
    """

    @torch.no_grad()
    def __init__(
        self, model: Model, head: Head, completions: Completions, *, batch_size: int
    ) -> None:
        """Ready at the first layer; the model has its own weights now, and whenever `go_to` runs.

        The batches are those of `hidden_batches` with this size.
        """
        self._model, self._head, self._completions = model, head, completions
        self._batch_size = BatchSize(batch_size)
        self._segments = Segments(head)
        sequences, order = completions.sequences(), by_length(completions)
        self._batches = in_batches(order, self._batch_size)
        self._ids = [padded([sequences[i] for i in b], model.device) for b in self._batches]
        self._inputs: list[Tensor] = []
        self.layer = 0
        """Whose inputs are kept."""
        self.refusal = self._segments.refusal(self._ids[0][:CHECKED])
        """Why everything runs in full; None where layers are left out."""

    @property
    def n_tokens(self) -> int:
        """Of all batches, padding included."""
        return sum(ids.numel() for ids in self._ids)

    @torch.no_grad()
    def go_to(self, layer: int) -> None:
        """Keep the inputs of this layer, which comes after the one that is kept now."""
        if self.refusal is not None:
            return
        if layer < self.layer:
            raise ValueError(f"layer {layer} comes before layer {self.layer}, which is kept")
        if not self._inputs:
            self._inputs = [self._placed(self._segments.run(ids, stop=0)) for ids in self._ids]
        while self.layer < layer:
            with at_hand(self._segments.layers[self.layer]):
                for k, ids in enumerate(self._ids):
                    found = self._through(ids, self._inputs[k], self.layer)
                    self._inputs[k] = self._placed(found)
            self.layer += 1

    def hidden(self, layer: int | None) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
        """As `hidden_batches` of the network with the weights that it has now.

        Nothing before `layer` may differ from the base; None where anything may.
        """
        if layer is None or self.refusal is not None:
            yield from hidden_batches(
                self._model, self._head, self._completions, self._batch_size, "", silent
            )
            return
        self._check_kept(layer)
        n = len(self._segments.layers)
        for batch, ids, kept in zip(self._batches, self._ids, self._inputs, strict=True):
            with torch.no_grad():
                hidden = through(self._segments, ids, kept, self._batch_size, start=layer, stop=n)
            yield batch, completion_states(self._model, self._completions, batch, ids, hidden)

    @torch.no_grad()
    def hidden_of_each(
        self, layer: int, lent: Sequence[Callable[[], AbstractContextManager[object]]]
    ) -> Iterator[Batches]:
        """As `hidden`, for each of several ways to lend this layer other weights.

        All of them pass one layer before the next is at hand: each layer's weights are read once.
        """
        self._check_kept(layer)
        found: list[list[Tensor]] = []
        n = len(lent) * len(self._ids)
        with at_hand(self._segments.layers[layer]):
            for lend in lent:
                with lend():
                    pairs = zip(self._ids, self._inputs, strict=True)
                    found.append([self._kept(self._through(*pair, layer), n) for pair in pairs])
        for i in range(layer + 1, len(self._segments.layers)):
            with at_hand(self._segments.layers[i]):
                for hidden in found:
                    for k, ids in enumerate(self._ids):
                        hidden[k] = self._kept(self._through(ids, hidden[k], i), n)
        found.reverse()
        while found:  # one after the other on the device
            yield self._at_completions(found.pop())

    def _check_kept(self, layer: int) -> None:
        if layer != self.layer or not self._inputs:
            raise ValueError(f"the inputs of layer {layer} are not kept; go_to({layer}) first")

    def _through(self, ids: Tensor, kept: Tensor, layer: int) -> Tensor:
        """What one layer makes of a batch."""
        return through(self._segments, ids, kept, self._batch_size, start=layer, stop=layer + 1)

    def _at_completions(self, hidden: Sequence[Tensor]) -> Batches:
        return [
            (
                batch,
                completion_states(
                    self._model, self._completions, batch, ids, one.to(self._model.device)
                ),
            )
            for batch, ids, one in zip(self._batches, self._ids, hidden, strict=True)
        ]

    def _placed(self, hidden: Tensor) -> Tensor:
        """On the accelerator if all batches' inputs fit there, else on the CPU."""
        taken = sum(kept.nbytes for kept in self._inputs if kept.is_cuda)
        return kept_for_later(hidden, len(self._ids), taken)

    def _kept(self, hidden: Tensor, n_like_it: int) -> Tensor:
        return kept_for_later(hidden, n_like_it)
