"""Gradients of every weight, sequence by sequence, as they pass by in one backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from divergent_tokens.backward import outer
from divergent_tokens.compress.components import Component
from divergent_tokens.compress.expert_forward import ExpertInputs, open_experts, stack_members
from divergent_tokens.errors import SchemeError
from divergent_tokens.labels import draw_labels
from divergent_tokens.measure.head import Head, find_head
from divergent_tokens.measure.progress import Progress
from divergent_tokens.measure.scores import chunk_tokens
from divergent_tokens.models import Model

BATCH = 4
"""Sequences at once; each one's gradient is looked at on its own."""

Meet = Callable[[int, Tensor], None]
"""A component's number and its gradients by sequence [sequence, out, in]."""


def sequence_gradients(
    model: Model,
    components: Sequence[Component],
    ids: Tensor,
    meet: Meet,
    seed: int,
    teacher: Head | None,
    progress: Progress,
) -> frozenset[int]:
    """Every component's gradients, sequence by sequence, handed to `meet`; who met any is returned.

    Of the summed log-probability of labels drawn from the model itself; with a teacher, of the
    summed KL(teacher ‖ model). An expert that no token is sent to meets nothing. Raises ModelError
    for experts that do not say how they compute.
    """
    head = find_head(model.network)
    generator = torch.Generator().manual_seed(seed)
    shape: list[int] = []
    met: set[int] = set()

    def meet_one(i: int, gradients: Tensor) -> None:
        met.add(i)
        meet(i, gradients)

    # Modules of single experts do not say which tokens they see; those of one sequence alone do.
    apart = any(c.expert is not None and c.stack_index is None for c in components)
    size = 1 if apart else BATCH
    with _watching(model, components, meet_one, shape) as start:
        for done, batch in enumerate(torch.split(ids, size)):
            own = batch.to(model.device)
            shape[:] = own.shape
            uniforms = torch.rand(own[:, 1:].numel(), generator=generator, dtype=torch.float64)
            with torch.enable_grad():
                hidden = head.hidden(own)[:, :-1].flatten(0, 1)
                soft = None if teacher is None else _states(teacher, own)
                gradient = _at_hidden(head, hidden.detach(), uniforms, teacher, soft)
                torch.autograd.grad(hidden, start(), gradient)
            progress("saliency", min((done + 1) * size, len(ids)), len(ids), "sequences")
    return frozenset(met)


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
        n_sequences, n_tokens = shape
        if x.shape[:-1].numel() != n_sequences * n_tokens and n_sequences > 1:
            raise SchemeError(
                f"{components[i].name} does not see every token, so that its gradients cannot be "
                "told apart by sequence; exclude it"
            )
        if x.numel():
            left = delta.reshape(n_sequences, -1, delta.shape[-1])
            meet(i, outer(left, x.reshape(n_sequences, -1, x.shape[-1])))

    def at_experts(inputs: ExpertInputs, times: Callable[[Tensor], Tensor]) -> Tensor:
        out = times(inputs.x)
        if out.requires_grad:
            out.register_hook(partial(meet_experts, inputs))  # type: ignore[no-untyped-call]
        return out

    def meet_experts(inputs: ExpertInputs, delta: Tensor) -> None:
        for expert, gradients in _by_expert(inputs, delta, *shape):
            place = members[inputs.stack, inputs.part].get(expert)
            if place is not None:
                meet(place, gradients)

    network: Any = model.network
    members = stack_members(components)
    with ExitStack() as stack:
        stack.callback(network.get_input_embeddings().register_forward_hook(at_embedding).remove)
        for i, component in enumerate(components):
            if component.stack_index is None:
                hook = partial(at_module, i)
                module = network.get_submodule(component.parameter.rpartition(".")[0])
                stack.callback(module.register_forward_hook(hook).remove)
        stack.enter_context(open_experts(network, components, at_experts))
        yield lambda: leaves[0]


def _by_expert(
    inputs: ExpertInputs, delta: Tensor, n_sequences: int, n_tokens: int
) -> Iterator[tuple[int, Tensor]]:
    """Experts that saw a token, each with its gradients [sequence, out, in].

    An expert's rows are in the order of the layer's tokens, and so of the sequences.
    """
    groups = inputs.experts * n_sequences + inputs.tokens // n_tokens
    n_groups = len(inputs.counts) * n_sequences
    lengths = torch.bincount(groups, minlength=n_groups).tolist()
    deltas, rows = torch.split(delta, lengths), torch.split(inputs.x.detach(), lengths)
    for a in range(0, n_groups, n_sequences):
        own = range(a, a + n_sequences)
        if any(lengths[g] for g in own):
            pieces = [outer(deltas[g][None], rows[g][None]) for g in own]
            yield a // n_sequences, torch.cat(pieces)
