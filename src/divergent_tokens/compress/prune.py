"""Which weights of a matrix may go: saliencies in, masks of those that stay out."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from divergent_tokens.compress.components import Component
from divergent_tokens.errors import SchemeError


def lowest_mask(saliency: Tensor, n_gone: int) -> Tensor:
    """Which stay, bool: all but the `n_gone` of least saliency; of equals the first go."""
    kept = torch.ones(saliency.numel(), dtype=torch.bool, device=saliency.device)
    if n_gone <= 0:
        return kept.view(saliency.shape)
    flat = saliency.flatten()
    # Selecting is several times faster than sorting, and leaves only the ties to be ordered.
    threshold = flat.kthvalue(n_gone).values
    below = flat < threshold
    kept[below] = False
    ties = (flat == threshold).nonzero().flatten()
    kept[ties[: n_gone - int(below.sum())]] = False
    return kept.view(saliency.shape)


def share_mask(saliency: Tensor, share: float) -> Tensor:
    """Which stay: all but round(share · n) of the whole matrix; the share lies in [0, 1).

    Halves round to the even number, as Python's `round` does.
    """
    return lowest_mask(saliency, round(share * saliency.numel()))


def rows_mask(saliency: Tensor, share: float) -> Tensor:
    """Which stay: round(share · in) go in each row [out, in], as Wanda has it (Sun et al. 2024)."""
    n_gone = round(share * saliency.shape[1])
    kept = torch.ones_like(saliency, dtype=torch.bool)
    lowest = saliency.argsort(dim=1, stable=True)[:, :n_gone]
    return kept.scatter_(1, lowest, False)


def n_of_m_mask(saliency: Tensor, n: int, m: int) -> Tensor:
    """Which stay: the n of greatest saliency in each m neighbours of a row; m divides the row."""
    groups = saliency.reshape(-1, m)  # storage may be transposed
    lowest = groups.argsort(dim=1, stable=True)[:, : m - n]
    kept = torch.ones_like(groups, dtype=torch.bool).scatter_(1, lowest, False)
    return kept.view(saliency.shape)


def parse_pattern(text: str) -> tuple[int, int]:
    """n and m of a pattern such as 2:4, in which n of m neighbours stay."""
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    n, m = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < n < m:
        raise SchemeError(
            f"{text!r} is no pattern of pruning; expected two numbers n:m of which n is the "
            "smaller, as in 2:4 (two of four neighbours stay)"
        )
    return n, m


Extent = float | tuple[int, int]
"""How much of a matrix goes: a share of it, or all but n of each m neighbours of a row."""


def parse_extent(text: str) -> Extent:
    """What follows the first colon of a step such as `magnitude:0.5` or `magnitude:2:4`."""
    family, _, rest = text.partition(":")
    if ":" in rest:
        return parse_pattern(rest)
    try:
        share = float(rest)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise SchemeError(
            f"{text!r} names no share of weights to prune; expected a number from 0 up to, but "
            f"not, 1, as in '{family}:0.5'"
        )
    return share


def extent_text(extent: Extent) -> str:
    """The canonical text, which `parse_extent` reads."""
    return "{}:{}".format(*extent) if isinstance(extent, tuple) else repr(extent)


def check_pattern(n: int, m: int, components: Sequence[Component]) -> None:
    """Raise SchemeError where m does not divide a component's inputs."""
    for component in components:
        if component.shape[1] % m:
            raise SchemeError(
                f"{component.name} has {component.shape[1]} inputs, which {m} does not divide; "
                f"exclude it, or take another pattern than {n}:{m}"
            )


def prune_magnitude(weight: Tensor, share: float) -> Tensor:
    """The matrix with its round(share · n) smallest weights set to zero, the others untouched."""
    kept = share_mask(weight.float().abs(), share)
    return torch.where(kept, weight, torch.zeros_like(weight))
