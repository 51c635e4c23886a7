"""The reference of the operator `sparse_adamw_`, and of its random numbers. As in `reference.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deftx_kernels.kernels.tensors import INTEGERS
from deftx_kernels.ops.reference_csr import csr_gather, csr_scatter_
from deftx_kernels.ops.schemas import AdamWArgs, compute_dtype


def philox(seed: int, step: Tensor, n: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the key `seed` and the
    counters (0 ... n - 1, step), two 32-bit words each, the lower first: int64 [4, n]."""
    entry, step = torch.arange(n, device=step.device), step.to(torch.int64).view(()).expand(n)
    low = 0xFFFFFFFF
    counter = [entry & low, entry >> 32, step & low, step >> 32]
    key = [seed & low, seed >> 32]
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, counter[0])
        high1, low1 = _product(0xCD9E8D57, counter[2])
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return torch.stack(counter)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of the product of 32-bit numbers, in int64 arithmetic."""
    lower = a * (b & 0xFFFF)
    upper = a * (b >> 16) + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """float32 to a bfloat16 neighbour, each as likely as x is near to it. words: int64, of which 16 bits are used."""
    bits = (x.view(torch.int32).to(torch.int64) + (words & 0xFFFF)) >> 16
    return torch.where(x.isnan(), x.to(torch.bfloat16), bits.to(torch.int16).view(torch.bfloat16))


def sparse_adamw_(*arguments) -> None:
    """`torch.optim.AdamW`'s arithmetic (Loshchilov & Hutter 2019, algorithm 2) on the gathered entries."""
    args = AdamWArgs(*arguments)
    old_param = _gather(args, args.params)
    compute = compute_dtype(old_param.dtype)
    step, lr = args.step.to(torch.float64).view(()), args.lr.to(torch.float64).view(())
    weight = old_param.to(compute) if args.values is None else args.values
    gradient = (args.grads[0] if args.compact_grads else _gather(args, args.grads)).to(compute)
    if args.grad_scale is not None:
        gradient = gradient / args.grad_scale.to(compute).view(())
    if args.maximize:
        gradient = -gradient
    distance = weight - (0.0 if args.decay_to is None else args.decay_to.to(compute))
    if args.l1:
        gradient = gradient + args.l1 * torch.sign(distance)
    decay = (lr * args.weight_decay).to(compute)
    new_weight = weight - decay * distance if decay != 0 else weight  # 0 * inf is NaN
    new_exp_avg = torch.lerp(args.exp_avg.to(compute), gradient, 1 - args.beta1)
    new_exp_avg_sq = args.beta2 * args.exp_avg_sq.to(compute) + (1 - args.beta2) * gradient * gradient
    correction1, correction2 = 1 - args.beta1**step, 1 - args.beta2**step
    denominator = (new_exp_avg_sq.sqrt() / correction2.sqrt().to(compute)).add_(args.eps)
    new_weight = new_weight - (lr / correction1).to(compute) * (new_exp_avg / denominator)

    words = None if args.seed is None else philox(args.seed, args.step, len(args.exp_avg))

    def stored(x: Tensor, old: Tensor, word: int, exact: bool = False) -> Tensor:
        """x in the dtype of `old`, which it replaces; `old` itself in a step that is skipped."""
        if words is not None and old.dtype == torch.bfloat16 and not exact:
            new = round_stochastically(x, words[word])
        else:
            new = x.to(old.dtype)
        return new if args.found_inf is None else torch.where(args.found_inf.view(()) != 0, old, new)

    # Beside a float32 master, which keeps the exact values, parameters are rounded to nearest.
    new_param = stored(new_weight, old_param, 0, exact=args.values is not None)
    if args.values is not None:
        args.values.copy_(stored(new_weight, args.values, 0))
    args.exp_avg.copy_(stored(new_exp_avg, args.exp_avg, 1))
    args.exp_avg_sq.copy_(stored(new_exp_avg_sq, args.exp_avg_sq, 2))
    if args.changed is not None:
        args.changed.bitwise_or_(_words(_bits(new_param) != _bits(old_param)))
    if args.col_indices is None:
        for param, new in zip(args.params, new_param.split([p.numel() for p in args.params])):
            param.copy_(new.view(param.shape))
    else:
        csr_scatter_(args.params, args.crow_indices, args.col_indices, new_param)


def _gather(args: AdamWArgs, tensors: Sequence[Tensor]) -> Tensor:
    """The entries of tensors that have the shapes of the params: all of them where there are no col_indices."""
    if args.col_indices is None:
        return torch.cat([t.view(-1) for t in tensors])
    return csr_gather(tensors, args.crow_indices, args.col_indices)


def _bits(x: Tensor) -> Tensor:
    return x.view(INTEGERS[x.element_size()])


def _words(flags: Tensor) -> Tensor:
    """int32 [ceil(n / 32)]: bit j % 32 of word j // 32 is flag j."""
    padded = torch.nn.functional.pad(flags.to(torch.int64), (0, -len(flags) % 32)).view(-1, 32)
    return (padded << torch.arange(32, device=flags.device)).sum(1).to(torch.int32)
