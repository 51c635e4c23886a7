"""bit_diff, flat_exchange_, bit_checksum, bit_checksum_change, set_bits against NumPy and Python's integers, the same
tests for every implementation.
"""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from deftx_kernels.ops import registrations, schemas
from tests.conftest import implementations
from tests.operators import MANY, SHAPES, bits, explore, replaced, with_threads

OPS = ("bit_diff", "flat_exchange_", "bit_checksum", "bit_checksum_change", "set_bits")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
DTYPES += [torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
LOW, ALL = 2**32 - 1, 2**64 - 1


# ---- inputs: NumPy arrays of bytes [elements, bytes of an element], and tensors of these bits ----
def random_bytes(shape, dtype, rng) -> np.ndarray:
    found = rng.integers(0, 2 if dtype == torch.bool else 256, (int(np.prod(shape)), dtype.itemsize), dtype=np.uint8)
    found[rng.random(len(found)) < 0.1] = 0
    return found


def changed_bytes(data, dtype, share, rng) -> np.ndarray:
    """One bit is flipped in a share of the elements: signs, the last bit, NaN payloads."""
    found = data.copy()
    for i in np.flatnonzero(rng.random(len(data)) < share):
        byte, bit = rng.integers(dtype.itemsize), 0 if dtype == torch.bool else rng.integers(8)
        found[i, byte] ^= np.uint8(1 << bit)
    return found


def tensor_of(data, shape, dtype, device="cpu", aligned=False) -> torch.Tensor:
    """One element into its storage, so that nothing is aligned by chance."""
    flat = torch.empty(len(data) + 16, dtype=dtype, device=device)
    flat = flat[: len(data)] if aligned else flat[1 : len(data) + 1]
    if len(data):
        flat.view(torch.uint8).copy_(torch.from_numpy(data.reshape(-1)))
    return flat.view(shape)


class Problem:
    """Tensors before and after a change of some elements."""

    def __init__(self, shapes, dtype, share=0.1, seed=0, device="cpu", aligned=False):
        rng = np.random.default_rng(seed)
        self.shapes, self.dtype, self.device, self.aligned = shapes, dtype, device, aligned
        self.old = [random_bytes(s, dtype, rng) for s in shapes]
        self.new = [changed_bytes(d, dtype, share, rng) for d in self.old]
        self.changed = [np.flatnonzero((a != b).any(1)) for a, b in zip(self.new, self.old)]

    def tensors(self, data) -> list[torch.Tensor]:
        return [tensor_of(d, s, self.dtype, self.device, self.aligned) for d, s in zip(data, self.shapes)]

    def values(self, data) -> np.ndarray:  # [nnz, bytes]
        found = [d[i] for d, i in zip(data, self.changed)]
        return np.concatenate(found) if found else np.empty((0, self.dtype.itemsize), np.uint8)

    def indices(self) -> np.ndarray:
        return np.concatenate(self.changed) if self.changed else np.empty(0, np.int64)

    def entries(self, data, index=torch.int32) -> list[torch.Tensor]:
        """offsets, indices and the values of `data`, each one element into its storage."""
        offsets, indices = self.offsets(), self.indices()
        found = [(offsets, torch.int64), (indices.astype(np.int32 if index == torch.int32 else np.int64), index)]
        found = [tensor_of(a.view(np.uint8).reshape(len(a), t.itemsize), (len(a),), t, self.device) for a, t in found]
        return [*found, self.compact(data)]

    def compact(self, data) -> torch.Tensor:
        values = self.values(data)
        return tensor_of(values, (len(values),), self.dtype, self.device)

    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.changed)], dtype=np.int64)

    def check(self, implementation) -> None:
        ops, new, old = implementation.ops, self.tensors(self.new), self.tensors(self.old)
        found = ops.bit_diff(new, old)
        for name, got, want in zip(("offsets", "indices"), found, (self.offsets(), self.indices())):
            assert got.cpu().tolist() == want.tolist(), name
        assert [t.dtype for t in found] == [torch.int64, torch.int32, self.dtype]
        assert all(t.device.type == self.device for t in found)
        np.testing.assert_array_equal(bits(found[2]), self.values(self.new))

        sums, want = [ops.bit_checksum(t) for t in (old, new)], [list(map(checksum, d)) for d in (self.old, self.new)]
        assert [s.dtype for s in sums] == [torch.int64] * 2
        assert [[x & ALL for x in s.tolist()] for s in sums] == want

        for index in (torch.int32, torch.int64):
            given, written = self.entries(self.new, index), self.tensors(self.old)
            before = given[2].clone()
            ops.flat_exchange_(written, *given[:2], before)
            assert before.dtype == self.dtype
            np.testing.assert_array_equal(bits(before), self.values(self.old))
            for t, data in zip(written, self.new):
                np.testing.assert_array_equal(bits(t), data)
            change = ops.bit_checksum_change(*given[:2], before, given[2])
            assert change.dtype == torch.int64
            assert [x & ALL for x in (sums[0] + change).tolist()] == want[1]


def key(word: int) -> int:
    """As the docstring of the reference defines it."""
    x = ((word & LOW) * 0x9E3779B1 + (word >> 32) * 0xC2B2AE3D) & LOW
    x = ((x ^ x >> 15) * 0x85EBCA77) & LOW
    return x ^ x >> 13 | 1


def checksum(data: np.ndarray) -> int:
    content = data.tobytes()
    words = [int.from_bytes(content[i : i + 4], "little") for i in range(0, len(content), 4)]
    return sum(key(i) * w for i, w in enumerate(words)) & ALL


# ---- tests ----
@pytest.mark.usefixtures("no_racecheck")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random(implementation, dtype):
    """No tensor, empty and 0-d ones, none and all elements changed."""
    examples = st.tuples(
        st.lists(st.sampled_from([*SHAPES, (100,), (1030,)]), max_size=5),
        st.sampled_from([0.0, 0.02, 0.3, 1.0]),
        st.integers(0, 2**32 - 1),
        st.booleans(),
    )

    def check(example):
        shapes, share, seed, aligned = example
        if shapes:
            Problem(shapes, dtype, share, seed, implementation.device, aligned).check(implementation)

    explore(implementation, examples, check, few=6, many=40)


# Around the sizes at which the kernels take another path: the C++ kernel's lines of 64 bytes and chunks of 65,536
# elements, where tensors begin and end, and the CUDA kernels' tiles of 1024 elements and 4096 words, and steps of 256
# entries.
@pytest.mark.parametrize(
    ("shapes", "dtype", "share"),
    [
        ([(65_536,), (0,), (65_535,), (1,), (0,), (0, 3)], torch.int8, 0.02),
        ([(0,), (3,), (65_533,), (131_073,), (), (0,)], torch.bfloat16, 0.02),
        ([(1023,), (0,), (1025,), (2, 1024), (5, 821)], torch.float32, 0.2),
        ([(2049,), (7,), (255,), (257,)], torch.float64, 1.0),
    ],
    ids=str,
)
def test_edges(implementation, shapes, dtype, share):
    for aligned in (True, False):
        Problem(shapes, dtype, share, 1, implementation.device, aligned).check(implementation)


def test_threads_do_not_matter(implementation):
    if implementation.name != "c++":
        pytest.skip("about the CPU library's threads")
    shapes = [(300_000,), (), (0,), (70, 1000), (9,)] * 3
    problem = Problem(shapes, torch.bfloat16, 0.05, 2)
    new, old, ops = problem.tensors(problem.new), problem.tensors(problem.old), implementation.ops

    def results():
        found, written = ops.bit_diff(new, old), [t.clone() for t in old]
        before = found[2].clone()
        ops.flat_exchange_(written, *found[:2], before)
        return *found, before, *written, ops.bit_checksum(new), ops.bit_checksum_change(*found[:2], before, found[2])

    first, *others = with_threads(results, (1, 2, 3, 8))
    for other in others:
        for got, want in zip(other, first, strict=True):
            np.testing.assert_array_equal(bits(got), bits(want))
    assert first[1].tolist() == problem.indices().tolist()
    np.testing.assert_array_equal(np.concatenate(list(map(bits, first[4:-2]))), np.concatenate(problem.new))


def test_no_tensors():
    """The CPU and float32, since there is no tensor to take a device and a dtype from."""
    ops, none = torch.ops.deftx, torch.zeros(1, dtype=torch.int64)
    offsets, indices, values = ops.bit_diff([], [])
    assert offsets.tolist() == [0]
    assert (indices.dtype, values.dtype, indices.shape, values.shape) == (torch.int32, torch.float32, (0,), (0,))
    assert ops.bit_checksum([]).tolist() == []
    ops.flat_exchange_([], none, indices, values.bool())
    assert ops.bit_checksum_change(none, indices, values, values).tolist() == []


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_many_tensors(implementation, share):
    shapes = [SHAPES[i % len(SHAPES)] for i in range(MANY)]
    with implementation.without_racecheck():
        Problem(shapes, torch.bfloat16, share, 3, implementation.device).check(implementation)


@pytest.mark.usefixtures("no_racecheck")
def test_special_floats(implementation):
    """Zeros of both signs differ, NaNs are compared by their payloads, and copies are copies of bits."""
    old = torch.tensor([0x0000, 0x8000, 0x7FC0, 0x7FC1, 0x7F81, 0x3F80, 0x7FC0], dtype=torch.int32).to(torch.int16)
    new = torch.tensor([0x8000, 0x8000, 0x7FC1, 0x7FC1, 0x7FC1, 0x3F80, 0xFFC0], dtype=torch.int32).to(torch.int16)
    given = [[t.to(implementation.device, copy=True).view(torch.bfloat16)] for t in (new, old)]
    offsets, indices, values = implementation.ops.bit_diff(*given)
    assert (offsets.tolist(), indices.tolist()) == ([0, 4], [0, 2, 4, 6])
    assert torch.equal(values.view(torch.int16).cpu(), new[[0, 2, 4, 6]])
    implementation.ops.flat_exchange_(given[1], offsets, indices, values)
    assert torch.equal(values.view(torch.int16).cpu(), old[[0, 2, 4, 6]])
    assert torch.equal(given[1][0].view(torch.int16).cpu(), new)


@pytest.mark.usefixtures("no_racecheck")
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_each_flipped_bit_changes_the_checksum(implementation, dtype):
    data = random_bytes((70,), dtype, np.random.default_rng(0))
    flipped = [data] + [data.copy() for _ in range(70 * 8)]
    rng = np.random.default_rng(1)
    for i, other in enumerate(flipped[1:]):
        other[i // 8, rng.integers(dtype.itemsize)] ^= np.uint8(1 << i % 8)
    tensors = [tensor_of(d, (70,), dtype, implementation.device) for d in flipped]
    sums = implementation.ops.bit_checksum(tensors).tolist()
    assert len(set(sums)) == len(sums)


@pytest.mark.usefixtures("no_racecheck")
def test_indices_of_large_tensors(implementation):
    """A change of checksums has indices alone, of tensors of any size; words above 2**32 have other keys."""
    where = [0, 1, 2**31 - 1, 2**31, 2**32, 2**33 - 1, 2**33, 2**33 + 1, 2**40 + 5]
    rng = np.random.default_rng(2)
    for dtype in (torch.int8, torch.int16, torch.float32, torch.float64):
        old, new = (random_bytes((len(where),), dtype, rng) for _ in range(2))
        each, expected = dtype.itemsize / 4, [0, 0]
        for k, (i, a, b) in enumerate(zip(where, old, new)):
            for data, sign in ((a, -1), (b, 1)):
                low = i * dtype.itemsize % 4
                content = bytes(low) + data.tobytes()
                words = [int.from_bytes(content[j : j + 4], "little") for j in range(0, len(content), 4)]
                expected[k > 4] += sign * sum(key(int(i * each) + j) * w for j, w in enumerate(words))
        given = [torch.tensor(x, device=implementation.device) for x in ([0, 5, len(where)], where)]
        given += [tensor_of(d, (len(where),), dtype, implementation.device) for d in (old, new)]
        found = implementation.ops.bit_checksum_change(*given)
        assert [x & ALL for x in found.tolist()] == [x & ALL for x in expected], dtype
    assert len({key(w << 32) for w in range(100)}) == 100


def test_entries_of_a_large_tensor(implementation):
    """4 GB of address space, of which a few pages are touched."""
    where, numel = [0, 5, 2**31 - 1, 2**31, 2**31 + 99], 2**31 + 100
    tensor = torch.from_numpy(np.zeros(numel, np.int16)).to(implementation.device).view(torch.bfloat16)
    given = [torch.tensor([0, 1, 1 + len(where)]), torch.tensor([2, *where]), torch.arange(6.0).bfloat16()]
    given = [t.to(implementation.device) for t in given]
    small = torch.zeros(3).bfloat16().to(implementation.device)
    implementation.ops.flat_exchange_([small, tensor], *given)
    assert not given[2].any()
    assert [*small[[2]].tolist(), *tensor[where].tolist()] == [0, 1, 2, 3, 4, 5]
    implementation.ops.flat_exchange_([small, tensor], *given)
    assert given[2].tolist() == [0, 1, 2, 3, 4, 5]
    assert not small.any()
    assert not tensor[where].any()


@implementations("c++", "cuda")
def test_difference_of_large_tensors(implementation):
    """More than 2**31 elements, zeros that NumPy leaves to the system's one page of zeros."""
    where, numel = [3, 2**31 - 1, 2**31, 2**31 + 60], 2**31 + 61
    new, old = (torch.from_numpy(np.zeros(numel, np.uint8)).to(implementation.device) for _ in range(2))
    new[where] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8, device=new.device)
    small = torch.ones(1, dtype=torch.uint8, device=new.device)
    offsets, indices, values = implementation.ops.bit_diff([small, new], [small + 1, old])
    assert (offsets.tolist(), indices.dtype) == ([0, 1, 5], torch.int64)
    assert (indices.tolist(), values.tolist()) == ([0, *where], [1, 1, 2, 3, 4])
    found = implementation.ops.bit_checksum([new]).tolist()
    assert found == [sum(key(i // 4) * (v << 8 * (i % 4)) for i, v in zip(where, (1, 2, 3, 4)))]


def numbers_of(words, starts) -> tuple[list[int], list[int]]:
    """What set_bits returns, by NumPy."""
    number = np.flatnonzero(np.unpackbits(words.numpy().view(np.uint8), bitorder="little"))
    parts = [number[(number >= a) & (number < b)] - a for a, b in zip(starts, starts[1:])]
    return np.cumsum([0, *map(len, parts)]).tolist(), [int(i) for part in parts for i in part]


@pytest.mark.usefixtures("no_racecheck")
def test_set_bits(implementation):
    """Parts that begin within words, empty ones, bits before the first and after the last part."""
    examples = st.tuples(
        st.integers(0, 140),  # words
        st.sampled_from([0.0, 0.01, 0.4, 1.0]),
        st.lists(st.floats(0, 1), min_size=1, max_size=70),
        st.integers(0, 2**32 - 1),
    )

    def check(example):
        count, share, places, seed = example
        flags = np.random.default_rng(seed).random(32 * count) < share
        words = torch.from_numpy(np.packbits(flags, bitorder="little").view(np.int32).copy())
        starts = sorted(int(p * 32 * count) for p in places)
        given = [t.to(implementation.device) for t in (words, torch.tensor(starts))]
        offsets, indices = implementation.ops.set_bits(*given)
        assert (offsets.tolist(), indices.tolist()) == numbers_of(words, starts)
        assert (offsets.dtype, indices.dtype) == (torch.int64, torch.int32)

    explore(implementation, examples, check)


def test_set_bits_of_many_words(implementation):
    """More than a chunk of each implementation; a word of each is empty."""
    words = torch.randint(-(2**31), 2**31, (5000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    words[::3] = 0
    starts = [5, 5, 31, 32, 33, 70_000, 70_000, 159_999]
    given = [t.to(implementation.device) for t in (words, torch.tensor(starts))]
    for found in with_threads(lambda: implementation.ops.set_bits(*given), (1, 2, 3)):
        assert tuple(t.tolist() for t in found) == numbers_of(words, starts)


@implementations("c++", "cuda")
def test_set_bits_above_two_billion(implementation):
    words = torch.from_numpy(np.zeros(2**26 + 2, np.int32)).to(implementation.device)
    words[[0, 2**26, 2**26 + 1]] = torch.tensor([2, 4, -(2**31)], dtype=torch.int32, device=words.device)
    starts = [1, 31, 2**31 + 64]
    offsets, indices = implementation.ops.set_bits(words, torch.tensor(starts, device=words.device))
    assert (offsets.tolist(), indices.dtype) == ([0, 1, 3], torch.int64)
    assert indices.tolist() == [0, 2**31 + 2 - 31, 2**31 + 63 - 31]


# What is wrong -> (the operator, the changed arguments by number, what the message names)
WRONG = {
    "fewer old": ("bit_diff", {1: lambda x: x[:1]}, "new and old must have one tensor for each other, got 2 and 1"),
    "shape": ("bit_diff", {1: lambda x: [x[0], x[1].view(-1)]}, r"old\[1\] must have the shape of new\[1\]"),
    "dtype of old": ("bit_diff", {1: lambda x: [x[0].int(), x[1]]}, r"old\[0\] must (be float32|have the dtype)"),
    "dtype of new": ("bit_diff", {0: lambda x: [x[0], x[1].int()]}, r"new\[1\] must (be float32|have the dtype)"),
    "16 bytes": ("bit_checksum", {0: lambda x: [x[0].to(torch.complex128)]}, "1, 2, 4 or 8 bytes"),
    "strided": ("bit_checksum", {0: lambda x: [x[0], x[1].mT]}, r"tensors\[1\] must be contiguous"),
    "values dtype": ("flat_exchange_", {3: lambda x: x.int()}, r"tensors\[0\] must (be int32|have the dtype)"),
    "values short": ("flat_exchange_", {3: lambda x: x[:-1]}, "values must have shape"),
    "offsets int32": ("flat_exchange_", {1: lambda x: x.int()}, "offsets must be int64"),
    "offsets short": ("flat_exchange_", {1: lambda x: x[:-1]}, "offsets has 2 elements; 2 tensors need 3"),
    "indices uint16": ("flat_exchange_", {2: lambda x: x.to(torch.uint16)}, "indices must be int32 or int64"),
    "indices 2-D": ("flat_exchange_", {2: lambda x: x[None]}, "offsets must have shape|indices must have shape"),
    "shared": ("flat_exchange_", {0: lambda x: [x[1].view(-1)[:5], x[1]]}, "two of tensors.* share memory"),
    "offsets empty": ("bit_checksum_change", {0: lambda x: x[:0]}, "offsets"),
    "other dtype": ("bit_checksum_change", {3: lambda x: x.int()}, "new must (be float32|have the dtype)"),
    "old short": ("bit_checksum_change", {2: lambda x: x[1:]}, "old must have shape"),
    "words int64": ("set_bits", {0: lambda x: x.long()}, "words must be int32"),
    "words 2-D": ("set_bits", {0: lambda x: x[None]}, "words must have shape"),
    "starts int32": ("set_bits", {1: lambda x: x.int()}, "starts must be int64"),
    "starts empty": ("set_bits", {1: lambda x: x[:0]}, "starts"),
}
CONTENTS = {
    "offsets begin late": (1, lambda x: x + 1, "offsets"),
    "offsets end early": (1, lambda x: torch.tensor([0, 1, 2]), "offsets"),
    "offsets descend": (1, lambda x: torch.tensor([0, 9, len(INDICES)]), "offsets"),
    "negative": (2, lambda x: replaced(x, 0, -1), r"indices of tensors\[0\] must ascend"),
    "too large": (2, lambda x: replaced(x, -1, 30), r"indices of tensors\[1\] must ascend"),
    "far": (2, lambda x: replaced(x, 1, 2**31 - 1), r"indices of tensors\[0\] must ascend"),
    "twice": (2, lambda x: replaced(x, 1, 0), r"indices of tensors\[0\] must ascend"),
    "descend": (2, lambda x: replaced(x, 4, 3), r"indices of tensors\[1\] must ascend"),
}
INDICES = [0, 2, 4, 4, 7, 29]


def valid_arguments(op, device) -> list:
    new, old = ([torch.full((5,), x, device=device), torch.full((5, 6), x, device=device)] for x in (1.0, 2.0))
    offsets = torch.tensor([0, 3, 6], device=device)
    indices = torch.tensor(INDICES, dtype=torch.int32, device=device)
    values = torch.arange(6.0, device=device)
    return {
        "bit_diff": [new, old],
        "flat_exchange_": [old, offsets, indices, values],
        "bit_checksum": [new],
        "bit_checksum_change": [offsets, indices, values, -values],
        "set_bits": [torch.full((3,), -1, dtype=torch.int32, device=device), torch.tensor([3, 40, 96], device=device)],
    }[op]


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_raise(implementation, wrong):
    op, changes, message = WRONG[wrong]
    arguments = valid_arguments(op, implementation.device)
    for i, change in changes.items():
        arguments[i] = change(arguments[i])
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        getattr(implementation.ops, op)(*arguments)


@pytest.mark.parametrize("wrong", CONTENTS)
def test_bad_entries_change_nothing(implementation, wrong):
    """The CPU library and the reference name them; a GPU's kernels stay inside memory."""
    at, change, message = CONTENTS[wrong]
    ops, arguments = implementation.ops, valid_arguments("flat_exchange_", implementation.device)
    arguments[at] = change(arguments[at].cpu()).to(implementation.device)
    if implementation.name not in ("c++", "reference"):
        with implementation.without_racecheck():
            ops.flat_exchange_(*arguments)
        return
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.flat_exchange_(*arguments)
    assert all((t == 2).all() for t in arguments[0])
    if at == 1:
        with pytest.raises((RuntimeError, ValueError), match=message):
            ops.bit_checksum_change(*arguments[1:], arguments[3])


@pytest.mark.parametrize(
    "starts",
    [
        [-1, 40, 96],
        [3, 2, 96],
        [3, 40, 97],
        [3, 97, 96],
        [-(2**62), 2**62, 5],
        [2**63 - 101, 2**63 - 1, -(2**63)],
        [5, -(2**63)],
    ],
    ids=str,
)
def test_bad_starts(implementation, starts):
    """The CPU library and the reference name them; a GPU's kernels stay inside memory."""
    words, _ = valid_arguments("set_bits", implementation.device)
    starts = torch.tensor(starts, device=implementation.device)
    if implementation.name not in ("c++", "reference"):
        with implementation.without_racecheck():
            implementation.ops.set_bits(words, starts)
        return
    with pytest.raises((RuntimeError, ValueError), match="starts must ascend from at least 0 to at most 96"):
        implementation.ops.set_bits(words, starts)


def test_the_dtype_of_indices(monkeypatch):
    assert schemas.index_dtype([torch.empty(2**31 - 1, device="meta")]) == torch.int32
    assert schemas.index_dtype([torch.empty(2**31, 1, device="meta"), torch.empty(1)]) == torch.int64
    monkeypatch.setattr(schemas, "MAX_INT32_ELEMENTS", 4)
    zeros = [torch.zeros(4), torch.zeros(5)]
    _, indices, _ = registrations.reference_functions()["bit_diff"](zeros, [t + 1 for t in zeros])
    assert (indices.dtype, indices.tolist()) == (torch.int64, [*range(4), *range(5)])
