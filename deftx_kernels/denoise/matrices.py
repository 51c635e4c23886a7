"""What both ways of denoising (subspace.py, gram.py) share: accurate sums and the pruned residual."""

import torch
from torch import Tensor

from deftx_kernels.ops.schemas import SCOPES

ROWS = 1 << 14  # of a tall matrix, worked on at a time


def sums_of_squares(y: Tensor) -> Tensor:
    """float64 [...] of y [..., m, n]: float32 sums of rows, added up in float64 (of a whole matrix torch gives 4
    digits).
    """
    return torch.linalg.vector_norm(y, dim=-1).to(torch.float64).square().sum(-1)


def at_a_time(x: Tensor, width: int) -> int:
    """How many rows of `width` numbers of each matrix are made float64 at a time: few on the CPU, where memory is the
    limit.
    """
    return max(1, (1 << (24 if x.is_cuda else 16)) // width)


def gram64(y: Tensor, dim: int = -2) -> Tensor:
    """y.mT @ y (dim -2) or y @ y.mT (dim -1) [..., l, l] in float64, some of the other dimension at a time."""
    gram: Tensor | None = None
    for part in y.split(at_a_time(y, y.shape[-3 - dim]), dim):
        part = part.to(torch.float64)
        product = part.mT @ part if dim == -2 else part @ part.mT
        gram = product if gram is None else gram.add_(product)
    assert gram is not None
    return gram


# float64 [b, n], descending -> int64 [b]
def ranks_of(squares: Tensor, rank: int, energy: float, median: float) -> Tensor:
    """By the rule, from the squared singular values."""
    if rank:
        return torch.full((len(squares),), rank, device=squares.device)
    if energy:
        sums = squares.cumsum(1)
        found = torch.searchsorted(sums, energy * sums[:, -1:])[:, 0] + 1
    else:
        singular = squares.sqrt()
        found = (singular > median * torch.quantile(singular, 0.5, dim=1, keepdim=True)).sum(1)
    return torch.where(squares[:, 0] > 0, found, 0)


def as_tall(w: Tensor) -> Tensor:  # [..., m, n]
    return w if w.shape[-2] >= w.shape[-1] else w.mT


def is_mostly_rounding(lost: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:  # -> bool
    """Whether so little is lost that the difference of two sums of squares, from which it comes, is rounding for the
    most part.
    """
    return lost < (1e-5 if dtype == torch.float32 else 1e-13) * total


def prune_(w: Tensor, low: Tensor, out: Tensor, keep: int) -> Tensor:
    """out = low + the `keep` largest entries of w - low; returns the sum of squares of what is lost, float64 []."""
    if keep == 0:
        lost = sums_of_squares(w - low)
        out.copy_(low)
        return lost
    crow, col, _ = torch.ops.deftx.topk_mask([w], [low], [keep], SCOPES["tensor"])
    torch.ops.deftx.csr_scatter_([low], crow, col, torch.ops.deftx.csr_gather([w], crow, col))
    lost = sums_of_squares(torch.sub(w, low, out=out))
    out.copy_(low)
    return lost


def prune_from_factors(w: Tensor, left: Tensor, right: Tensor, out: Tensor, keep: int) -> Tensor:
    """As `prune_`, for low = left @ right.mT (of the transposed matrix where w is wide) that is not written."""
    if w.shape[0] < w.shape[1]:
        left, right = right, left
    arguments = (w[None], left[None].contiguous(), right[None].contiguous())
    denoised = torch.ops.deftx.low_rank_denoised(*arguments, torch.ops.deftx.residual_cut(*arguments, keep))[0]
    lost = sums_of_squares(w - denoised)
    out.copy_(denoised)
    return lost
