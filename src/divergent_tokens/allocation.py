"""How sparse each matrix becomes, so that all of them together are as sparse as wanted."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.compress.prune import n_of_m_mask, rows_mask, share_mask
from divergent_tokens.compress.units import Unit
from divergent_tokens.errors import SchemeError
from divergent_tokens.saliencies import LEVELS, Saliencies
from divergent_tokens.search.knapsack import least_harm

Allocate = Literal["uniform", "uniform-spared", "global", "kl", "fdt", "fdt-threshold"]
ALLOCATIONS: tuple[Allocate, ...] = get_args(Allocate)
Keys = Callable[[], Iterable[Tensor]]
"""Gives the int32 of every matrix, in the order of its saliencies; made again each time."""
_FIRST_TO_GO = torch.finfo(torch.float32).min
_TIE = 1e-9
_HALF = 16
"""Bits of half a key."""
MEASURED: tuple[Allocate, ...] = ("fdt", "fdt-threshold")
"""Those that need forward passes for every component and level."""


@dataclass(frozen=True)
class Cut:
    """Which weights stay."""

    masks: tuple[Tensor, ...]
    """Of each component, bool [out, in]."""

    @property
    def sparsities(self) -> list[float]:
        """The share that is gone, of each component."""
        return [1 - float(mask.float().mean()) for mask in self.masks]

    @property
    def sparsity(self) -> float:
        """The share that is gone of all."""
        kept = sum(int(mask.sum()) for mask in self.masks)
        return 1 - kept / sum(mask.numel() for mask in self.masks)


def cut(
    saliencies: Saliencies,
    allocate: Allocate,
    sparsity: float,
    *,
    by_rows: bool = False,
    pattern: tuple[int, int] | None = None,
    before: Cut | None = None,
    fdt: NDArray[np.float64] | None = None,
) -> Cut:
    """The weights that stay where `sparsity` of all go; those gone `before` stay gone.

    `by_rows`: each row loses the same share, as Wanda has it. `pattern`: n of m neighbours stay in
    every matrix, whatever the allocation. `fdt`: of single units at `LEVELS` [unit, level], for the
    allocations that are `MEASURED`.

    `global` has one threshold for all, for saliencies in one unit. `kl` is the least sum of harms.
    `fdt-threshold` is the paper's (Deiseroth et al. 2024, section 4): every unit as sparse as its
    FDT allows above one threshold, which is found for the wanted sparsity.
    """

    def values() -> Iterator[Tensor]:
        """One after the other: a copy of all would be another copy of the weights."""
        for i, value in enumerate(saliencies.values):
            yield value if before is None else value.masked_fill(~before.masks[i], _FIRST_TO_GO)

    if pattern is not None:
        every = [n_of_m_mask(value, *pattern) for value in values()]
        # Where more are gone already than the pattern wants, some of them would stay.
        old = every if before is None else before.masks
        return Cut(tuple(new & there for new, there in zip(every, old, strict=True)))
    if allocate == "global":
        n_weights = sum(value.numel() for value in saliencies.values)
        return _by_one_threshold(lambda: map(_ordered, values()), round(sparsity * n_weights))
    units = saliencies.units
    stay = [
        u.n_parameters if before is None else int(u.of(before.masks[u.owner]).sum()) for u in units
    ]
    shares = _shares(saliencies, allocate, sparsity, np.array(stay), fdt, by_rows)
    mask_of = rows_mask if by_rows else share_mask
    masks = []
    parts = groupby(zip(units, shares, strict=True), key=lambda part: part[0].owner)
    for value, (_, own) in zip(values(), parts, strict=True):
        masks.append(torch.empty_like(value, dtype=torch.bool))
        for unit, share in own:
            unit.of(masks[-1]).copy_(mask_of(unit.of(value), share))
    if before is not None:  # a unit may get a lower level than it has
        masks = [new & old for new, old in zip(masks, before.masks, strict=True)]
    return Cut(tuple(masks))


def _by_one_threshold(keys: Keys, n_gone: int) -> Cut:
    """The least of all together; found on integers of the same order, without a sort of all."""
    threshold, n_below = _threshold(keys, n_gone)
    ties = n_gone - n_below
    masks = []
    for own in keys():
        mask = own > threshold
        equal = (own == threshold).flatten().nonzero().flatten()
        mask.view(-1)[equal[ties:]] = True
        ties -= min(ties, len(equal))
        masks.append(mask)
    return Cut(tuple(masks))


def _threshold(keys: Keys, n: int) -> tuple[int, int]:
    """The smallest int32 that `n` of all keys are no larger than, and how many are smaller.

    By upper halves, then by lower; each half is counted in one pass.
    """
    upper, n_below = _bin(((own >> _HALF) + (1 << _HALF - 1) for own in keys()), n)
    upper -= 1 << _HALF - 1
    lower = (own[own >> _HALF == upper] & (1 << _HALF) - 1 for own in keys())
    last, n_before = _bin(lower, n - n_below)
    return (upper << _HALF) + last, n_below + n_before


def _bin(places: Iterable[Tensor], n: int) -> tuple[int, int]:
    """The first of 2^16 places up to which there are `n`, and how many are before it."""
    counts = sum(torch.bincount(p.flatten(), minlength=1 << _HALF).cpu() for p in places)
    assert isinstance(counts, Tensor)
    up_to = counts.cumsum(0)
    found = min(int(torch.searchsorted(up_to, n)), len(up_to) - 1)
    return found, int(up_to[found - 1]) if found else 0


def _ordered(value: Tensor) -> Tensor:
    """int32 in the order of float32."""
    bits = value.contiguous().view(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _shares(
    saliencies: Saliencies,
    allocate: Allocate,
    sparsity: float,
    stay: NDArray[np.int64],
    fdt: NDArray[np.float64] | None,
    by_rows: bool,
) -> list[float]:
    """By unit; `stay` is how many weights of each are there still."""
    units = saliencies.units
    if allocate == "uniform":
        return [sparsity] * len(units)
    if allocate == "uniform-spared":
        return spared(units, sparsity)
    if allocate == "kl":
        assert saliencies.harm is not None
        return _least(saliencies.harm, units, sparsity, stay, by_rows)
    assert fdt is not None
    if allocate == "fdt":
        return _least(fdt[:, :1] - fdt, units, sparsity, stay, by_rows)
    return _above_threshold(fdt, units, sparsity, stay)


def spared(units: Sequence[Unit], sparsity: float) -> list[float]:
    """Uniform in all layers but the first and the last; by unit.

    Raises SchemeError where the others would have to lose everything.
    """
    layers = [u.component.layer for u in units if u.component.layer is not None]
    ends = {min(layers), max(layers)}
    others = sum(u.n_parameters for u in units if u.component.layer not in ends)
    if not others:
        raise SchemeError(
            f"--allocate uniform-spared leaves the first and the last layer whole, and of the "
            f"{len(ends)} that were chosen nothing else is left; take --allocate uniform"
        )
    share = sparsity * sum(u.n_parameters for u in units) / others
    if share >= 1:
        raise SchemeError(
            f"a sparsity of {sparsity} leaves nothing of the layers between the first and the last "
            "if these two are spared; give a lower one, or --allocate uniform"
        )
    return [0.0 if u.component.layer in ends else share for u in units]


def _least(
    harm: NDArray[np.float64],
    units: Sequence[Unit],
    sparsity: float,
    stay: NDArray[np.int64],
    by_rows: bool,
) -> list[float]:
    """Levels with the least sum of harms; a noisy harm is made one that never falls."""
    levels = np.array(LEVELS)
    sizes = np.array([u.n_parameters for u in units])
    # Of each row, or of the whole unit, as the masks are made; halves to the even number, as there.
    length = np.array([u.columns[1] - u.columns[0] for u in units]) if by_rows else sizes
    gone = np.rint(levels * length[:, None]) * (sizes // length)[:, None]
    kept = np.minimum(sizes[:, None] - gone.astype(np.int64), stay[:, None])  # [unit, level]
    envelope = np.maximum.accumulate(np.maximum(harm, 0), 1)
    # Of levels that harm alike the lower one, so that no more goes than is wanted.
    envelope = envelope + _TIE * max(float(envelope.max()), _TIE) * levels
    limit = max(int((1 - sparsity) * sizes.sum()), int(kept.min(1).sum()))
    choice = least_harm(envelope, kept, limit, prove=False)
    return [float(levels[option]) for option in choice.options]


def _above_threshold(
    fdt: NDArray[np.float64],
    units: Sequence[Unit],
    sparsity: float,
    stay: NDArray[np.int64],
) -> list[float]:
    """The highest level up to which a unit's FDT stays at a threshold or above it.

    None below what is gone already. Levels are steps, so that the last ones are taken in part.
    """
    sizes = np.array([u.n_parameters for u in units], dtype=np.float64)
    floors = 1 - stay / sizes
    lowest_so_far = np.minimum.accumulate(fdt, 1)  # [unit, level]
    levels = np.array(LEVELS)

    def shares(threshold: float) -> NDArray[np.float64]:
        found: NDArray[np.float64] = levels[np.maximum((lowest_so_far >= threshold).sum(1) - 1, 0)]
        return np.maximum(found, floors)

    thresholds = np.unique(lowest_so_far)[::-1]  # from the one that allows the least
    for threshold in thresholds:
        found = shares(float(threshold))
        if (found * sizes).sum() >= sparsity * sizes.sum():
            break
    wanted = sparsity * sizes.sum() - (floors * sizes).sum()
    risen = ((found - floors) * sizes).sum()
    part = min(1.0, max(0.0, wanted / risen)) if risen > 0 else 1.0
    return [float(share) for share in floors + part * (found - floors)]
