"""svd_denoise, truncated_svd, select_mask with denoising and LIFT's selection, against PyTorch, NumPy, SciPy and CuPy.

The decompositions are timed in float32 (LAPACK and cuSOLVER have no 16-bit ones): where other dtypes are chosen, only
select_mask is left.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.bench_topk import positions, torch_memory
from bench.harness import Case, Choice, Workload, workload
from bench.rows import OURS
from bench.shapes import SHAPES, Shapes, random_tensors
from deftx_kernels import CSRMask, select_mask, svd_denoise, topk_mask, truncated_svd
from deftx_kernels.select import low_rank_mask

OPS = {
    "svd_denoise": "each matrix replaced by its best approximation of low rank",
    "truncated_svd": "the leading singular values and vectors of a batch of matrices",
    "eigvalsh": "eigenvalues of the Gram matrices of a model's layers",
    "eigh": "eigenvalues and eigenvectors of the small matrices that a fixed rank leaves",
    "select_mask": "the mask of the entries that differ most between two models: LT-SFT, after denoising DeFT-X",
    "lift_mask": "the mask of the largest entries of each weight's approximation of low rank (LIFT)",
}
SIZES = ("tiny", "minilm", "bert", "xlmr", "llama1b", "llama7b")
LAYERS = {"tiny": 1, "minilm": 6, "xlmr": 12}
# (count, side): of eigvalsh the layers' short sides; of eigh the subspace's columns, for rank 64, of Llama 7B 128.
SYMMETRIC = {
    "tiny": {"eigvalsh": (6, 96), "eigh": (6, 24)},
    "minilm": {"eigvalsh": (36, 384), "eigh": (36, 80)},
    "xlmr": {"eigvalsh": (72, 768), "eigh": (72, 80)},
    "llama7b": {"eigvalsh": (224, 144), "eigh": (224, 144)},
}
OVERSAMPLE, POWER_STEPS = 16, 2
Rule = dict[str, Any]  # the argument of svd_denoise that says how much is kept
RULES: tuple[Rule, ...] = ({"rank": 64}, {"energy": 0.9})
LLAMA7B: Rule = {"rank": 128}
SELECTED = 0.0276  # LT-SFT's density in XLM-R base for a language
LIFT_RANK = 128
Matrices = dict[str, Tensor]
Svd = Callable[[Tensor], Sequence[Tensor]]  # [m, n] → U [m, k], S [k] descending, Vh [k, n] with k = min(m, n)
Eigh = Callable[[Tensor], tuple[Tensor, Tensor]]  # [b, k, k] → eigenvalues [b, k] ascending, eigenvectors [b, k, k]


def workloads(choice: Choice) -> Iterator[Workload]:
    for size in choice.sizes:
        if not choice.dtypes or torch.float32 in choice.dtypes:
            yield from decompositions(size, choice)
        default = (torch.bfloat16 if size == "llama1b" else torch.float32, SELECTED)
        if size != "llama7b" and (size == "tiny" or not choice.quick):
            for rule in RULES[:1] if size == "llama1b" else RULES:
                for setting in choice.settings([default]):
                    title = f"{size}, {label(rule)}"
                    yield workload(selection_case, "select_mask", size, setting, choice.device, rule, title=title)


def decompositions(size: str, choice: Choice) -> Iterator[Workload]:
    def make(op: str, title: str, case: Callable[..., Case], *more: Any, dtype=torch.float32, density=None) -> Workload:
        return workload(case, op, size, (dtype, density), choice.device, *more, title=title)

    if size in SYMMETRIC and not choice.quick:
        for op, dtype in (("eigvalsh", torch.float32), ("eigh", torch.float64)):
            count, n = SYMMETRIC[size][op]
            yield make(op, f"{count}x{n}x{n}", symmetric_case, op, dtype=dtype)
    if size == "llama7b" and choice.device == "cuda":  # 52 GB with its result
        yield make("svd_denoise", f"llama7b linears x32, {label(LLAMA7B)}", denoise_case, 32, LLAMA7B)
    if size not in LAYERS:
        return
    layers = 1 if choice.quick else LAYERS[size]
    for rule in RULES:
        yield make("svd_denoise", f"{size} linears x{layers}, {label(rule)}", denoise_case, layers, rule)
    if size != "xlmr":
        squares = [shape for shape in linears(size, layers).values() if shape[0] == shape[1]]
        title = f"{len(squares)}x{squares[0][0]}x{squares[0][1]}, rank 64"
        yield make("truncated_svd", title, truncated_case, layers, 64)
    for density in choice.densities or (0.05,):
        yield make("lift_mask", f"{size} linears x{layers}, rank {LIFT_RANK}", lift_case, layers, density=density)
    if size == "tiny" or not choice.quick:
        for rule in RULES:
            yield make("svd_denoise", f"{size} with embedding, {label(rule)}", denoise_case, None, rule)


def label(rule: Rule) -> str:
    return ", ".join(f"{k} {v}" for k, v in rule.items())


# ---- matrices ----
def linears(size: str, layers: int) -> Shapes:
    """The matrices of the linear layers."""
    chosen = tuple(f"{i}." for i in range(layers))
    return {n: s for n, s in SHAPES[size].items() if len(s) == 2 and n.startswith(chosen)}


def noisy(shapes: Shapes, device: str, rank: int = 32, strength: float = 2.0) -> Matrices:
    """Matrices of low rank plus noise."""
    tensors = random_tensors(shapes, torch.float32, device)
    for name, noise in tensors.items():
        m, n = noise.shape
        r = min(rank, m, n)
        tensors[name] = noise[:, :r] @ noise[:r] * strength / (m * n) ** 0.25 + noise
    return tensors


def flops(matrices: Iterable[Tensor], rule: Rule) -> float:
    """With a rank, the products of the randomized method; with an energy, those of a Gram matrix and a projection."""
    if rank := rule.get("rank"):
        return sum(2.0 * m.numel() * (rank + OVERSAMPLE) * (2 * POWER_STEPS + 2) for m in matrices)
    return sum(4.0 * m.numel() * min(m.shape) for m in matrices)


# ---- the baselines ----
def kept(squared: Tensor, rule: Rule) -> int:  # [k], descending
    """How many singular values the rule keeps, from their squares."""
    if rank := rule.get("rank"):
        return min(rank, len(squared))
    share = squared.double().cumsum(0) / squared.double().sum()
    return int((share < rule["energy"]).sum()) + 1


def truncated(matrix: Tensor, rule: Rule, svd: Svd) -> Tensor:  # [m, n]
    u, s, vh = svd(matrix)
    rank = kept(s.square(), rule)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def by_svd(matrices: Matrices, rule: Rule, svd: Svd) -> Matrices:
    """One matrix after the other."""
    return {n: truncated(m, rule, svd) for n, m in matrices.items()}


def by_gram(matrices: Matrices, rule: Rule, eigh: Eigh) -> Matrices:
    """Batches of one shape, projected on the leading eigenvectors of the Gram matrix of their short side."""
    found, groups = {}, {}
    for name, m in matrices.items():
        groups.setdefault(m.shape, []).append(name)
    for names in groups.values():
        batch = torch.stack([matrices[n] for n in names]) if len(names) > 1 else matrices[names[0]][None]  # [b, m, n]
        tall = batch if batch.shape[1] >= batch.shape[2] else batch.mT  # [b, long, short]
        values, vectors = eigh(tall.mT @ tall)
        ranks = torch.tensor([kept(v.flip(0).clamp(min=0), rule) for v in values], device=batch.device)
        widest = int(ranks.max())
        leading = vectors[:, :, -widest:]  # [b, short, widest], the first eigenvector last
        selected = torch.arange(widest, 0, -1, device=batch.device) <= ranks[:, None]
        low = (tall @ (leading * selected[:, None])) @ leading.mT
        found |= dict(zip(names, low if tall is batch else low.mT))
    return found


def full_svd(matrix: Tensor, **driver: str) -> Sequence[Tensor]:
    return torch.linalg.svd(matrix, full_matrices=False, **driver)


def lowrank_svd(columns: int, matrix: Tensor) -> Sequence[Tensor]:
    u, s, v = torch.svd_lowrank(matrix, q=min(columns, *matrix.shape), niter=POWER_STEPS)
    return u, s, v.mT


def numpy_svd(matrix: Tensor) -> Sequence[Tensor]:
    return [torch.from_numpy(x) for x in np.linalg.svd(matrix.numpy(), full_matrices=False)]


def scipy_svd(matrix: Tensor) -> Sequence[Tensor]:
    import scipy.linalg

    # The only copy: in Fortran's order, which LAPACK overwrites.
    a = np.array(matrix.numpy(), order="F")
    found = scipy.linalg.svd(a, full_matrices=False, overwrite_a=True, check_finite=False, lapack_driver="gesdd")
    return [torch.from_numpy(x) for x in found]


def in_cupy(function: str, matrix: Tensor, **options: Any) -> Any:
    """A function of cupy.linalg; of a batch, Jacobi's method in one call."""
    import cupy

    with torch_memory(cupy):
        found = getattr(cupy.linalg, function)(cupy.from_dlpack(matrix), **options)
        return [torch.from_dlpack(x) for x in found] if isinstance(found, tuple) else torch.from_dlpack(found)


def cupy_eigh_each(gram: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix after the other: divide and conquer."""
    values, vectors = zip(*(in_cupy("eigh", g) for g in gram))
    return torch.stack(values), torch.stack(vectors)


DRIVERS: dict[str, Svd] = {
    f"torch.linalg.svd ({driver})": partial(full_svd, driver=driver) for driver in ("gesvd", "gesvdj", "gesvda")
}
# Timed in the first round only: they take about as long as torch.linalg.svd, which is timed in every round, or longer.
ONCE = ("numpy.linalg.svd", "scipy.linalg.svd", "cupy.linalg.svd", *DRIVERS)


def baselines(matrices: Matrices, rule: Rule, device: str) -> dict[str, Callable]:
    svds: dict[str, Svd] = {"torch.linalg.svd": full_svd}
    eighs: dict[str, Eigh] = {"torch.linalg.eigh of the Gram matrix": torch.linalg.eigh}
    if device == "cuda":  # without a driver torch tries gesvdj, and gesvd where that does not converge
        svds |= DRIVERS | {"cupy.linalg.svd": partial(in_cupy, "svd", full_matrices=False)}
        eighs["cupy.linalg.eigh of the Gram matrix"] = partial(in_cupy, "eigh")
        eighs["cupy.linalg.eigh of each Gram matrix"] = cupy_eigh_each
    else:
        svds |= {"numpy.linalg.svd": numpy_svd, "scipy.linalg.svd": scipy_svd}
    if "rank" in rule:
        svds["torch.svd_lowrank"] = partial(lowrank_svd, rule["rank"] + OVERSAMPLE)
    calls = {n: partial(by_svd, matrices, rule, svd) for n, svd in svds.items()}
    calls |= {n: partial(by_gram, matrices, rule, eigh) for n, eigh in eighs.items()}
    return {n: lambda call=call: call for n, call in calls.items()}


# ---- svd_denoise ----
def denoise_case(size: str, dtype: torch.dtype, density: None, device: str, layers: int | None, rule: Rule) -> Case:
    """Of the linear layers of so many layers; `layers` None: of all matrices of the model, with its embedding."""
    check: Callable[[Matrices], str | None]
    if layers is None:
        matrices = {n: t for n, t in random_tensors(size, torch.float32, device).items() if t.dim() == 2}
        check = partial(orthogonality, matrices)
    else:
        matrices = noisy(linears(size, layers), device)
        check = truncation(matrices, rule)

    def ours() -> Matrices:
        return svd_denoise(matrices, oversample=OVERSAMPLE, n_iter=POWER_STEPS, **rule)

    implementations = {OURS: lambda: ours} | baselines(matrices, rule, device)
    absent = {}
    if size == "llama7b":
        reason = "a full decomposition of matrices of this size takes minutes"
        absent = {n: reason for n in implementations if n not in (OURS, "torch.svd_lowrank")}
    rounds, once = (3, tuple(n for n in implementations if n != OURS)) if layers is None else (5, ONCE)
    moved, operations = 2 * sum(m.nbytes for m in matrices.values()), flops(matrices.values(), rule)
    return Case(moved, implementations, check, flops=operations, rounds=rounds, once=once, absent=absent)


def orthogonality(matrices: Matrices, result: Matrices) -> str | None:
    """The embedding's residual is orthogonal to its low-rank part, as that of a truncated SVD is."""
    low, full = result["embedding"], matrices["embedding"]
    inner = float((low.double() * (full - low).double()).sum() / full.double().square().sum())
    return None if abs(inner) < 1e-4 else f"embedding: the residual is not orthogonal to the rest: {inner:.1e}"


def truncation(matrices: Matrices, rule: Rule) -> Callable[[Matrices], str | None]:
    """Checks that a result is the exact truncation, or, with a rank, nearly as close to the matrix as that."""
    # Of many large matrices one of each shape.
    names = list(matrices if len(matrices) <= 100 else {m.shape: n for n, m in matrices.items()}.values())

    @cache  # not before a result is checked
    def exact(name: str) -> Tensor:  # [m, n]
        return truncated(matrices[name].double(), rule, full_svd)

    @cache
    def least(name: str) -> float:
        """The norm of the best residual of this rank, from the eigenvalues of the Gram matrix."""
        m = matrices[name].double()
        tall = m if m.shape[0] >= m.shape[1] else m.mT
        return float(torch.linalg.eigvalsh(tall.mT @ tall)[: -rule["rank"]].clamp(min=0).sum().sqrt())

    def check(result: Matrices) -> str | None:
        if missing := matrices.keys() - result.keys():
            return f"{min(missing)} is missing"
        for name in names:
            delta, found = matrices[name].double(), result[name].double()
            if "rank" in rule:
                residual = float((delta - found).norm())
                # The second term is float32's rounding, for matrices of no higher rank.
                if not residual <= 1.02 * least(name) + 1e-5 * float(delta.norm()):
                    return f"{name}: residual {residual / least(name):.3f} times the best {label(rule)}'s, 1.02 allowed"
            elif not (error := float((found - exact(name)).norm() / exact(name).norm())) <= 5e-5:
                return f"{name}: {error:.1e} from the exact truncation, 5e-5 allowed"
        return None

    return check


# ---- truncated_svd ----
def truncated_case(size: str, dtype: torch.dtype, density: None, device: str, layers: int, rank: int) -> Case:
    matrices = noisy(linears(size, layers), device).values()
    batch = torch.stack([m for m in matrices if m.shape[0] == m.shape[1]])  # [b, n, n]

    @cache
    def best() -> Tensor:  # [b]
        return torch.linalg.svdvals(batch.double())[:, rank:].norm(dim=1)

    def lowrank() -> tuple[Tensor, Tensor, Tensor]:
        each = [lowrank_svd(rank + OVERSAMPLE, m) for m in batch]
        u, s, vh = (torch.stack(x) for x in zip(*each))
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]

    def full() -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = full_svd(batch)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]

    def check(result: tuple[Tensor, Tensor, Tensor]) -> str | None:
        u, s, vh = (x.double() for x in result)
        residual = float(((batch.double() - (u * s[..., None, :]) @ vh).norm(dim=(1, 2)) / best()).max())
        return None if residual <= 1.02 else f"residual {residual:.3f} times the best rank {rank}'s, 1.02 allowed"

    implementations = {
        OURS: lambda: lambda: truncated_svd(batch, rank, oversample=OVERSAMPLE, n_iter=POWER_STEPS),
        "torch.svd_lowrank": lambda: lowrank,
        "torch.linalg.svd": lambda: full,
    }
    moved = 4 * (batch.numel() + batch.shape[0] * rank * (batch.shape[1] + batch.shape[2] + 1))
    return Case(moved, implementations, check, flops=flops(batch, {"rank": rank}), rounds=5)


# ---- eigvalsh, eigh ----
def symmetric_case(size: str, dtype: torch.dtype, density: None, device: str, op: str) -> Case:
    count, n = SYMMETRIC[size][op]
    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(count, 2 * n, n, generator=generator, device=device, dtype=torch.float64)
    matrices = (w.mT @ w).to(dtype)

    def check(result: Any) -> str | None:
        exact = torch.linalg.eigvalsh(matrices.double())
        unit = torch.finfo(dtype).eps * float(exact.amax())
        errors = {"eigenvalues": (result if op == "eigvalsh" else result[0]).double() - exact}
        if op == "eigh":
            values, vectors = (x.double() for x in result)
            errors["reconstruction"] = (vectors * values[:, None]) @ vectors.mT - matrices.double()
        for what, error in errors.items():
            units = float(error.abs().max()) / unit
            if not units <= n:
                return f"{what}: {units:.0f} units of rounding wrong, {n} allowed"
        return None

    implementations: dict[str, Callable] = {
        OURS: lambda: lambda: getattr(torch.ops.deftx, op)(matrices),
        f"torch.linalg.{op}": lambda: lambda: getattr(torch.linalg, op)(matrices),
    }
    if device == "cuda":
        implementations[f"cupy.linalg.{op}"] = lambda: partial(in_cupy, op, matrices)
    moved = matrices.nbytes + dtype.itemsize * count * n * (1 if op == "eigvalsh" else n + 1)
    # The tridiagonal form; the product of its reflectors and the rotations of 1.7 QL steps for each eigenvalue.
    operations = count * n**3 * (4 / 3 if op == "eigvalsh" else 8 / 3 + 5)
    return Case(moved, implementations, check, flops=operations, rounds=5)


# ---- select_mask, with denoising ----
def selection_case(size: str, dtype: torch.dtype, density: float, device: str, rule: Rule) -> Case:
    """DeFT-X's selection: differences, denoising, global top-k."""
    base = random_tensors(size, dtype, device)

    def fine_tuned(tensor: Tensor) -> Tensor:
        return (tensor + 0.01 * random_tensors({"": tensor.shape}, torch.float32, device, seed=1)[""]).to(dtype)

    tuned = {n: fine_tuned(t) for n, t in base.items()}
    numel = sum(t.numel() for t in base.values())
    k = round(density * numel)

    @cache  # not before a result is checked
    def expected() -> CSRMask:
        """From differences denoised one tensor at a time, by the function whose rows are checked against exact SVDs."""
        differences = {n: tuned[n].float() - t.float() for n, t in base.items()}
        return topk_mask({n: svd_denoise(t, **rule) if t.dim() == 2 else t for n, t in differences.items()}, k=k)

    def check(mask: CSRMask) -> str | None:
        if mask.nnz != k:
            return f"{mask.nnz} entries instead of {k}"
        return disagreement((mask & expected()).nnz / k)

    ours = {OURS: lambda: lambda: select_mask(tuned, base, k=k, **rule)}
    operations = flops((t for t in base.values() if t.dim() == 2), rule)
    return Case(2 * dtype.itemsize * numel, ours, check, flops=operations, rounds=3, served_by="svd_denoise")


# ---- LIFT's selection ----
LIFT, LIFT_LOWRANK = "LIFT", "LIFT, svd_lowrank"
# The fraction of the selected entries that must be those of float64. In weights of rank 128 plus noise, whose 128th
# singular value is 1.5 to 1.9 times the next, the full SVD in float32 selects all of them, the randomized methods
# 99.7 % and more. (A flatter spectrum exchanges more of them, with ours and with torch.svd_lowrank alike: a half and
# a third in 3072 x 768 of rank 32 plus noise, where only noise is at the cut.)
AGREEMENT = 0.99


def disagreement(agreement: float) -> str | None:
    return None if agreement >= AGREEMENT else f"{agreement:.2%} of the entries are right, {AGREEMENT:.0%} required"


def lift_case(size: str, dtype: torch.dtype, density: float, device: str, layers: int) -> Case:
    """LIFT (Liu et al. 2025, arXiv 2506.00772): in each weight the largest entries of its approximation of rank 128."""
    weights = noisy(linears(size, layers), device, rank=LIFT_RANK, strength=6.0)
    counts = {n: round(density * w.numel()) for n, w in weights.items()}

    def lift(svd: Svd) -> Matrices:
        return {n: lift_mask(w, counts[n], svd).cpu() for n, w in weights.items()}

    @cache
    def truth() -> Matrices:  # name → bool [numel]
        return {n: lift_mask(w.double(), counts[n], full_svd).view(-1).cpu() for n, w in weights.items()}

    def check(result: Any) -> str | None:
        for name, position in positions(result, {n: w.shape for n, w in weights.items()}):
            if len(position) != counts[name]:
                return f"{name}: {len(position)} entries were selected, not {counts[name]}"
            if fault := disagreement(float(truth()[name][position.cpu()].double().mean())):
                return f"{name}: {fault}"
        return None

    implementations = {
        OURS: lambda: lambda: low_rank_mask(weights, rank=LIFT_RANK, density=density),
        LIFT: lambda: partial(lift, full_svd),
        LIFT_LOWRANK: lambda: partial(lift, partial(lowrank_svd, 2 * LIFT_RANK)),
    }
    moved = 4 * sum(w.numel() for w in weights.values()) + 4 * sum(counts.values())
    once = (LIFT,) if size == "xlmr" else ()
    operations = flops(weights.values(), {"rank": LIFT_RANK})
    return Case(moved, implementations, check, flops=operations, rounds=3, served_by="svd_denoise", once=once)


def lift_mask(weight: Tensor, k: int, svd: Svd) -> Tensor:  # [m, n]
    """LIFT's mask of one weight, re-implemented from its description: the k largest magnitudes of U_r S_r V_r^T."""
    low = truncated(weight, {"rank": LIFT_RANK}, svd)
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[torch.topk(low.abs().view(-1), k, sorted=False).indices] = True
    return mask.view(weight.shape)
