"""What a backward pass leaves behind: every component's gradients met with its changes."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergent_tokens.compiled import compiled
from divergent_tokens.compress.changes import Changes
from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.expert_forward import ExpertInputs, grouped_product, open_experts
from divergent_tokens.compress.schemes import Activations, Scheme
from divergent_tokens.errors import ModelError
from divergent_tokens.models import Model
from divergent_tokens.watched import Meeting, watched

PRODUCT_BYTES = 512 * 2**20
"""Size of the float32 products [prompt, out, in] of one component that are held at once."""
OPERATIONS_A_BYTE = {"half": 300, "float": 20}
"""How much arithmetic takes as long as moving a byte: on tensor cores, and elsewhere."""


class Sums:
    """The s of one batch, added up while its gradients pass by."""

    def __init__(
        self,
        base: Model,
        components: Sequence[Component],
        schemes: Sequence[Scheme],
        n_draws: int,
        n_tokens: int,
        *,
        keep: bool = True,
        fused: bool = False,
        in_compiled: bool = False,
    ) -> None:
        """For sequences of up to so many tokens; nothing is hooked before `watching`.

        `keep`: changes are asked for more than once. `fused`: what works element by element is done
        by compiled kernels. `in_compiled`: layers run compiled, whose components are linear.
        """
        self.base = base
        self.components = components
        self.schemes = schemes
        self.n_draws = n_draws
        self.draw = 0
        """Which set of labels the gradients that come in belong to."""
        self.head_rows: Tensor | None = None
        """While a chunk of the head runs: each of its tokens' row in the batch. [token]"""
        # Products of gradients would underflow in float16.
        fast = base.device.type == "cuda" and base.dtype == torch.bfloat16
        balance = OPERATIONS_A_BYTE["half" if fast else "float"]
        self.moves = (len(schemes) - 1) * n_tokens < 4 * balance
        """Whether each scheme's dz is made; else one matrix for all schemes, see `_add_whole`."""
        self.dtype = base.dtype if fast and self.moves else torch.float32
        """Of changes and products; sums are float32."""
        self.changes = Changes(
            base.network, components, schemes, self.dtype, keep=keep, fused=fused
        )
        self._dots = compiled(_dots) if fused else _dots
        self._in_compiled = in_compiled
        self._ends = [i for i, component in enumerate(components) if component.is_end]

    def start(self, ids: Tensor, found: Tensor | None = None) -> Tensor:
        """A batch [prompt, token] begins, or goes on with what was found of it.

        What will be found: [draw, component, scheme, prompt]
        """
        self.ids = ids
        shape = (self.n_draws, len(self.components), len(self.schemes), len(ids))
        self._found = torch.zeros(shape, device=ids.device) if found is None else found
        return self._found

    def take(self) -> NDArray[np.float32]:
        """The batch's s. [component, scheme, prompt, draw]"""
        found: NDArray[np.float32] = self._found.permute(1, 2, 3, 0).cpu().numpy()
        return found

    def check_all_met(self) -> None:
        """Raise ModelError for a component of the layers whose changes met no gradient."""
        for i, component in enumerate(self.components):
            if not component.is_end and not self.changes.was_made(i):
                raise ModelError(
                    f"{component.name} met no gradient while layers ran compiled; give --no-compile"
                )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Every component's inputs and output gradients come by here; the hooks go away again."""
        network: Any = self.base.network
        stacked = [c for c in self.components if c.stack_index is not None]
        with ExitStack() as stack:
            embedding = network.get_input_embeddings()
            stack.callback(embedding.register_forward_hook(self._at_embedding).remove)
            meetings: dict[nn.Linear, Meeting] = {}
            for i, component in enumerate(self.components):
                if component.stack_index is not None:
                    continue
                for module in _modules(network, component):
                    if module is embedding:
                        continue  # its output is the leaf
                    if self._in_compiled and not component.is_end:
                        meetings[module] = partial(self._add_checked, i)  # type: ignore[index]
                        continue
                    hook = partial(self._at_module, i)
                    stack.callback(module.register_forward_hook(hook).remove)
            stack.enter_context(watched(meetings))
            stack.enter_context(open_experts(network, stacked, self._at_experts))
            yield

    def _at_embedding(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """The graph starts here: no weight needs a gradient."""
        if not torch.is_grad_enabled():
            return output
        self.leaf = output.detach().requires_grad_(True)
        for i in self._ends:
            if module in _modules(self.base.network, self.components[i]):
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
        self._check_tokens(i, x)
        _watch(output, lambda delta: self._add_whole(i, x, delta))

    def _check_tokens(self, i: int, x: Tensor) -> None:
        n_tokens = x.shape[:-1].numel()
        if n_tokens != self.ids.numel():
            raise ModelError(
                f"{self.components[i].name} sees {n_tokens} tokens where the batch has "
                f"{self.ids.numel()}; the probe cannot tell which prompt they belong to. Exclude "
                "it, or use --method measure"
            )

    def _add_checked(self, i: int, x: Tensor, delta: Tensor) -> None:
        self._check_tokens(i, x)
        self._add_whole(i, x, delta)

    def _at_experts(self, inputs: ExpertInputs, times: Callable[[Tensor], Tensor]) -> Tensor:
        out = times(inputs.x)
        if self.changes.members(inputs.stack, inputs.part) and out.requires_grad:
            _watch(out, partial(self._add_experts, inputs))
        return out

    def _add_whole(self, i: int, x: Tensor, delta: Tensor) -> None:
        """All tokens of all prompts, in order.

        Either s = Σ_t ⟨δ_t, ΔW x_t⟩ scheme by scheme, or s = ⟨Σ_t δ_t x_tᵀ, ΔW⟩ with one product
        for all schemes, but of the size of ΔW for each prompt: what takes less time.
        """
        n_prompts = len(self.ids)
        x = x.reshape(n_prompts, -1, x.shape[-1])  # [prompt, token, in]
        delta = delta.reshape(n_prompts, -1, delta.shape[-1])  # [prompt, token, out]
        add = self._add_moves if self.moves else self._add_products
        for activations, schemes in self._by_activations().items():
            add(i, x, delta, activations, schemes)

    def _add_moves(
        self, i: int, x: Tensor, delta: Tensor, activations: Activations | None, schemes: list[int]
    ) -> None:
        gradients = delta.to(self.dtype)
        for j, dz in self._moves(i, x, activations, schemes):
            self._found[self.draw, i, j] += self._here(self._dots(dz, gradients).sum(-1))

    def _moves(
        self, i: int, x: Tensor, activations: Activations | None, schemes: list[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """Schemes with dz, x [..., in] -> [..., out].

        Where a scheme quantizes the inputs too, dz = W′ x′ − W x = ΔW x′ + W (x′ − x).
        """
        changed = x if activations is None else activations.quantize(x)
        moved = None
        if activations is not None:
            weight = weight_of(self.base.network, self.components[i]).to(self.dtype)
            moved = (changed.float() - x.float()).to(self.dtype) @ weight.t()
        changes = self.changes.of(i)
        for j in schemes:
            dz = changed.to(self.dtype) @ changes[j].t()
            yield j, dz if moved is None else dz.add_(moved)

    def _add_products(
        self, i: int, x: Tensor, delta: Tensor, activations: Activations | None, schemes: list[int]
    ) -> None:
        every = self.changes.of(i)
        changes = torch.stack([every[j] for j in schemes])  # [scheme, out, in]
        n = max(1, PRODUCT_BYTES // (4 * changes[0].numel()))
        for a in range(0, len(x), n):
            part, gradient = x[a : a + n], delta[a : a + n]
            changed = part if activations is None else activations.quantize(part)
            values = _inner(outer(gradient, changed), changes)
            if activations is not None:
                weight = weight_of(self.base.network, self.components[i]).float()
                moved = changed.float() - part.float()
                values = values + _inner(outer(gradient, moved), weight[None])
            self._found[self.draw, i, schemes, a : a + n] += self._here(values)

    def _add_rows(self, i: int, x: Tensor, delta: Tensor, prompts: Tensor) -> None:
        """Some tokens [token, in] of prompts [token]: s token by token, then summed by prompt."""
        delta = delta.reshape(len(x), -1).to(self.dtype)
        for activations, schemes in self._by_activations().items():
            for j, dz in self._moves(i, x, activations, schemes):
                values = self._dots(dz, delta)
                self._found[self.draw, i, j].index_add_(0, self._here(prompts), self._here(values))

    def _add_experts(self, inputs: ExpertInputs, delta: Tensor) -> None:
        """All rows of all experts of a part: one grouped product for each scheme."""
        members = self.changes.members(inputs.stack, inputs.part)  # expert -> component
        experts, which = list(members), list(members.values())
        n_prompts = len(self.ids)
        places = inputs.experts * n_prompts + inputs.tokens // self.ids.shape[1]
        x = inputs.x.detach()
        for j, scheme in enumerate(self.schemes):
            changed = x if scheme.activations is None else scheme.activations.quantize(x)
            changes = self.changes.of_experts(inputs.stack, inputs.part, j)  # [expert, out, in]
            dz = grouped_product(changed.to(self.dtype), changes, inputs.counts)
            if scheme.activations is not None:
                weights = self.changes.weights_of_experts(inputs.stack, inputs.part).to(self.dtype)
                moved = (changed.float() - x.float()).to(self.dtype)
                dz += grouped_product(moved, weights, inputs.counts)
            values = dz.new_zeros(len(inputs.counts) * n_prompts, dtype=torch.float32)
            values.index_add_(0, places, self._dots(dz, delta.to(self.dtype)))
            self._found[self.draw, which, j] += self._here(values.view(-1, n_prompts)[experts])

    def _add_embedding(self, i: int, module: nn.Module, ids: Tensor, delta: Tensor) -> None:
        """The change of looked-up rows, by the module's own lookup (Gemma scales it)."""
        weight = weight_of(self.base.network, self.components[i])
        for j, change in enumerate(self.changes.of(i)):
            changed = {"weight": (weight.float() + change).to(weight.dtype)}
            with torch.no_grad():
                after = torch.func.functional_call(module, changed, (ids,))
                dz = after.float() - module(ids).float()
            self._found[self.draw, i, j] += self._here((dz * delta.float()).sum((1, 2)))

    def _here(self, values: Tensor) -> Tensor:
        """Where the batch's sums are; layers may lie on several devices."""
        return values.to(self._found.device)

    def _by_activations(self) -> Mapping[Activations | None, list[int]]:
        groups: dict[Activations | None, list[int]] = defaultdict(list)
        for j, scheme in enumerate(self.schemes):
            groups[scheme.activations].append(j)
        return groups


def only_linear(network: PreTrainedModel, components: Sequence[Component]) -> bool:
    """Whether those of the layers are linear modules, which are seen in compiled layers too."""
    return all(
        component.is_end
        or (
            component.stack_index is None
            and all(type(module) is nn.Linear for module in _modules(network, component))
        )
        for component in components
    )


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


def outer(delta: Tensor, x: Tensor) -> Tensor:
    """Σ_t δ_t x_tᵀ, float32: [prompt, token, out], [prompt, token, in] -> [prompt, out, in]."""
    left = delta.transpose(1, 2)
    if x.is_cuda and x.dtype == delta.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(left, x, out_dtype=torch.float32)
    return torch.bmm(left.float(), x.float())


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products along the last axis; only the sum is in float32."""
    return (a * b).sum(-1, dtype=torch.float32)


def _inner(products: Tensor, changes: Tensor) -> Tensor:
    """⟨product, change⟩: [prompt, out, in] and [scheme, out, in] -> [scheme, prompt]."""
    return changes.flatten(1) @ products.flatten(1).t()
