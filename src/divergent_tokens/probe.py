"""The probe: every component under every scheme, judged by one forward and one backward pass.

A change of a component moves its output at token t by dz_t, on the base's own inputs. Let labels be
drawn from the base's own distribution at each token of the completion, and δ_t be the gradient of
their summed log-probability at that output. With s = Σ_t ⟨δ_t, dz_t⟩ over a prompt, E[s²] / (2 L)
is the second-order term of KL(base ‖ changed), in nats per token: a draw of ½ ΔWᵀ F ΔW / L with F
the Fisher matrix. The labels come from the model, so it is the true Fisher and not the empirical
one (Kunstner, Balles, Hennig 2019, arXiv 1905.12558). t runs over the prompt's tokens too: a change
there reaches the completion through attention.

All components' s come from the same backward pass, which needs no gradient of any weight.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.expert_forward import (
    ExpertInputs,
    grouped_product,
    open_experts,
)
from divergent_tokens.compress.schemes import Activations, Scheme
from divergent_tokens.errors import ModelError
from divergent_tokens.measure.batches import BatchSize, padded, run_batches
from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.head import Head, find_head
from divergent_tokens.measure.intervals import pooled
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.scores import chunk_tokens
from divergent_tokens.measure.states import by_length
from divergent_tokens.models import Model

FIRST_TRY = {"cpu": 8, "cuda": 32}
"""Sequences at once: a backward pass needs the activations of all layers."""
PRODUCT_BYTES = 512 * 2**20
"""Size of the float32 products [prompt, out, in] of one component that are held at once."""
KEPT_BYTES = 2 * 2**30
"""So many bytes of changes are kept from batch to batch; others are made again."""


@dataclass(frozen=True)
class Probe:
    """One signed number a component, scheme, prompt and draw; all that plans are judged by."""

    components: tuple[Component, ...]
    schemes: tuple[Scheme, ...]
    draws: NDArray[np.float32]
    """s. [component, scheme, prompt, draw]"""
    weight_errors: NDArray[np.float64]
    """‖W′ − W‖ / ‖W‖, Frobenius. [component, scheme]"""
    lengths: NDArray[np.int64]
    """L of each completion. [prompt]"""
    batch_size: int


def probe(
    base: Model,
    components: Sequence[Component],
    schemes: Sequence[Scheme],
    completions: Completions,
    *,
    n_draws: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress = silent,
) -> Probe:
    """The draws of all components under all schemes, `n_draws` sets of labels a prompt.

    Changes and draws are computed in float32 whatever the model runs in. The changes of one
    component live at once, and `KEPT_BYTES` of others. The labels depend on the seed, the prompt
    and the number of the draw alone.

    Raises SchemeError where a scheme does not fit a component, and ModelError where a component
    does not see all tokens of a prompt in order, or its experts cannot be run one by one.
    """
    for scheme in schemes:
        scheme.check(components)
    head = find_head(base.network)
    size = BatchSize(batch_size or FIRST_TRY.get(base.device.type, FIRST_TRY["cpu"]))
    if any(c.expert is not None and c.stack_index is None for c in components):
        size.value = 1  # modules of their own, which see some tokens of all prompts together
    sums = _Sums(base, components, schemes, n_draws)
    draws = np.zeros((len(components), len(schemes), len(completions.prompts), n_draws), np.float32)
    order = by_length(completions)
    done = 0
    with sums.watching():
        run = partial(_run, base, head, completions, sums, seed)
        for batch, found in run_batches(order, size, run):
            draws[:, :, list(batch)] = found
            done += len(batch)
            progress("probe", done, len(order), "prompts")
    return Probe(
        tuple(components),
        tuple(schemes),
        draws,
        sums.weight_errors,
        completions.lengths,
        size.value,
    )


def kl_of(draws: NDArray[Any], lengths: NDArray[np.int64]) -> tuple[float, float | None]:
    """KL in nats per token, and its standard error over prompts, from s [prompt, draw].

    Σ s² / (2 Σ L), draws averaged within a prompt first. For a plan give the sum of its components'
    s: interactions are in it (E[s_i s_j] / L).
    """
    return pooled(0.5 * np.square(draws.astype(np.float64)).mean(-1), lengths)


# --- one batch ---


def _run(
    base: Model,
    head: Head,
    completions: Completions,
    sums: "_Sums",
    seed: int,
    batch: Sequence[int],
) -> NDArray[np.float32]:
    """s of a batch's prompts. [component, scheme, prompt, draw]"""
    sequences = completions.sequences()
    ids = padded([sequences[i] for i in batch], base.device)
    sums.start(ids)
    starts = [len(completions.prompts.prompts[i].ids) - 1 for i in batch]
    rows = np.repeat(np.arange(len(batch)), completions.lengths[list(batch)])
    positions = np.concatenate(
        [np.arange(completions.lengths[i]) + a for i, a in zip(batch, starts, strict=True)]
    )
    with torch.enable_grad():
        hidden = head.hidden(ids)
        chosen = hidden[torch.from_numpy(rows), torch.from_numpy(positions)]  # [token, hidden]
        uniforms = torch.cat([_uniforms(completions, i, sums.n_draws, seed) for i in batch], 1)
        gradients = _head_gradients(head, chosen.detach(), uniforms, sums, rows)
        for draw, gradient in enumerate(gradients):
            sums.draw = draw
            last = draw == sums.n_draws - 1
            torch.autograd.grad(chosen, sums.leaf, gradient, retain_graph=not last)
    return sums.take()


def _uniforms(completions: Completions, prompt: int, n_draws: int, seed: int) -> Tensor:
    """What decides the labels of one prompt's tokens. [draw, token]"""
    digest = completions.prompts.prompts[prompt].digest
    rows = []
    for draw in range(n_draws):
        number = hashlib.sha256(f"{seed} {digest} {draw}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(number[:8], "big") >> 1)
        length = int(completions.lengths[prompt])
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def draw_labels(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Labels [draw, token] of distributions [token, vocab], by inverting their sums at uniforms."""
    sums = probabilities.double().cumsum(-1)
    wanted = uniforms.t().to(sums.device) * sums[:, -1:]
    labels = torch.searchsorted(sums, wanted.contiguous(), right=True)
    return labels.clamp(max=probabilities.shape[1] - 1).t()


def _head_gradients(
    head: Head, hidden: Tensor, uniforms: Tensor, sums: "_Sums", rows: NDArray[np.int64]
) -> Tensor:
    """Gradients of the labels' log-probabilities at hidden states [token, hidden], by draw.

    Chunk by chunk, so that the vocabulary is never held for all tokens. [draw, token, hidden]
    """
    found = hidden.new_zeros((sums.n_draws, *hidden.shape))
    with torch.no_grad():
        n = chunk_tokens(head, hidden)
    for a in range(0, len(hidden), n):
        part = hidden[a : a + n].clone().requires_grad_(True)
        sums.head_rows = torch.from_numpy(rows[a : a + n]).to(hidden.device)
        logps = head.logits(part).log_softmax(-1)
        labels = draw_labels(logps.detach().exp(), uniforms[:, a : a + n])
        for draw in range(sums.n_draws):
            sums.draw = draw
            own = logps.gather(-1, labels[draw, :, None]).sum()
            last = draw == sums.n_draws - 1
            (found[draw, a : a + n],) = torch.autograd.grad(own, part, retain_graph=not last)
    sums.head_rows = None
    return found


# --- what the backward pass leaves behind ---


class _Sums:
    """The s of one batch while its gradients pass by, and the changes that they are met with."""

    def __init__(
        self, base: Model, components: Sequence[Component], schemes: Sequence[Scheme], n_draws: int
    ) -> None:
        """For these components and schemes; nothing is hooked before `watching`."""
        self.base = base
        self.components = components
        self.schemes = schemes
        self.n_draws = n_draws
        self.draw = 0
        """Which set of labels the gradients that come in belong to."""
        self.head_rows: Tensor | None = None
        """While a chunk of the head runs: each of its tokens' row in the batch. [token]"""
        self.weight_errors = np.full((len(components), len(schemes)), np.nan)
        self._changes: dict[int | tuple[str, str, int], Tensor] = {}
        self._kept_bytes = 0
        self._experts: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        """Stack and part -> expert -> component."""
        for i, component in enumerate(components):
            if component.stack_index is not None:
                stack = component.parameter.rpartition(".")[0]
                part = component.name.rpartition(".")[2]
                self._experts[stack, part][component.stack_index] = i

    def start(self, ids: Tensor) -> None:
        """A batch [prompt, token] begins."""
        self.ids = ids
        shape = (self.n_draws, len(self.components), len(self.schemes), len(ids))
        self._found = torch.zeros(shape, device=ids.device)

    def take(self) -> NDArray[np.float32]:
        """The batch's s. [component, scheme, prompt, draw]"""
        found: NDArray[np.float32] = self._found.permute(1, 2, 3, 0).cpu().numpy()
        return found

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every component's inputs and output gradients come by here; the hooks go away again."""
        network: Any = self.base.network
        stacked = [c for c in self.components if c.stack_index is not None]
        with ExitStack() as stack:
            embedding = network.get_input_embeddings()
            stack.callback(embedding.register_forward_hook(self._at_embedding).remove)
            for i, component in enumerate(self.components):
                if component.stack_index is not None:
                    continue
                for module in _modules(network, component):
                    if module is embedding:
                        continue  # its output is the leaf
                    hook = partial(self._at_module, i)
                    stack.callback(module.register_forward_hook(hook).remove)
            stack.enter_context(open_experts(network, stacked, self._at_experts))
            yield

    def _at_embedding(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The graph starts here: no weight needs a gradient."""
        if not torch.is_grad_enabled():
            return output
        self.leaf = output.detach().requires_grad_(True)
        for i, component in enumerate(self.components):
            if module in _modules(self.base.network, component):
                _watch(self.leaf, partial(self._add_embedding, i, module, inputs[0]))
        return self.leaf

    def _at_module(self, i: int, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = inputs[0].detach()
        if self.head_rows is not None:
            rows = self.head_rows
            _watch(output, lambda delta: self._add_rows(i, x.flatten(0, -2), delta, rows))
            return
        n_tokens = x.shape[:-1].numel()
        if n_tokens != self.ids.numel():
            raise ModelError(
                f"{self.components[i].name} sees {n_tokens} tokens where the batch has "
                f"{self.ids.numel()}; the probe cannot tell which prompt they belong to. Exclude "
                "it, or use --method measure"
            )
        _watch(output, lambda delta: self._add_whole(i, x, delta))

    def _at_experts(self, inputs: ExpertInputs, times: Callable[[Tensor], Tensor]) -> Tensor:
        out = times(inputs.x)
        if (inputs.stack, inputs.part) in self._experts and out.requires_grad:
            _watch(out, partial(self._add_experts, inputs))
        return out

    def _add_whole(self, i: int, x: Tensor, delta: Tensor) -> None:
        """All tokens of all prompts, in order: s = ⟨Σ_t δ_t x_tᵀ, ΔW⟩, one product for all schemes.

        Where a scheme quantizes the inputs too, dz = W′ x′ − W x = ΔW x′ + W (x′ − x).
        """
        n_prompts = len(self.ids)
        x = x.reshape(n_prompts, -1, x.shape[-1])  # [prompt, token, in]
        delta = delta.reshape(n_prompts, -1, delta.shape[-1])  # [prompt, token, out]
        changes = self._changes_of(i)  # [scheme, out, in]
        n = max(1, PRODUCT_BYTES // (4 * changes[0].numel()))
        for activations, schemes in self._by_activations().items():
            for a in range(0, n_prompts, n):
                part, gradient = x[a : a + n], delta[a : a + n]
                changed = part if activations is None else activations.quantize(part)
                values = _inner(_outer(gradient, changed), changes[schemes])
                if activations is not None:
                    weight = weight_of(self.base.network, self.components[i]).float()
                    moved = changed.float() - part.float()
                    values = values + _inner(_outer(gradient, moved), weight[None])
                self._found[self.draw, i, schemes, a : a + n] += values

    def _add_rows(self, i: int, x: Tensor, delta: Tensor, prompts: Tensor) -> None:
        """Some tokens [token, in] of prompts [token]: s token by token, then summed by prompt."""
        delta = delta.reshape(len(x), -1).float()
        changes = self._changes_of(i)
        for activations, schemes in self._by_activations().items():
            changed = x if activations is None else activations.quantize(x)
            for j in schemes:
                dz = changed.float() @ changes[j].t()
                if activations is not None:
                    weight = weight_of(self.base.network, self.components[i]).float()
                    dz += (changed.float() - x.float()) @ weight.t()
                self._found[self.draw, i, j].index_add_(0, prompts, (dz * delta).sum(-1))

    def _add_experts(self, inputs: ExpertInputs, delta: Tensor) -> None:
        """All rows of all experts of a part: one grouped product for each scheme."""
        members = self._experts[inputs.stack, inputs.part]  # expert -> component
        experts, which = list(members), list(members.values())
        n_prompts = len(self.ids)
        places = inputs.experts * n_prompts + inputs.tokens // self.ids.shape[1]
        x = inputs.x.detach()
        for j, scheme in enumerate(self.schemes):
            changed = x if scheme.activations is None else scheme.activations.quantize(x)
            changes = self._changes_of_experts(inputs, j)  # [expert, out, in]
            dz = grouped_product(changed.float(), changes, inputs.counts)
            if scheme.activations is not None:
                weights = self._weights_of_experts(inputs)
                dz += grouped_product(changed.float() - x.float(), weights, inputs.counts)
            values = dz.new_zeros(len(inputs.counts) * n_prompts)
            values.index_add_(0, places, (dz * delta.float()).sum(-1))
            self._found[self.draw, which, j] += values.view(-1, n_prompts)[experts]

    def _add_embedding(self, i: int, module: nn.Module, ids: Tensor, delta: Tensor) -> None:
        """The change of looked-up rows, by the module's own lookup (Gemma scales it)."""
        weight = weight_of(self.base.network, self.components[i])
        for j, change in enumerate(self._changes_of(i)):
            changed = {"weight": (weight.float() + change).to(weight.dtype)}
            with torch.no_grad():
                after = torch.func.functional_call(module, changed, (ids,))
                dz = after.float() - module(ids).float()
            self._found[self.draw, i, j] += (dz * delta.float()).sum((1, 2))

    def _by_activations(self) -> Mapping[Activations | None, list[int]]:
        groups: dict[Activations | None, list[int]] = defaultdict(list)
        for j, scheme in enumerate(self.schemes):
            groups[scheme.activations].append(j)
        return groups

    @torch.no_grad()
    def _changes_of(self, i: int) -> Tensor:
        """ΔW of one component under every scheme, float32. [scheme, out, in]"""
        if i in self._changes:
            return self._changes[i]
        component = self.components[i]
        weight = weight_of(self.base.network, component)
        changes = torch.stack(
            [s.compress(weight, component).float() - weight.float() for s in self.schemes]
        )
        self.weight_errors[i] = _relative(changes, weight[None]).cpu()
        self._keep(i, changes)
        return changes

    @torch.no_grad()
    def _changes_of_experts(self, inputs: ExpertInputs, j: int) -> Tensor:
        """ΔW of a part of all experts under one scheme, float32. [expert, out, in]"""
        key = (inputs.stack, inputs.part, j)
        if key in self._changes:
            return self._changes[key]
        scheme, members = self.schemes[j], self._experts[inputs.stack, inputs.part]
        weights = self._weights_of_experts(inputs)
        if scheme.by_rows:  # all experts' rows in one go
            first = self.components[next(iter(members.values()))]
            stored = weights.to(first.dtype).flatten(0, 1)
            changed = scheme.compress(stored, first).float().view_as(weights)
        else:
            changed = weights.clone()
            for expert, i in members.items():
                component = self.components[i]
                weight = weight_of(self.base.network, component)
                changed[expert] = scheme.compress(weight, component).float()
        changes = changed - weights
        experts, which = list(members), list(members.values())
        self.weight_errors[which, j] = _relative(changes, weights)[experts].cpu()
        self._keep(key, changes)
        return changes

    def _weights_of_experts(self, inputs: ExpertInputs) -> Tensor:
        """Of all experts, float32. [expert, out, in]"""
        component = self.components[next(iter(self._experts[inputs.stack, inputs.part].values()))]
        weights = self.base.network.get_parameter(component.parameter).detach()
        if component.transposed:
            weights = weights.transpose(1, 2)
        if component.rows is not None:
            weights = weights[:, slice(*component.rows)]
        whole: Tensor = weights[: len(inputs.counts)]
        return whole.float()

    def _keep(self, key: int | tuple[str, str, int], changes: Tensor) -> None:
        n_bytes = changes.numel() * changes.element_size()
        if self._kept_bytes + n_bytes <= KEPT_BYTES:
            self._changes[key] = changes
            self._kept_bytes += n_bytes


def _relative(changes: Tensor, weights: Tensor) -> Tensor:
    """‖ΔW‖ / ‖W‖, NaN for a matrix of zeros: [..., out, in] -> [...]."""
    norm = torch.linalg.matrix_norm
    errors: Tensor = norm(changes.double()) / norm(weights.double())
    return errors


def _watch(output: Tensor, meet: Callable[[Tensor], None]) -> None:
    """Call `meet` with the gradient at an output, in every backward pass through it."""
    output.register_hook(meet)  # type: ignore[no-untyped-call]


def _modules(network: Any, component: Component) -> list[nn.Module]:
    """The modules that compute with a component's matrix: more than one where weights are tied."""
    parameter = network.get_parameter(component.parameter)
    if component.layer is not None:
        return [network.get_submodule(component.parameter.rpartition(".")[0])]
    ends = (network.get_input_embeddings(), network.get_output_embeddings())
    return [module for module in ends if getattr(module, "weight", None) is parameter]


def _outer(delta: Tensor, x: Tensor) -> Tensor:
    """Σ_t δ_t x_tᵀ, float32: [prompt, token, out], [prompt, token, in] -> [prompt, out, in]."""
    left = delta.transpose(1, 2)
    if x.is_cuda and x.dtype == delta.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, x, out_dtype=torch.float32)
    return torch.bmm(left.float(), x.float())


def _inner(products: Tensor, changes: Tensor) -> Tensor:
    """⟨product, change⟩: [prompt, out, in] and [scheme, out, in] -> [scheme, prompt]."""
    return changes.flatten(1) @ products.flatten(1).t()
