"""One process of test_threads.py: calls every CPU operator and the public functions above, at sizes of real layers.

    python tests/ops/threads_worker.py OUT.pt [--threads N] [--callers 4] [--once] [--cases default|slow] [--start I]

Writes digests of all results, and the results that are compared with a tolerance.
"""

import argparse
import functools
import hashlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from threads_inputs import (
    VOCABULARY,
    compact,
    embedding,
    factors,
    ids,
    layers,
    mask,
    matrices,
    one_mask,
    other_layers,
    patterns,
    randn,
    slow_matrices,
    slow_symmetric,
    slow_table,
    symmetric_matrices,
    tokens,
    vocabulary_mask,
)
from torch import Tensor

import deftx_kernels as dk
from deftx_kernels import CSRMask, SparseAdamW, SparseDelta
from deftx_kernels.ops.schemas import ELECTIONS, OPERATIONS, SCOPES

ops = torch.ops.deftx
# The names that arguments of the operators have.
GLOBAL, TENSOR, ROW = SCOPES["global"], SCOPES["tensor"], SCOPES["row"]
AND, OR, SUB = OPERATIONS["and"], OPERATIONS["or"], OPERATIONS["sub"]

Results = dict[str, Tensor]


# ---- cases ----


class Case(NamedTuple):
    run: Callable[[], Results]
    exact: bool  # the same bits for any number of threads
    group: str = "default"  # "embedding": once in a process, not by several callers; "slow": on request


# "op, size" → Case. The first word is the operator, where a case calls one itself.
CASES: dict[str, Case] = {}


def case(name: str, *, exact: bool, group: str = "default") -> Callable:
    def add(function: Callable[[], Results]) -> Callable:
        CASES[name] = Case(function, exact, group)
        return function

    return add


def csr_of(m: CSRMask) -> Results:
    return {"crow_indices": m.crow_indices, "col_indices": m.col_indices}


def copies(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {n: t.to(dtype, copy=True) for n, t in tensors.items()}


def denoised(found: dict[str, Tensor], infos: dict[str, Any]) -> Results:
    ranks = {f"rank of {n}": info["rank"] for n, info in infos.items()}
    return found | ranks | {f"energy of {n}": info["energy"] for n, info in infos.items()}


@case("svd_denoise(energy), layers", exact=False)
def _() -> Results:
    return denoised(*dk.svd_denoise(matrices(), energy=0.9, return_info=True))


# The bits are the next case's; here the results are compared with float64.
@case("eigh, 768x768 and 1024x1024", exact=False)
def _() -> Results:
    found = {n: ops.eigh(a) for n, a in symmetric_matrices().items()}
    return {f"values {n}": x[0] for n, x in found.items()} | {f"vectors {n}": x[1] for n, x in found.items()}


@case("eigh, bits of 3 of 768x768", exact=True)
def _() -> Results:
    values, vectors = ops.eigh(symmetric_matrices()["768"])
    return {"values": values, "vectors": vectors, "alone": ops.eigvalsh(symmetric_matrices()["768"])}


case("eigvalsh, 2 of 768x768", exact=False)(lambda: {"values 768": ops.eigvalsh(symmetric_matrices()["768"][:2])})


@case("svd_denoise(gavish-donoho), 768x768", exact=False)
def _() -> Results:
    given = {n: matrices()[n] for n in ("low rank 0, 768x768", "smooth, 768x768")}
    return denoised(*dk.svd_denoise(given, rank="gavish-donoho", return_info=True))


@case("svd_denoise(rank), layers", exact=False)
def _() -> Results:
    given = {n: w for n, w in matrices().items() if n.startswith("low rank")}
    return dk.svd_denoise(given, rank=32)


@case("truncated_svd, layers", exact=False)
def _() -> Results:
    batch = [f"low rank {i}, 768x768" for i in range(3)]
    found = dict(zip(batch, zip(*dk.truncated_svd(torch.stack([matrices()[n] for n in batch]), 32))))
    found["low rank, 3072x768"] = dk.truncated_svd(matrices()["low rank, 3072x768"], 32)
    # vectors have free signs
    products = {n: (u.double() * s.double()) @ vh.double() for n, (u, s, vh) in found.items()}
    return products | {f"values of {n}": s for n, (_, s, _) in found.items()}


for _scope, _k in (
    (GLOBAL, [1_000_000]),
    (TENSOR, [20_000, 99, 9999, 100_001, 4_000_000, 1, 3]),
    (ROW, [7, 3, 100, 1000, 64, 1, 767]),
):

    def _topk(scope: Any = _scope, k: list[int] = _k) -> Results:
        crow, col, bad = ops.topk_mask(list(layers().values()), list(other_layers().values()), k, scope)
        return {"crow_indices": crow, "col_indices": col, "bad": bad}

    case(f"topk_mask, layers, scope {_scope}", exact=True)(_topk)


for _scope in ("global", "tensor", "row"):  # the public names

    def _public_topk(scope: str = _scope) -> Results:
        rounded = {n: (t * 8).round() for n, t in layers().items()}  # thousands of ties
        return csr_of(dk.topk_mask(rounded, density=0.05, scope=scope))

    case(f"topk_mask(), tied layers, scope {_scope}", exact=True)(_public_topk)


@case("magnitude_histogram, layers", exact=True)
def _() -> Results:
    return {"histogram": ops.magnitude_histogram(list(layers().values()), 0, 16)}


@case("threshold_mask, layers", exact=True)
def _() -> Results:
    crow, col = ops.threshold_mask(list(layers().values()), 0x3FC0 << 16, [1] * len(layers()))
    return {"crow_indices": crow, "col_indices": col}


@case("dense_to_csr, layers", exact=True)
def _() -> Results:
    crow, col = ops.dense_to_csr(list(patterns().values()))
    return {"crow_indices": crow, "col_indices": col}


@case("csr_gather, layers", exact=True)
def _() -> Results:
    return {"values": ops.csr_gather(list(layers().values()), mask().crow_indices, mask().col_indices)}


@case("csr_scatter_, layers", exact=True)
def _() -> Results:
    found = copies(layers())
    ops.csr_scatter_(list(found.values()), mask().crow_indices, mask().col_indices, compact(mask().nnz, 200))
    return found


@case("csr_add_, bfloat16 layers", exact=True)
def _() -> Results:
    found = copies(layers(), torch.bfloat16)
    ops.csr_add_(list(found.values()), mask().crow_indices, mask().col_indices, compact(mask().nnz, 201), 0.3)
    return found


@case("csr_add_ and csr_restore_, bfloat16 layers", exact=True)
def _() -> Results:
    found = copies(layers(), torch.bfloat16)
    tensors, csr, values = list(found.values()), (mask().crow_indices, mask().col_indices), compact(mask().nnz, 201)
    former = torch.empty(mask().nnz, dtype=torch.bfloat16)
    ops.csr_add_(tensors, *csr, values, 0.3, former)
    for tensor in tensors:
        tensor.view(-1)[::7] = 1.0  # other writes, which are counted
    return {**found, "former": former.clone(), "changed": ops.csr_restore_(tensors, *csr, former, values, 0.3)}


@case("csr_square_sum, layers", exact=True)
def _() -> Results:
    return {"sum": ops.csr_square_sum(list(layers().values()), mask().crow_indices, mask().col_indices)}


@case("csr_combine, layers", exact=True)
def _() -> Results:
    found = {}
    one, other = mask(), mask(seed=40)
    for operation in (AND, OR, SUB):
        crow, col = ops.csr_combine(one.crow_indices, one.col_indices, other.crow_indices, other.col_indices, operation)
        found |= {f"crow_indices {operation}": crow, f"col_indices {operation}": col}
    return found


@case("csr_sum, layers", exact=True)
def _() -> Results:
    one, others, found = mask(), [mask(), mask(seed=40)], {}
    for name, election in ELECTIONS.items():
        values, csr = [compact(m.nnz, 202) for m in others], [[m.crow_indices, m.col_indices] for m in others]
        options = (values, [0.3, -1.5], election, torch.float64)
        found[name] = ops.csr_sum(one.crow_indices, one.col_indices, *map(list, zip(*csr)), *options)
    return found


@case("bit_diff, set_bits, flat_exchange_, bit_checksum and bit_checksum_change, bfloat16 layers", exact=True)
def _() -> Results:
    new, old = (list(copies(t, torch.bfloat16).values()) for t in (layers(), other_layers()))
    for a, b, pattern in zip(new, old, patterns().values()):
        b[~pattern] = a[~pattern]
    offsets, indices, values = ops.bit_diff(new, old)
    sums = {"new": ops.bit_checksum(new), "old": ops.bit_checksum(old)}
    before = values.clone()
    ops.flat_exchange_(old, offsets, indices, before)
    sums |= {"change": ops.bit_checksum_change(offsets, indices, before, values), "written": ops.bit_checksum(old)}
    marked = ops.set_bits(new[0].view(-1).view(torch.int32), torch.tensor([3, 1000, 1000, 16 * new[0].numel()]))
    return {"offsets": offsets, "indices": indices, "values": values, "before": before, "marked": marked[1]} | sums


@case("CSRMask, layers", exact=True)
def _() -> Results:
    one = CSRMask.from_dense(patterns())
    other = mask(seed=40)
    values = one.gather(layers())
    found = {"gathered": values, "square_sum": one.square_sum(layers()), "projected": one.project(values, other)}
    found |= {f"added {n}": t for n, t in one.add_(copies(layers()), values, 2.0).items()}
    found |= {f"scattered {n}": t for n, t in one.scatter_(copies(other_layers()), values).items()}
    found["dense"] = torch.cat([t.view(-1) for t in (one & other).to_dense().values()])
    for name, m in (("or", one | other), ("sub", one - other)):
        found |= {f"{key} {name}": t for key, t in csr_of(m).items()}
    return found


for _keep in (10_000, 400_000):

    def _residual_cut(keep: int = _keep) -> Results:
        return {"cut": ops.residual_cut(*factors(), keep)}

    case(f"residual_cut, 2 of 768x3072, {_keep} kept", exact=True)(_residual_cut)


def cut() -> Tensor:
    bits = int(torch.tensor(1.0).view(torch.int32))
    return torch.tensor([[bits, 0], [bits, 40_000]])


case("low_rank_denoised, 2 of 768x3072", exact=True)(lambda: {"denoised": ops.low_rank_denoised(*factors(), cut())})


@case("split_bf16_, 2 of 768x3072", exact=True)
def _() -> Results:
    columns, rows = (torch.empty(s, dtype=torch.bfloat16) for s in ((2, 768, 2 * 3072), (2, 3 * 768, 3072)))
    ops.split_bf16_([x / 3 for x in factors()[0]], columns, [0, 1], rows, [0, 1, 0])
    return {"columns": columns, "rows": rows}


def adamw(params: dict[str, Tensor], grads: Any, m: CSRMask, state: torch.dtype, **options: Any) -> Results:
    """Two steps."""
    exp_avg, exp_avg_sq = compact(m.nnz, 210).to(state), compact(m.nnz, 211).square().to(state)
    for step in (5, 6):
        dk.sparse_adamw(params, grads, exp_avg, exp_avg_sq, step, m, lr=1e-3, weight_decay=0.1, **options)
    return params | {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@case("sparse_adamw_, layers", exact=True)
def _() -> Results:
    return adamw(copies(layers()), other_layers(), mask(), torch.float32, l1=1e-4)


@case("sparse_adamw_, bfloat16 layers, stochastic rounding", exact=True)
def _() -> Results:
    params = copies(layers(), torch.bfloat16)
    return adamw(params, compact(mask().nnz, 212), mask(), torch.bfloat16, stochastic_rounding=True, seed=3)


@case("SparseAdamW, layers", exact=True)
def _() -> Results:
    params = {n: torch.nn.Parameter(t) for n, t in copies(layers()).items()}
    optimizer = SparseAdamW(params.items(), mask(), lr=1e-3)
    for grads in (other_layers(), layers()):
        for name, param in params.items():
            param.grad = grads[name].clone()
        norm = optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    return {n: p.detach() for n, p in params.items()} | {"norm": norm}


for _rows, _columns in ((3072, 768), (768, 3072), (4096, 1024)):
    for _density, _dtype in ((0.05, torch.float32), (0.05, torch.bfloat16), (0.3, torch.float32)):
        if _density < 0.2 or _rows == 3072:
            _arguments = (_rows, _columns, _density, _dtype)

            def _linear_grad(rows: int, columns: int, density: float, dtype: torch.dtype) -> Results:
                m = one_mask(rows, columns, density)
                grad = ops.masked_linear_grad(
                    *tokens(rows, columns, dtype), m.crow_indices, m.col_indices, torch.float32
                )
                return {"grad": grad}

            case(
                f"masked_linear_grad, {_rows}x{_columns}, {_density:.0%}, {str(_dtype).removeprefix('torch.')}",
                exact=_density < 0.2,  # denser ones are a matrix product
            )(functools.partial(_linear_grad, *_arguments))


def _backward(key: str) -> Results:
    m = one_mask(3072, 768, 0.05)
    weight, (grad, x) = layers()["up"], tokens(3072, 768)
    x, values = x.clone().requires_grad_(), m.gather({"w": weight}).requires_grad_()
    dk.masked_linear(x, weight, values, m).backward(grad)
    return {key: {"values.grad": values.grad, "x.grad": x.grad}[key]}


case("masked_linear(), 3072x768, 5%, values", exact=True)(functools.partial(_backward, "values.grad"))
case("masked_linear(), 3072x768, 5%, input", exact=False)(functools.partial(_backward, "x.grad"))


case("select_mask, layers", exact=True)(lambda: csr_of(dk.select_mask(layers(), other_layers(), density=0.05)))


@case("select_mask(energy), 768x768", exact=False)
def _() -> Results:
    tuned = {n: matrices()[n] for n in ("low rank 0, 768x768", "smooth, 768x768")}
    selected = dk.select_mask(tuned, {n: torch.zeros_like(w) for n, w in tuned.items()}, density=0.05, energy=0.9)
    # Scores are results of products: at the threshold, neighbours may change places. What they add up to is the same.
    return {"selected": torch.stack([selected[n].gather({n: w}).double().square().sum() for n, w in tuned.items()])}


@case("SparseDelta, layers", exact=True)
def _() -> Results:
    names = ["attention", "bias", "down", "large", "scale"]
    base = {n: layers()[n] for n in names}
    tuned = copies(base)
    few = mask().restrict(names)
    few.add_(tuned, compact(few.nnz, 220))
    delta = SparseDelta.from_models(tuned, base)
    model = copies(base)
    delta.apply_(model, alpha=0.5)
    added = {n: t.clone() for n, t in model.items()}
    with delta.applied(model, strict=False):  # half of it is on the model already
        pass
    return csr_of(delta.mask) | {"values": delta.values} | added | {f"restored {n}": t for n, t in model.items()}


# ---- the embedding ----


@case("topk_mask, 250002x768", exact=True, group="embedding")
def _() -> Results:
    crow, col, bad = ops.topk_mask([embedding()], [], [2_000_000], GLOBAL)
    return {"crow_indices": crow, "col_indices": col, "bad": bad}


@case("csr_gather, 250002x768", exact=True, group="embedding")
def _() -> Results:
    m = vocabulary_mask()
    return {"values": ops.csr_gather([embedding()], m.crow_indices, m.col_indices)}


@case("csr_square_sum, 250002x768", exact=True, group="embedding")
def _() -> Results:
    m = vocabulary_mask()
    return {"sum": ops.csr_square_sum([embedding()], m.crow_indices, m.col_indices)}


@case("magnitude_histogram, 250002x768", exact=True, group="embedding")
def _() -> Results:
    return {"histogram": ops.magnitude_histogram([embedding()], 0, 16)}


@case("masked_embedding_grad, 250002x768", exact=True, group="embedding")
def _() -> Results:
    m = vocabulary_mask()
    gradient, indices = randn(ids().numel(), VOCABULARY[1], seed=230), ids().view(-1)
    found = ops.masked_embedding_grad(gradient, indices, m.crow_indices, m.col_indices, 1, torch.float32)
    values = m.gather({"table": embedding()}).requires_grad_()
    dk.masked_embedding(ids(), embedding(), values, m, padding_idx=1).backward(gradient.view(*ids().shape, -1))
    return {"grad": found, "grad of masked_embedding()": values.grad}


# The last: it changes the embedding.
@case("csr_scatter_, csr_add_ and sparse_adamw_, 250002x768", exact=True, group="embedding")
def _() -> Results:
    m, table = vocabulary_mask(), {"table": embedding()}
    m.scatter_(table, compact(m.nnz, 240))
    m.add_(table, compact(m.nnz, 241), 0.5)
    return adamw(table, compact(m.nnz, 242), m, torch.float32)


# ---- slow ----


@case("svd_denoise(energy), 2 of 3072x3072", exact=False, group="slow")
def _() -> Results:
    return denoised(*dk.svd_denoise(slow_matrices(), energy=0.9, return_info=True))


@case("eigh, 2 of 4096x4096", exact=False, group="slow")  # as the other eigh
def _() -> Results:
    values, vectors = ops.eigh(slow_symmetric())
    return {"values 4096": values, "vectors 4096": vectors}


@case("svd_denoise(energy), 250002x768", exact=False, group="slow")
def _() -> Results:
    out, info = dk.svd_denoise(slow_table(), energy=0.9, return_info=True)
    # 1 GB twice: some rows, and the rank.
    return {"every 100th row": out[::100].clone(), "rank of 250002x768": info["rank"], "energy": info["energy"]}


# ---- running ----


def digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


class Recorder:
    """Digests of every call, and of the results of products the tensors themselves, each once."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, dict[str, str]]] = {}  # call → case → result → digest
        self.tensors: dict[str, Tensor] = {}  # by digest

    def record(self, call: str, name: str) -> None:
        start = time.perf_counter()
        try:
            results = CASES[name].run()
            digests = {key: digest(t) for key, t in results.items()}
            if not CASES[name].exact:
                self.tensors |= {
                    digests[key]: t.detach() for key, t in results.items() if digests[key] not in self.tensors
                }
        except Exception as error:  # reported with the case's name by the parent
            digests = {"error": f"{type(error).__name__}: {error}"}
        self.calls.setdefault(call, {})[name] = digests
        print(f"{call:10} {time.perf_counter() - start:7.2f} s  {name}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, default=0, help="torch.set_num_threads; 0: as the process finds it")
    parser.add_argument("--callers", type=int, default=0, help="Python threads that run the cases at the same time")
    parser.add_argument("--cases", choices=["default", "slow"], default="default")
    parser.add_argument("--once", action="store_true", help="no second call of each case")
    parser.add_argument("--start", type=int, default=0, help="the number of the case that comes first")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recorder = Recorder()
    names = [n for n, c in CASES.items() if c.group == options.cases]
    names = names[options.start % len(names) :] + names[: options.start % len(names)]
    if options.callers:
        # not made by several at once
        for inputs in (layers, other_layers, patterns, mask, matrices, symmetric_matrices, factors):
            inputs()
        mask(seed=40)

        def call(i: int) -> None:
            shift = i * len(names) // options.callers
            for name in names[shift:] + names[:shift]:
                recorder.record(f"caller {i + 1}", name)

        callers = [threading.Thread(target=call, args=(i,)) for i in range(options.callers)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    else:
        for name in names:
            recorder.record("first", name)
            if options.cases == "default" and not options.once:
                recorder.record("again", name)
        if options.cases == "default":
            for name in (n for n, c in CASES.items() if c.group == "embedding"):
                recorder.record("first", name)
    torch.save({"threads": torch.get_num_threads(), "calls": recorder.calls, "tensors": recorder.tensors}, options.out)


if __name__ == "__main__":
    main()
