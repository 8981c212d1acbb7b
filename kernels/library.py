"""Ops by library calls on a GPU, for sizes at which these are faster than our kernels (`faster.py`).

They promise what the ops promise: sums in fp32, one rounding, nothing read that is masked. None waits for the GPU.
Arguments are taken as valid.
"""

import torch
from torch import Tensor

from . import configs, reference

# Of torch 2.8 and newer, on a GPU.
WIDE_RESULTS = "dtype_out" in torch.ops.aten.mm.overloads() and "dtype_out" in torch.ops.aten.bmm.overloads()


def second_moment_library_(total: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """total += XᵀX of 16-bit rows, those that are masked taken as zeros."""
    if mask is not None:
        x = torch.where(mask.unsqueeze(1), x, 0)
    for part in x.split(configs.CHAIN_TOKENS):
        total.add_(_product(part.T, part))


def prefixed_solve_library(
    keys: Tensor, factor: Tensor | None, inverse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`prefixed_solve` of one edit."""
    mean = keys.to(reference.solve_dtype(keys, factor, inverse)).mean(0, keepdim=True)
    return mean, *reference.solve_mean_ref(mean, factor, inverse)


def low_rank_apply_library_(y: Tensor, x: Tensor, left: Tensor, right: Tensor, ids: Tensor) -> None:
    """y[row] += left[id] · (right[id] · x[row]) of tensors in one 16-bit dtype; NaN where an id is too large."""
    ids = ids.unsqueeze(1)
    at = ids.squeeze(1).clamp(0, len(left) - 1)
    scale = _product(right[at].unsqueeze(1), x.unsqueeze(2)).squeeze(2)
    scale = scale.masked_fill(ids >= len(left), torch.nan)
    y.copy_(torch.where(ids >= 0, torch.addcmul(y.float(), left[at].float(), scale).to(y.dtype), y))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · b of 16-bit matrices, or of as many pairs of them, in fp32; a CPU, which has no such product, widens them."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if a.is_cuda:
        return multiply(a, b, out_dtype=torch.float32)
    return multiply(a.float(), b.float())
