"""What stays of a pruned matrix, moved so that its outputs change least.

The objective is SparseGPT's (Frantar and Alistarh 2023): Σ_t ‖(W′ − W) x_t‖² with zeros where they
were decided. SparseGPT goes through the columns once and moves only those not passed yet; here all
that stays is moved, by conjugate gradients, each row a system of its own.
"""

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean second moment, added to each input's own: SparseGPT's share."""
STEPS = 40


@torch.no_grad()
def repair(weight: Tensor, mask: Tensor, moment: Tensor, *, steps: int = STEPS) -> Tensor:
    """The pruned matrix [out, in], zero outside the mask, for Σ x xᵀ [in, in]; float32.

    Or many of one shape, [matrix, out, in], at once. A row whose system is solved before `steps`
    stays as it is. Inputs that were never seen leave their weights untouched.
    """
    damped = _damped(moment)
    change = -weight.float() * ~mask
    residual = -(change @ damped) * mask
    scale = _diagonal(damped).reciprocal()[..., None, :]
    move = residual * scale
    slope = (residual * move).sum(-1, keepdim=True)
    for _ in range(steps):
        along = (move @ damped) * mask
        step = _ratio(slope, (move * along).sum(-1, keepdim=True))
        change += move * step
        residual -= along * step
        scaled = residual * scale
        following = (residual * scaled).sum(-1, keepdim=True)
        move = scaled + move * _ratio(following, slope)
        slope = following
    return (weight.float() + change) * mask


def _damped(moment: Tensor) -> Tensor:
    damped = moment.float().clone()
    diagonal = _diagonal(damped)
    diagonal += DAMPING * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    diagonal[diagonal < torch.finfo(torch.float32).eps] = 1.0
    return damped


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where nothing is left to do."""
    return torch.where(b > 0, a / b.clamp_min(torch.finfo(torch.float32).tiny), 0)
