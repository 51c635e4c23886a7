"""masked_linear_grad by strips, with the bounds of test_masked_linear_grad.py; the rule for which calls it serves; and
the order of its two streams, on streams that only record what waits for what.
"""

import contextlib

import pytest
import torch

from tests.conftest import implementations
from tests.nn.gradient_checks import BF16, FP32, assert_within, csr, random_mask
from tests.nn.linear_case import Case, all_dtypes, gpu_dtypes

pytest.importorskip("triton")

from deftx_kernels.kernels import masked_linear_grad as fused
from deftx_kernels.kernels import product_strips as module
from deftx_kernels.kernels.launch import cdiv

only_triton = implementations("triton-sm80", "triton-interpreter")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 16


@pytest.fixture
def rows_of_strips(monkeypatch):
    """All calls are served in strips of this many rows; 0: by the fused kernel."""

    def choose(rows: int) -> None:
        monkeypatch.setattr(fused, "strip_rows", lambda *_: rows)

    choose(ROWS)
    return choose


def launches(implementation) -> list:
    return [(name, grid) for name, grid, *_ in implementation.ops.launches]


# (tokens, rows, columns, density)
SHAPES = {
    "one strip": (5, 9, 40, 0.3),
    "two strips": (5, 2 * ROWS, 40, 0.3),
    "a last strip of one row": (7, 3 * ROWS + 1, 33, 0.3),
    "a last short strip": (1, 5 * ROWS - 3, 17, 0.5),
    "one column": (4, 2 * ROWS + 5, 1, 0.5),
    "every entry": (3, 2 * ROWS + 2, 130, 1.0),
    "rows in parts": (2, ROWS + 1, 2 * module.BLOCK + 7, 1.0),
    "mostly empty rows": (6, 6 * ROWS + 1, 50, 0.004),
}


@only_triton
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(implementation, rows_of_strips, shape, dtype):
    tokens, rows, columns, density = SHAPES[shape]
    case = Case(tokens, random_mask(rows, columns, density), dtype)
    got = case.check(implementation)
    if implementation.name == "triton-sm80":
        parts = cdiv(len(case.csr[1]), rows * module.BLOCK)
        assert parts == (3 if shape == "rows in parts" else 1)
        strips = [(ROWS, parts, 1)] * (rows // ROWS) + [(rows % ROWS, parts, 1)] * (rows % ROWS > 0)
        assert [grid for _, grid in launches(implementation)] == strips
    with implementation.without_racecheck():
        assert torch.equal(got, case.run(implementation))


@only_triton
@all_dtypes
def test_dtypes(implementation, rows_of_strips, dtypes):
    if implementation.name == "triton-interpreter" and dtypes[2] == BF16:
        pytest.skip("Triton's interpreter truncates to bfloat16")
    Case(40, random_mask(3 * ROWS + 2, 35, 0.3), *dtypes[:2]).check(implementation, dtypes[2])


@only_triton
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_int32_columns(implementation, rows_of_strips, dtype):
    Case(10, random_mask(2 * ROWS + 3, 60, 0.3), dtype, int32=True).check(implementation)


@only_triton
def test_more_than_65536_columns(implementation, rows_of_strips):
    rows_of_strips(1)
    mask = torch.zeros(3, 66_000, dtype=torch.bool)
    mask[0, [0, 65_535, 65_536, 65_999]] = True
    mask[2, 65_000:65_900:3] = True
    Case(3, mask).check(implementation)


@only_triton
def test_empty_strips_and_long_rows(implementation, rows_of_strips):
    """Strips without entries at the start, inside and at the end; rows of many more entries than the others."""
    mask = torch.zeros(6 * ROWS + 5, 2 * module.BLOCK + 9, dtype=torch.bool)
    mask[ROWS] = True
    mask[2 * ROWS - 1, : module.BLOCK] = True
    mask[2 * ROWS, : module.BLOCK + 1] = True
    mask[4 * ROWS : 5 * ROWS] = random_mask(ROWS, mask.shape[1], 0.02)
    Case(4, mask).check(implementation)


@only_triton
def test_inputs_that_require_gradients(implementation, rows_of_strips):
    case = Case(4, random_mask(3 * ROWS, 20, 0.4))
    want = case.run(implementation)
    case.grad_output.requires_grad_()
    case.input.requires_grad_()
    got = case.run(implementation)
    assert not got.requires_grad
    assert torch.equal(got, want)


@only_triton
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_equals_the_fused_kernel(implementation, rows_of_strips, dtype):
    if implementation.name == "triton-interpreter" and dtype == BF16:
        pytest.skip("Triton's interpreter gets 16-bit products wrong")
    case = Case(50, random_mask(3 * ROWS + 1, 70, 0.2), dtype)
    by_strips = case.check(implementation)
    rows_of_strips(0)
    with implementation.without_racecheck():
        assert_within(case.check(implementation), by_strips.double(), 2 * case.bound())


@only_triton
def test_a_wrong_mask_reads_and_writes_inside_only(implementation, rows_of_strips):
    """The emulator refuses other addresses."""
    case = Case(3, random_mask(2 * ROWS + 3, 40, 0.4), clean=True)
    crow, col = case.csr[0].clone(), case.csr[1].to(torch.int32)
    crow[3:12] = torch.tensor([-5, 2**40, 7, -(2**62), len(col), len(col) + 1, 2**62, 0, 1])
    col[::5] = torch.tensor([-1, 40, 2**31 - 1, -(2**31), 64]).repeat(len(col))[: len(col[::5])]
    case.csr = crow, col
    assert case.run(implementation).shape == col.shape


# ---- which calls it serves ----
MULTIPROCESSORS = 132


def chosen(tokens: int, m: int, n: int, itemsize: int = 2, precision: str = "ieee", density: float = 0.05) -> int:
    return module.strip_rows(tokens, m, n, round(density * m * n), itemsize, precision, MULTIPROCESSORS)


@pytest.mark.parametrize(
    ("m", "n", "rows"),
    [
        (4096, 4096, 1024),
        (11_008, 4096, 1024),
        (4096, 11_008, 384),
        (4096, 14_336, 256),
        (5120, 5120, 768),
        (8192, 2048, 2048),
        (2048, 2048, 0),  # one strip
        (3072, 768, 0),
        (768, 768, 0),
        (4096 + 128, 4096, 0),  # five waves, of which each is a fifth empty
        (4096, 65_536, 0),  # the scratch buffer has less than a row of tiles
        (128_256, 4096, 1024),
    ],
)
def test_rows_of_strips(m, n, rows):
    assert chosen(2048, m, n) == rows
    assert chosen(2047, m, n) == 0


def test_tokens_and_density():
    for (itemsize, precision), (_, tokens) in module.TILES.items():
        assert chosen(tokens, 4096, 4096, itemsize, precision) > 0
        assert chosen(tokens - 1, 4096, 4096, itemsize, precision) == 0
    assert chosen(2048, 4096, 4096, density=1.0) > 0
    assert chosen(2048, 4096, 4096, density=1 / module.SPARSEST) > 0
    assert chosen(2048, 4096, 4096, density=0.9 / module.SPARSEST) == 0


@pytest.mark.parametrize(("itemsize", "precision"), module.TILES)
@pytest.mark.parametrize("multiprocessors", [1, 108, 132, 148])
def test_a_strip_is_a_wave_at_most_and_fits_the_scratch_buffer(itemsize, precision, multiprocessors):
    tile_n, tokens = module.TILES[itemsize, precision]
    served = 0
    for m in range(1, 30_000, 977):
        for n in range(1, 40_000, 1931):
            rows = module.strip_rows(tokens, m, n, m * n, itemsize, precision, multiprocessors)
            if rows:
                served += 1
                assert rows % module.TILE_ROWS == 0
                assert rows < m
                assert rows * cdiv(n, 16) * 16 * max(itemsize, 4) <= module.SCRATCH
                tiles = rows // module.TILE_ROWS * cdiv(n, tile_n)
                assert tiles <= max(multiprocessors, cdiv(n, tile_n))
    assert served


@implementations("triton-sm80")
def test_the_launcher_asks_the_rule(implementation, monkeypatch):
    """2048 tokens on a device of one multiprocessor, as which the CPU counts: two strips of 128 rows."""
    case = Case(2048, random_mask(200, 16, 0.2), BF16)
    with implementation.without_racecheck():
        case.check(implementation)
    assert [grid for _, grid in launches(implementation)] == [(128, 1, 1), (72, 1, 1)]
    assert {name for name, _ in launches(implementation)} == {"_gather_strip_kernel"}
    case = Case(33, random_mask(200, 16, 0.2), BF16)
    with implementation.without_racecheck():
        case.check(implementation)
    assert "_masked_linear_grad_kernel" in {name for name, _ in launches(implementation)}


# ---- the two streams ----
class Recorder:
    """Stands for the streams: knows of each operation which ones are certainly complete when it begins."""

    class Stream:
        def __init__(self, recorder):
            self.recorder, self.done = recorder, set()

        def record_event(self):
            return frozenset(self.done)

        def wait_event(self, event):
            self.done |= event

        def wait_stream(self, other):
            self.done |= other.done

        def run(self, operation):
            self.recorder.before[operation] = set(self.done)
            self.done.add(operation)

    def __init__(self):
        self.before, self.current = {}, None
        self.main, self.side = self.Stream(self), self.Stream(self)

    @contextlib.contextmanager
    def use(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


def test_what_waits_for_what(monkeypatch):
    streams, buffers = Recorder(), {"product": [], "gather": []}
    streams.current = streams.main

    def operation(kind, buffer_of):
        def run(*arguments):
            streams.current.run((kind, len(buffers[kind])))
            buffers[kind].append(buffer_of(*arguments).data_ptr())

        return run

    monkeypatch.setattr(module, "_streams", lambda device: (streams.main, streams.side))
    monkeypatch.setattr(torch.cuda, "stream", streams.use)
    monkeypatch.setattr(module, "_multiply", operation("product", lambda a, b, out: out))
    monkeypatch.setattr(module, "_launch", operation("gather", lambda grid, kind, tensors, *_: tensors[0]))
    crow, col = csr(torch.ones(5 * ROWS, 16, dtype=torch.bool))
    module.gather_by_strips(torch.zeros(3, 80), torch.zeros(3, 16), crow, col, torch.zeros(len(col)), ROWS, FP32)
    assert buffers["product"] == buffers["gather"]
    assert len(buffers["product"]) == 5
    for i, buffer in enumerate(buffers["product"]):
        assert ("product", i) in streams.before["gather", i]
        earlier = {("gather", j) for j in range(i) if buffers["gather"][j] == buffer}
        assert earlier <= streams.before["product", i]  # the buffer has been read
        assert ("gather", i - 1) not in streams.before["product", i]  # the two run at the same time
    assert {("gather", i) for i in range(5)} <= streams.main.done


def test_a_failed_launch_leaves_no_stream_behind(monkeypatch):
    streams = Recorder()

    def fail(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(module, "_streams", lambda device: (streams.main, streams.side))
    monkeypatch.setattr(torch.cuda, "stream", streams.use)
    monkeypatch.setattr(module, "_launch", fail)
    crow, col = csr(torch.ones(2 * ROWS, 16, dtype=torch.bool))
    streams.side.done.add("anything")
    with pytest.raises(RuntimeError, match="no kernel"):
        module.gather_by_strips(torch.zeros(3, 32), torch.zeros(3, 16), crow, col, torch.zeros(512), ROWS, FP32)
    assert "anything" in streams.main.done


# ---- on a GPU ----
@implementations("cuda")
@gpu_dtypes
@pytest.mark.parametrize("shape", [(2048, 1000, 768), (777, 1111, 999), (64, 129, 3000)], ids=str)
def test_strips_on_the_gpu(implementation, rows_of_strips, dtypes, shape):
    tokens, rows, columns = shape
    rows_of_strips(128)
    case = Case(tokens, random_mask(rows, columns, 0.1), dtypes[0])
    got = case.check(implementation, dtypes[1])
    assert torch.equal(got, case.run(implementation, dtypes[1]))
    rows_of_strips(0)
    assert_within(case.run(implementation, dtypes[1]), got.double(), 2 * case.bound(dtypes[1]))


def large_layer() -> list[torch.Tensor]:
    mask = random_mask(4096, 4096, 0.05)
    grad_output, x = (torch.randn(2048, 4096, dtype=BF16, device="cuda") for _ in range(2))
    return [grad_output, x, *(t.cuda() for t in csr(mask))]


@pytest.mark.gpu
def test_a_large_layer_takes_no_dense_gradient():
    arguments = large_layer()
    torch.ops.deftx.masked_linear_grad(*arguments, FP32)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = torch.ops.deftx.masked_linear_grad(*arguments, FP32)
    assert torch.cuda.max_memory_allocated() - before <= 2 * module.SCRATCH + 4 * len(got) + 4096
    dense = torch.mm(arguments[0].T, arguments[1], out_dtype=FP32)
    want = dense[torch.repeat_interleave(arguments[2].diff()), arguments[3].long()]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
def test_strips_are_captured_in_a_cuda_graph():
    arguments = large_layer()
    torch.ops.deftx.masked_linear_grad(*arguments, FP32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.deftx.masked_linear_grad(*arguments, FP32)
    for _ in range(3):
        arguments[0].copy_(torch.randn_like(arguments[0]))
        graph.replay()
        replayed = captured.clone()
        torch.testing.assert_close(replayed, torch.ops.deftx.masked_linear_grad(*arguments, FP32), rtol=1e-4, atol=1e-2)
        graph.replay()
        assert torch.equal(captured, replayed)
