"""A network from the middle on: what comes before a changed layer is not computed again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from divergent_tokens.layers import decoder_layers, with_forward
from divergent_tokens.measure.batches import (
    SHARE_OF_MEMORY,
    BatchSize,
    free_bytes,
    padded,
    run_batches,
)
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head
from divergent_tokens.measure.progress import silent
from divergent_tokens.measure.states import by_length, completion_states, hidden_batches
from divergent_tokens.models import Model

CHECKED = 8
"""Prompts on which it is checked that leaving layers out is the same computation."""


class _Reached(Exception):  # noqa: N818  # not an error: it carries a layer's input out of the forward
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class LayerRuns:
    """The base's inputs of one layer after the other, from which the rest is run again.

    The network's own forward runs, with the real ids: masks and positions come from it. Layers
    before the kept one give back what they are given, and the kept one takes the kept input. That
    this is the same computation is checked, bit for bit, on some prompts; where it is not (what
    some networks hand from layer to layer beside the hidden states), everything runs in full.
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
        self._layers = list(decoder_layers(model.network)[1])
        self._n_returned: dict[int, int | None] = {}
        """How many things a layer returns; None for one tensor and no tuple."""
        sequences, order = completions.sequences(), by_length(completions)
        self._batches = [order[a : a + batch_size] for a in range(0, len(order), batch_size)]
        self._ids = [padded([sequences[i] for i in b], model.device) for b in self._batches]
        self._inputs: list[Tensor] = []
        self.layer = 0
        """Whose inputs are kept."""
        self.refusal: str | None = None
        """Why everything runs in full; None where layers are left out."""
        try:
            self._check(self._ids[0][:CHECKED])
        except Exception as error:  # whatever a network does not like: full passes always work
            self.refusal = f"{type(error).__name__}: {error}"

    @torch.no_grad()
    def go_to(self, layer: int) -> None:
        """Keep the inputs of this layer, which comes after the one that is kept now."""
        if self.refusal is not None:
            return
        if layer < self.layer:
            raise ValueError(f"layer {layer} comes before layer {self.layer}, which is kept")
        if not self._inputs:
            self._inputs = [self._placed(self._run(ids, stop=0)) for ids in self._ids]
        while self.layer < layer:
            for k, ids in enumerate(self._ids):
                kept = self._inputs[k].to(ids.device)
                found = self._run(ids, start=self.layer, kept=kept, stop=self.layer + 1)
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
        if layer != self.layer or not self._inputs:
            raise ValueError(f"the inputs of layer {layer} are not kept; go_to({layer}) first")
        for batch, ids, kept in zip(self._batches, self._ids, self._inputs, strict=True):
            run = partial(self._finish, batch, ids, kept)
            # One run as a rule; more where the memory does not suffice for changed weights too.
            parts = [rows for _, rows in run_batches(range(len(batch)), self._batch_size, run)]
            yield batch, [row for rows in parts for row in rows]

    @torch.no_grad()
    def _finish(
        self, batch: Sequence[int], ids: Tensor, kept: Tensor, part: Sequence[int]
    ) -> list[Tensor]:
        """States at the completions of some of a batch's prompts."""
        rows = slice(part[0], part[-1] + 1)
        hidden = self._run(ids[rows], start=self.layer, kept=kept[rows].to(ids.device))
        return completion_states(self._model, self._completions, batch[rows], ids[rows], hidden)

    def _run(
        self,
        ids: Tensor,
        *,
        start: int = 0,
        kept: Tensor | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Layer `stop`'s input, or the final hidden states, from layer `start`'s input on.

        [prompt, token] -> [prompt, token, hidden]
        """
        with ExitStack() as stack:
            for i, layer in enumerate(self._layers[:start]):
                stack.enter_context(with_forward(layer, partial(_skip, self._n_returned[i])))
            if kept is not None:
                layer = self._layers[start]
                forward = partial(self._take, start, layer.forward, kept)
                stack.enter_context(with_forward(layer, forward))
            if stop is not None:
                stack.enter_context(with_forward(self._layers[stop], _leave))
            try:
                return self._head.hidden(ids)
            except _Reached as reached:
                return reached.hidden

    def _take(
        self, i: int, forward: Callable[..., Any], kept: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """What layer i makes of the kept input, with all else that the network gives it."""
        given = _first(args, kwargs)
        if given.shape != kept.shape:
            raise ValueError(f"layer {i} gets {list(given.shape)}, kept was {list(kept.shape)}")
        if args:
            output = forward(kept, *args[1:], **kwargs)
        else:
            output = forward(**{**kwargs, "hidden_states": kept})
        self._n_returned[i] = len(output) if isinstance(output, tuple) else None
        return output

    def _check(self, ids: Tensor) -> None:
        """Raise where layer after layer, or from the middle on, is not the whole forward."""
        n = len(self._layers)
        if len(set(map(id, self._layers))) < n:
            raise ValueError("a layer stands in the network more than once")
        whole = self._head.hidden(ids)
        kept = self._run(ids, stop=0)
        for i in range(n):
            if i in (n // 2, n - 1):
                self._head.hidden(ids.flip(1))  # what a layer may have left behind is not ours now
                if not torch.equal(self._run(ids, start=i, kept=kept), whole):
                    raise ValueError(f"from layer {i} on other hidden states come out")
            if i < n - 1:
                kept = self._run(ids, start=i, kept=kept, stop=i + 1)

    def _placed(self, hidden: Tensor) -> Tensor:
        """On the accelerator if all batches' inputs fit there, else on the CPU."""
        if not hidden.is_cuda:
            return hidden
        n_tokens = sum(ids.numel() for ids in self._ids)
        needed = n_tokens * hidden.shape[-1] * hidden.element_size()
        free = free_bytes(hidden.device)
        taken = sum(kept.numel() * kept.element_size() for kept in self._inputs if kept.is_cuda)
        return hidden if needed < SHARE_OF_MEMORY * (free + taken) else hidden.cpu()


def _skip(n_returned: int | None, *args: Any, **kwargs: Any) -> Any:
    """What a layer is given, in the form in which it returns."""
    hidden = _first(args, kwargs)
    return hidden if n_returned is None else (hidden, *[None] * (n_returned - 1))


def _leave(*args: Any, **kwargs: Any) -> Any:
    raise _Reached(_first(args, kwargs))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
