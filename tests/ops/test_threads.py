"""Every CPU operator at sizes of real layers, in fresh processes with 1, 2, 3, 8 and the default number of threads.

The other tests run on one thread for each process, and on small inputs. Here the results of each process
(threads_worker.py) are compared with those on one thread: bit for bit where an operator documents that, else within its
tolerance. Results of decompositions are compared with float64.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import threads_inputs
import torch
from threads_worker import CASES
from torch import Tensor

from deftx_kernels.denoise.rule import gavish_donoho_multiple
from deftx_kernels.ops import schemas

pytestmark = pytest.mark.multithreaded
ROOT = Path(__file__).resolve().parents[2]


class Setting(NamedTuple):
    environment: dict[str, str]
    options: list[str]
    threads: int | None  # that torch must have; None: the machine's


# Threads that wait without spinning: 8 that spin on two busy cores take many times as long. "default threads" spin.
PASSIVE = {"OMP_WAIT_POLICY": "passive"}
ONE = "1 thread"
SETTINGS = {
    ONE: Setting({"OMP_NUM_THREADS": "1"}, ["--once"], 1),
    "2 threads": Setting({"OMP_NUM_THREADS": "2", **PASSIVE}, ["--start", "5"], None),  # on one core torch takes one
    # By torch.set_num_threads: of what the variable asks for, torch takes no more than there are cores.
    "3 threads": Setting({"OMP_NUM_THREADS": "1", **PASSIVE}, ["--threads", "3", "--start", "12"], 3),
    "8 threads": Setting(PASSIVE, ["--threads", "8", "--start", "20"], 8),
    "default threads": Setting({}, ["--once"], None),
    "2 callers": Setting(PASSIVE, ["--callers", "2"], None),
    "4 callers": Setting(PASSIVE, ["--callers", "4"], None),
}
QUICK = ("default threads", "2 callers")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

# Relative error of a truncation that svd_denoise documents; two of them differ by twice that at most.
TRUNCATION = 5e-5


def start(setting: str, out: Path, cases: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | SETTINGS[setting].environment
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    worker = [sys.executable, str(ROOT / "tests/ops/threads_worker.py"), str(out), "--cases", cases]
    return subprocess.Popen(
        [*worker, *SETTINGS[setting].options],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(setting: str, process: subprocess.Popen, out: Path) -> dict:
    """What the process found; the last lines of its output name the case that it was in."""
    try:
        output, _ = process.communicate()
    finally:  # a test that takes too long is stopped from outside, by pytest-timeout
        process.kill()
    assert process.returncode == 0, f"{setting}: exit status {process.returncode}\n{output[-2000:]}"
    found = torch.load(out)
    out.unlink()
    assert SETTINGS[setting].threads in (None, found["threads"])
    return found


# ---- the oracle ----


class Decomposition(NamedTuple):
    u: Tensor
    s: Tensor
    vh: Tensor

    def truncated(self, rank: int) -> Tensor:
        return (self.u[:, :rank] * self.s[:rank]) @ self.vh[:rank]

    def rank_of(self, energy: float) -> int:
        sums = self.s.square().cumsum(0)
        return int((sums < energy * sums[-1]).sum()) + 1


def decomposed(w: Tensor) -> Decomposition:
    """In float64, and proved: orthonormal factors whose product is the matrix."""
    w = w.double()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    norm, identity = float(w.square().sum().sqrt()), torch.eye(len(s), dtype=torch.float64)
    assert float(((u * s) @ vh - w).square().sum().sqrt()) < 1e-12 * norm, (
        "torch.linalg.svd in float64 is wrong on this machine"
    )
    assert max(float((x - identity).abs().max()) for x in (u.mT @ u, vh @ vh.mT)) < 1e-12
    assert abs(float(s.square().sum().sqrt()) - norm) < 1e-12 * norm
    return Decomposition(u, s, vh)


def of_known_values(a: Tensor) -> Tensor:
    """The eigenvalues of a symmetric matrix in float64, ascending, with its trace and norm."""
    a = a.double()
    values, vectors = torch.linalg.eigh(a)
    norm = float(a.square().sum().sqrt())
    assert float((a @ vectors - vectors * values).abs().max()) < 1e-12 * norm, (
        "torch.linalg.eigh in float64 is wrong here"
    )
    assert abs(float(values.sum() - a.trace())) < 1e-11 * norm
    assert abs(float(values.square().sum().sqrt()) - norm) < 1e-12 * norm
    return values


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> dict:
    """The results on one thread, and the oracle of some, made at the same time."""
    out = tmp_path_factory.mktemp("threads") / "one.pt"
    process = start(ONE, out, "default")
    matrices = threads_inputs.matrices()
    sizes = ["low rank 0, 768x768", "low rank 1, 768x768", "smooth, 768x768", "low rank, 3072x768"]
    sizes.append("low rank 0, 1024x1024")
    oracle = {name: decomposed(matrices[name]) for name in sizes}
    values = {size: of_known_values(a[1]) for size, a in threads_inputs.symmetric_matrices().items()}
    return finish(ONE, process, out) | {"matrices": matrices, "oracle": oracle, "values": values}


# ---- comparing ----


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm; infinite where something is not finite."""
    error = float((found.double() - expected.double()).square().sum().sqrt()) / max(
        float(expected.double().square().sum()) ** 0.5, 1e-300
    )
    return error if error == error else float("inf")


def close(key: str, found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.is_floating_point():  # a rank is that of exact arithmetic
        return torch.equal(found, expected)
    if key.startswith("vectors"):
        return True  # have free signs, and near ones mix: they are verified on their own
    return distance(found, expected) <= 2 * TRUNCATION


def faults(setting: str, found: dict, expected: dict) -> list[str]:
    """Where results are not those of one thread: setting, call, operator and size, result."""
    wrong = []
    for call, cases in found["calls"].items():
        for name, results in cases.items():
            reference = expected["calls"]["first"][name]
            for key in sorted(results.keys() | reference.keys()):
                got, want = results.get(key, "missing"), reference.get(key, "no such result")
                if "error" in (key, *reference):
                    wrong.append(f"{setting}, {call} call: {name}: {got}; on one thread {want}")
                elif got != want and (
                    CASES[name].exact or not close(key, found["tensors"][got], expected["tensors"][want])
                ):
                    wrong.append(f"{setting}, {call} call: {name}: {key} is not what one thread gives")
    return wrong


def inexact(setting: str, found: dict, expected: dict) -> list[str]:
    """Where results of decompositions are not what float64 gives."""
    wrong = []
    checked: set[tuple] = set()
    for call, cases in found["calls"].items():
        for name, digests in cases.items():
            if CASES[name].exact or "error" in digests:
                continue
            results = {key: found["tensors"][d] for key, d in digests.items()}
            for key in results:
                if (name, key, digests[key]) not in checked and (what := fault(name, key, results, expected)):
                    wrong.append(f"{setting}, {call} call: {name}: {key}: {what}")
                checked.add((name, key, digests[key]))
    return wrong


def fault(name: str, key: str, results: dict[str, Tensor], expected: dict) -> str | None:
    result, oracle = results[key], expected["oracle"]
    kind, _, size = key.partition(" ")
    if name.startswith("eig"):
        return eigen_fault(kind, result, results[f"values {size}"], expected["values"][size], size)
    if kind == "values" and (exact := oracle.get(key.removeprefix("values of "))):
        error = distance(result, exact.s[:32])
        return None if error <= TRUNCATION else f"relative error {error:.1e}"
    if key not in oracle:
        return None
    exact, w = oracle[key], expected["matrices"][key]
    if name.startswith(("truncated_svd", "svd_denoise(rank)")):
        best = float(exact.s[32:].square().sum().sqrt())
        error = float((w.double() - result).square().sum().sqrt())
        return (
            None if error <= 1.02 * best else f"residual {error:.6g}, that of the best matrix of rank 32 is {best:.6g}"
        )
    energy = "gavish" not in name
    rank = exact.rank_of(0.9) if energy else int((exact.s > gavish_donoho_multiple(*w.shape) * exact.s.median()).sum())
    got, error = int(results[f"rank of {key}"]), distance(result, exact.truncated(rank))
    return None if got == rank and error <= TRUNCATION else f"rank {got}, exact {rank}; relative error {error:.1e}"


def eigen_fault(kind: str, result: Tensor, values: Tensor, exact: Tensor, size: str) -> str | None:
    """Errors in units of float32's rounding of the largest eigenvalue, as in test_eigh.py."""
    matrices = threads_inputs.symmetric_matrices()[size].double()
    unit = 200 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    if kind == "values":
        error = float((result[1] - exact).abs().max())
        return None if error <= unit else f"an eigenvalue is off by {error:.1e}"
    v, identity = result.double(), torch.eye(matrices.shape[-1], dtype=torch.float64)
    one = 200 * torch.finfo(torch.float32).eps * values.double().abs().amax(-1)
    error = (matrices @ v - v * values[:, None].double()).abs().amax((1, 2))
    if not bool((error <= one).all()):
        return f"residual {error.tolist()}"
    return (
        None if float((v.mT @ v - identity).abs().max()) <= 200 * torch.finfo(torch.float32).eps else "not orthonormal"
    )


def test_every_operator_has_a_case():
    assert schemas.SCHEMAS.keys() <= {word for name in CASES for word in name.replace(",", " ").split()}


def test_one_thread(one):
    wrong = faults(ONE, one, one) + inexact(ONE, one, one)
    assert not wrong, "\n".join(wrong)


# Minutes on two cores: `make test` runs one and the default number of threads, and 2 callers.
@pytest.mark.parametrize(
    "setting", [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS if s != ONE]
)
def test_threads(setting, one, tmp_path):
    out = tmp_path / "found.pt"
    found = finish(setting, start(setting, out, "default"), out)
    wrong = faults(setting, found, one) + inexact(setting, found, one)
    assert not wrong, "\n".join(wrong)


def test_a_fault_is_named(one):
    """Another bit of an exact operator, wrong rows and another rank of a truncation, zeros of an eigenvector."""
    adamw, energy, eigh = (
        next(n for n in CASES if n.startswith(x)) for x in ("sparse_adamw_, layers", "svd_denoise(energy)", "eigh,")
    )
    key, rank, vectors = "low rank 0, 768x768", "rank of low rank 0, 768x768", "vectors 768"
    first = one["calls"]["first"]
    changed = {name: dict(first[name]) for name in (adamw, energy, eigh)}
    tensors = dict(one["tensors"])

    def put(name: str, key: str, change) -> None:
        tensors[f"wrong {key}"] = change(tensors[first[name][key]].clone())
        changed[name][key] = f"wrong {key}"

    changed[adamw]["mlp"] = "wrong"
    put(energy, key, lambda w: w.index_fill_(0, torch.tensor([5]), 0))
    put(energy, rank, lambda r: r + 1)
    put(eigh, vectors, lambda v: v.index_fill_(0, torch.tensor([1]), 0))
    found = {"calls": {"first": changed}, "tensors": tensors}
    assert faults("3 threads", found, one) == [
        f"3 threads, first call: {adamw}: mlp is not what one thread gives",
        f"3 threads, first call: {energy}: {key} is not what one thread gives",
        f"3 threads, first call: {energy}: {rank} is not what one thread gives",
    ]
    reported = inexact("3 threads", found, one)
    assert len(reported) == 2
    assert reported[0].startswith(f"3 threads, first call: {energy}: {key}: rank ")
    assert reported[1].startswith(f"3 threads, first call: {eigh}: {vectors}: not orthonormal")
    changed[adamw] = {"error": "RuntimeError: no"}
    assert any("RuntimeError: no" in line for line in faults("3 threads", found, one))


# ---- slow: 3072 and 4096 rows, and the whole embedding ----


@pytest.fixture(scope="module")
def slow_one(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("threads") / "one.pt"
    return finish(ONE, start(ONE, out, "slow"), out)


@pytest.mark.slow
def test_one_thread_slow(slow_one):
    """Against float64: the truncation of one matrix of 3072 rows, the eigenvectors of 4096 and the rows of the
    embedding.
    """
    wrong = faults(ONE, slow_one, slow_one)
    assert not wrong, "\n".join(wrong)
    results = {k: slow_one["tensors"][d] for case in slow_one["calls"]["first"].values() for k, d in case.items()}
    w = threads_inputs.slow_matrices()["low rank 0, 3072x3072"].double()
    table = threads_inputs.slow_table().double()
    for matrix, name, rows in (
        (w, "low rank 0, 3072x3072", slice(None)),
        (table, "every 100th row", slice(None, None, 100)),
    ):
        gram = matrix.mT @ matrix
        squares, vectors = (x.flip(-1) for x in torch.linalg.eigh(gram))
        assert float((gram @ vectors - vectors * squares).abs().max()) < 1e-12 * float(gram.square().sum().sqrt())
        rank = Decomposition(vectors, squares.clamp(min=0).sqrt(), vectors).rank_of(0.9)
        exact = matrix[rows] @ vectors[:, :rank] @ vectors[:, :rank].mT
        key = "rank of 250002x768" if matrix is table else f"rank of {name}"
        assert int(results[key]) == rank
        assert distance(results[name], exact) <= TRUNCATION
    a, values, v = (
        threads_inputs.slow_symmetric().double(),
        results["values 4096"].double(),
        results["vectors 4096"].double(),
    )
    unit = 200 * torch.finfo(torch.float32).eps
    for matrix, w, x in zip(a, values, v):
        assert float((matrix @ x - x * w).abs().max()) <= unit * float(w.abs().max())
        assert float((x.mT @ x - torch.eye(4096, dtype=torch.float64)).abs().max()) <= unit


@pytest.mark.slow
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s != ONE and "callers" not in s])
def test_threads_slow(setting, slow_one, tmp_path):
    out = tmp_path / "found.pt"
    wrong = faults(setting, finish(setting, start(setting, out, "slow"), out), slow_one)
    assert not wrong, "\n".join(wrong)
