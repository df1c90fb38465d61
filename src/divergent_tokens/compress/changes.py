"""What schemes change in components: ΔW, made when asked for, some of them kept."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from divergent_tokens.compiled import compiled
from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.schemes import Scheme

KEPT_BYTES = 2 * 2**30
"""So many bytes of changes are kept; others are made again each time."""


class Changes:
    """The changes of a network's components under schemes, computed in float32."""

    def __init__(
        self,
        network: PreTrainedModel,
        components: Sequence[Component],
        schemes: Sequence[Scheme],
        dtype: torch.dtype = torch.float32,
        *,
        keep: bool = True,
        fused: bool = False,
    ) -> None:
        """Nothing is made yet; the differences will be rounded to this dtype.

        `keep`: they will be asked for more than once. `fused`: by compiled kernels.
        """
        self.network = network
        self.components = components
        self.schemes = schemes
        self.dtype = dtype
        self._change = compiled(_change) if fused else _change
        self._errors: dict[tuple[str, ...] | int, tuple[list[int], list[int], Tensor]] = {}
        self._experts: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        for i, component in enumerate(components):
            if component.stack_index is not None:
                self._experts[component.part_of_stack][component.stack_index] = i
        self._most_bytes = KEPT_BYTES if keep else 0
        self._kept: dict[int | tuple[str, str, int], list[Tensor]] = {}
        self._kept_bytes = 0

    @property
    def relative_errors(self) -> NDArray[np.float64]:
        """‖ΔW‖ / ‖W‖, Frobenius, of those that were made. [component, scheme]"""
        found = np.full((len(self.components), len(self.schemes)), np.nan)
        for which, schemes, errors in self._errors.values():  # a device is waited for only here
            found[np.ix_(which, schemes)] = errors.cpu().numpy()
        return found

    def forget(self) -> None:
        """Let go of all changes that were kept."""
        self._kept.clear()
        self._kept_bytes = 0

    def was_made(self, i: int) -> bool:
        """Whether a component, alone in its parameter, was asked for."""
        return i in self._errors

    def members(self, stack: str, part: str) -> Mapping[int, int]:
        """Expert -> component, of a part (gate_proj, ...) of a stack; empty if none was chosen."""
        return self._experts.get((stack, part), {})

    @torch.no_grad()
    def of(self, i: int) -> list[Tensor]:
        """ΔW of one component under every scheme, each [out, in]."""
        if i in self._kept:
            return self._kept[i]
        component = self.components[i]
        weight = weight_of(self.network, component)
        made = [self._change(scheme, weight, component, self.dtype) for scheme in self.schemes]
        changes, errors = zip(*made, strict=True)
        self._errors[i] = ([i], list(range(len(made))), torch.stack(errors)[None])
        return self._keep(i, list(changes), often=component.is_end)

    @torch.no_grad()
    def of_experts(self, stack: str, part: str, j: int) -> Tensor:
        """ΔW of a part of all experts under one scheme. [expert, out, in]"""
        key = (stack, part, j)
        if key in self._kept:
            return self._kept[key][0]
        scheme, members = self.schemes[j], self._experts[stack, part]
        weights = self.weights_of_experts(stack, part)
        if scheme.by_rows:  # all experts' rows in one go
            first = self.components[next(iter(members.values()))]
            stored = weights.to(first.dtype).flatten(0, 1)
            changed = scheme.compress(stored, first).float().view_as(weights)
        else:
            changed = weights.clone()
            for expert, i in members.items():
                component = self.components[i]
                weight = weight_of(self.network, component)
                changed[expert] = scheme.compress(weight, component).float()
        changes = changed - weights
        experts, which = list(members), list(members.values())
        errors = (_norm(changes) / _norm(weights))[experts, None]
        self._errors[stack, part, str(j)] = (which, [j], errors)
        return self._keep(key, [changes.to(self.dtype)])[0]

    def weights_of_experts(self, stack: str, part: str) -> Tensor:
        """Of all experts, float32. [expert, out, in]"""
        component = self.components[next(iter(self._experts[stack, part].values()))]
        weights: Tensor = self.network.get_parameter(component.parameter).detach()
        if component.transposed:
            weights = weights.transpose(1, 2)
        if component.rows is not None:
            weights = weights[:, slice(*component.rows)]
        return weights.float()

    def _keep(
        self, key: int | tuple[str, str, int], changes: list[Tensor], *, often: bool = False
    ) -> list[Tensor]:
        """`often`: the head is asked for with every chunk of tokens."""
        n_bytes = sum(change.nbytes for change in changes)
        if self._kept_bytes + n_bytes <= (KEPT_BYTES if often else self._most_bytes):
            self._kept[key] = changes
            self._kept_bytes += n_bytes
        return changes


def _change(
    scheme: Scheme, weight: Tensor, component: Component, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """ΔW [out, in], and its relative error."""
    change = scheme.compress(weight, component).float() - weight.float()
    return change.to(dtype), _norm(change) / _norm(weight)


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius, [..., out, in] -> [...]: rows in float32, which is 20 times as fast."""
    rows = torch.linalg.vector_norm(matrix.float(), dim=-1)
    found: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return found
