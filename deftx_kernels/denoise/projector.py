"""Spectral projectors of symmetric matrices by matrix products, for devices with a slow batched eigendecomposition."""

import math

import torch
from torch import Tensor

from deftx_kernels.denoise.products import both_operands, left_operand, product_, right_operand

# Error bound of float32 eigenvalues, as a share of sqrt(n) times the largest (torch.linalg.eigvalsh, n = 768: 2e-7).
EIGENVALUE_ERROR = 3e-7
# Smallest |x| (largest: 1) for which the steps are chosen, and the distance from 1 at which they end.
SMALLEST, TOLERANCE = 1e-6, 4e-6
# Smallest `short`: rounding errors of products of bfloat16 parts, about 1e-5 of the largest |x|, must be far below it.
SHORTEST = 1e-4
# No step makes |x| smaller than about 2.5 * CUSHION of the largest: rounding would rotate eigenvectors or change signs.
CUSHION = 0.05


def spectral_projector(
    gram: Tensor,  # [b, n, n] symmetric, float32 or float64
    eigenvalues: Tensor,  # [b, n] of gram, ascending (torch.linalg.eigvalsh), float32 or float64
    rank: Tensor,  # [b] int64, 0 ... n
) -> Tensor:  # [b, n, n] float32
    """The orthogonal projectors P = (I + sign(gram - tau I)) / 2 on the eigenvectors of the `rank` largest eigenvalues.

    tau is the middle of the gap at the cut. The number of products follows from the batch's smallest gap (`schedule`),
    for which two numbers are copied to the host. Where a gap is too small, eigenvalues of P stay between 0 and 1 and
    sum(P * P) is not `rank`; trace(P) may be, since the errors on the two sides of the cut have opposite signs.
    """
    b, n = eigenvalues.shape
    if b == 0 or n == 0:
        return gram.float()
    values, index = eigenvalues.double(), (n - rank)[:, None]
    below, above = (values.gather(1, i.clamp(0, n - 1))[:, 0] for i in (index - 1, index))
    tau = (below + above) / 2
    up, down = values[:, -1] - tau, tau - values[:, 0]
    error = EIGENVALUE_ERROR * math.sqrt(n) * values.abs().amax(1)
    scale = torch.maximum(up, down) + error
    trivial = (rank <= 0) | (rank >= n)  # all on one side: x = I
    scale = torch.where(trivial, math.inf, torch.where(scale > 0, scale, 1.0))
    # the longer side becomes the positive one
    turn = torch.where(torch.where(trivial, rank > 0, up >= down), 1.0, -1.0)
    low = torch.where(trivial, 1.0, ((above - below) / 2 - error) / scale)
    short = (torch.minimum(up, down) + error) / scale
    steps, size = schedule(*torch.stack([low.amin(), short.amax()]).tolist())

    x = gram.clone()
    x.diagonal(dim1=-2, dim2=-1).sub_(tau.to(x.dtype)[:, None])
    x = x.div_((turn * scale).to(x.dtype)[:, None, None]).float()
    x.diagonal(dim1=-2, dim2=-1).add_(trivial.float()[:, None])
    for i, (degree, t) in enumerate(steps):
        if degree == 2:
            x.add_(_square(x), alpha=t)
        else:
            _add_cube_(x, t, is_last=i == len(steps) - 1)
    x.mul_((0.5 / size * turn).float()[:, None, None]).diagonal(dim1=-2, dim2=-1).add_(0.5)
    return x


def schedule(low: float, short: float) -> tuple[list[tuple[int, float]], float]:
    """Steps x -> x + t x**degree, as (degree, t), taking x in [-short, -low] and [low, 1] to sign(x) times the second
    result.

    Degree 2, one product: makes an asymmetric spectrum (short < 1/2) symmetric; small |x| grow up to fourfold relative
    to the largest. Degree 3, two products: the minimax odd cubic on [low, 1], in closed form (Chen and Chow 2014, "A
    stable scaling of Newton-Schulz for improving the sign function computation of a Hermitian matrix"). Small |x| grow
    2.6-fold: per product as fast as with the degree-5 steps of Polar Express (Amsel et al. 2025), whose three products
    give 4.1.
    """
    steps: list[tuple[int, float]] = []
    low = max(low, SMALLEST)
    short = min(max(short, low, SHORTEST), 1.0)
    high = 1.0  # the largest |x|; low and short are shares of it
    while True:  # x - t x**2: the largest t that leaves x = 1 above low, and the maximum above the minimum's size
        t = min(1 / (1 + max(low, CUSHION)), (math.sqrt(0.5) - 0.5) / short)
        if t < 0.5:  # the maximum is at 1
            t = (1 - short) / (1 + short * short)
        top = 1 / (4 * t) if t >= 0.5 else 1 - t
        growth = (1 - t * low) / top
        if not growth > 1.6:  # what a cubic does for each of its products
            break
        steps.append((2, -t / high))
        low, short, high = low * growth, min(short * (1 + t * short) / top, 1.0), high * top
    while 1 - low > TOLERANCE:  # x - x**3 / q: as large at 1 as at max(low, CUSHION)
        start = max(low, CUSHION)
        q = start * start + start + 1
        steps.append((3, -1 / (q * high * high)))
        top = math.sqrt(q / 3) * 2 / 3
        low, high = low * (1 - low * low / q) / top, high * top
    return steps, high * (1 + low) / 2


def _add_cube_(x: Tensor, t: float, is_last: bool) -> None:
    """x += t x**3. The power's error is small where x is, next to the cut; x itself is added in float32."""
    if is_last:
        left, square = left_operand(x), _square(x)
    else:
        left, right = both_operands(x)
        square = product_(torch.empty_like(x), left, right)
    product_(x, left, right_operand(square), add=t)


def _square(x: Tensor) -> Tensor:
    """x @ x as y @ y + 2 d y + d**2 with y = x - d I: bfloat16 loses small entries next to a large common diagonal.

    It made the error of projectors by split products 1.6 to 4 times smaller (n = 768, rank 1, square and tall noise).
    """
    diagonal = x.diagonal(dim1=-2, dim2=-1)
    d = diagonal.mean(-1, keepdim=True)
    diagonal.sub_(d)
    square = product_(torch.empty_like(x), *both_operands(x)).addcmul_(x, 2 * d[..., None])
    square.diagonal(dim1=-2, dim2=-1).add_(d * d)
    diagonal.add_(d)
    return square
