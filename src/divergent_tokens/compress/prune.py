"""Which weights of a matrix may go; tensor in, mask or pruned tensor out."""

import torch
from torch import Tensor


def magnitude_mask(weight: Tensor, share: float) -> Tensor:
    """Which weights stay, bool like `weight`: all but the round(share · n) smallest.

    The comparison is within this matrix. Of equal magnitudes the first in [out, in] order go.
    The share lies in [0, 1); halves round to the even number, as Python's `round` does.
    """
    n_gone = round(share * weight.numel())
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    if n_gone == 0:
        return kept.reshape(weight.shape)
    magnitudes = weight.float().abs().flatten()
    # Selecting is several times faster than sorting, and leaves only the ties to be ordered.
    threshold = magnitudes.kthvalue(n_gone).values
    below = magnitudes < threshold
    kept[below] = False
    ties = (magnitudes == threshold).nonzero().flatten()
    kept[ties[: n_gone - int(below.sum())]] = False
    return kept.reshape(weight.shape)


def prune_magnitude(weight: Tensor, share: float) -> Tensor:
    """The matrix with its round(share · n) smallest weights set to zero, the others untouched."""
    return torch.where(magnitude_mask(weight, share), weight, torch.zeros_like(weight))
