"""A network run from one layer's input to another's, by its own forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from divergent_tokens.layers import decoder_layers, with_forward
from divergent_tokens.measure.batches import SHARE_OF_MEMORY, BatchSize, free_bytes, run_batches
from divergent_tokens.measure.head import Head
from divergent_tokens.offload import at_hand, is_offloaded

CHECKED = 8
"""Prompts on which it is checked that leaving layers out is the same computation."""

_refusals: "WeakKeyDictionary[Any, str | None]" = WeakKeyDictionary()
"""Of networks that were checked."""


class _Reached(Exception):  # noqa: N818  # not an error: it carries a layer's input out of the forward
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Segments:
    """The layers of a network, some of which run.

    The network's own forward runs, with the real ids: masks and positions come from it. Layers
    before the first wanted one give back what they are given, and that one takes an input that was
    kept.
    """

    def __init__(self, head: Head) -> None:
        """Of the head's network."""
        self._head = head
        self.layers = list(decoder_layers(head.network)[1])
        self._n_returned: dict[int, int | None] = {}
        """How many things a layer returns; None for one tensor and no tuple."""

    def run(
        self,
        ids: Tensor,
        *,
        start: int = 0,
        kept: Tensor | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """Layer `stop`'s input, or the final hidden states, from layer `start`'s input on.

        All layers before `start` must have run from a kept input once. A stop behind the last layer
        is none. [prompt, token] -> [prompt, token, hidden]
        """
        with ExitStack() as stack:
            for i, layer in enumerate(self.layers[:start]):
                stack.enter_context(with_forward(layer, partial(_skip, self._n_returned[i])))
            if kept is not None:
                layer = self.layers[start]
                forward = partial(self._take, start, layer.forward, kept)
                stack.enter_context(with_forward(layer, forward))
            if stop is not None and stop < len(self.layers):
                stack.enter_context(with_forward(self.layers[stop], _leave))
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

    @torch.no_grad()
    def refusal(self, ids: Tensor) -> str | None:
        """Why layers cannot be left out; None where, on these ids, it is the same bit for bit."""
        try:
            self._check(ids)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a network does not like: full passes always work
            return f"{type(error).__name__}: {error}"
        return None

    def _check(self, ids: Tensor) -> None:
        """Raise where layer after layer, or from the middle on, is not the whole forward."""
        n = len(self.layers)
        if len(set(map(id, self.layers))) < n:
            raise ValueError("a layer stands in the network more than once")
        whole = self._head.hidden(ids)
        kept = self.run(ids, stop=0)
        for i in range(n):
            if i in (n // 2, n - 1):
                self._head.hidden(ids.flip(1))  # what a layer may have left behind is not ours now
                if not torch.equal(self.run(ids, start=i, kept=kept), whole):
                    raise ValueError(f"from layer {i} on other hidden states come out")
            if i < n - 1:
                kept = self.run(ids, start=i, kept=kept, stop=i + 1)


def walks(head: Head, ids: Tensor) -> bool:
    """Whether the network's weights wait elsewhere and its layers can run one by one.

    Checked once for each network, on one sequence of the ids.
    """
    if not is_offloaded(head.network):
        return False
    if head.network not in _refusals:
        _refusals[head.network] = Segments(head).refusal(ids[:1])
    return _refusals[head.network] is None


@torch.no_grad()
def walk(
    head: Head,
    batches: Sequence[Tensor],
    size: BatchSize,
    on_layer: Callable[[int, int, str], None] | None = None,
) -> Iterator[Tensor]:
    """Final hidden states of batches of ids [prompt, token], each layer's weights read once.

    All batches pass one layer before the next is at hand. [prompt, token, hidden]
    """
    segments = Segments(head)
    n = len(segments.layers)
    kept = [kept_for_later(segments.run(ids, stop=0), len(batches)) for ids in batches]
    for i, layer in enumerate(segments.layers):
        with at_hand(layer):
            for k, ids in enumerate(batches):
                found = through(segments, ids, kept[k], size, start=i, stop=i + 1)
                kept[k] = kept_for_later(found, len(batches))
        if on_layer is not None:
            on_layer(i + 1, n, "layers")
    yield from (hidden.to(ids.device) for hidden, ids in zip(kept, batches, strict=True))


def through(
    segments: Segments, ids: Tensor, kept: Tensor, size: BatchSize, *, start: int, stop: int
) -> Tensor:
    """As `Segments.run` for a batch, in parts where the memory does not suffice for it whole."""

    def run(part: Sequence[int]) -> Tensor:
        rows = slice(part[0], part[-1] + 1)
        return segments.run(
            ids[rows], start=start, kept=kept[rows].to(ids.device, non_blocking=True), stop=stop
        )

    parts = [found for _, found in run_batches(range(len(ids)), size, run)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def kept_for_later(hidden: Tensor, n_like_it: int, taken: int = 0) -> Tensor:
    """On the accelerator if so many of them fit there, else in page-locked memory of the CPU.

    `taken` are bytes of those that are there already.
    """
    if not hidden.is_cuda:
        return hidden
    if n_like_it * hidden.nbytes < SHARE_OF_MEMORY * (free_bytes(hidden.device) + taken):
        return hidden
    spilled = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
    return spilled.copy_(hidden)


def _skip(n_returned: int | None, *args: Any, **kwargs: Any) -> Any:
    """What a layer is given, in the form in which it returns."""
    hidden = _first(args, kwargs)
    return hidden if n_returned is None else (hidden, *[None] * (n_returned - 1))


def _leave(*args: Any, **kwargs: Any) -> Any:
    raise _Reached(_first(args, kwargs))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
