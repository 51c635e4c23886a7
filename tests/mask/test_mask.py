"""CSRMask: layout, gather/scatter/add, set operations, files, bad input."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deftx_kernels import CSRMask, topk_mask

SHAPE = st.sampled_from([(), (1,), (0,), (7,), (3, 5), (1, 9), (4, 0), (0, 4), (2, 3, 4), (2, 1, 2, 3)])
SHAPES = st.lists(SHAPE, min_size=1, max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])


def random_dense(shapes, seed, density=0.4):
    generator = torch.Generator().manual_seed(seed)
    # names against the order of the mapping: the layout must not depend on it
    return {f"t{9 - i}": torch.rand(s, generator=generator) < density for i, s in enumerate(shapes)}


def flat(dense):
    """The oracle's view of named tensors: one vector, by name."""
    wide = {n: t if t.dtype == torch.bool else t.double() for n, t in dense.items()}
    return np.concatenate([wide[n].numpy().reshape(-1) for n in sorted(wide)])


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 99), DTYPES)
def test_gather_scatter_add_against_numpy(shapes, seed, dtype):
    dense = random_dense(shapes, seed)
    mask = CSRMask.from_dense(dense)
    selected = flat(dense)
    assert mask.nnz == selected.sum()
    assert mask.numel == len(selected)
    back = mask.to_dense()
    assert all(torch.equal(back[n], dense[n]) for n in dense)
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = {n: torch.randint(-50, 50, t.shape, generator=generator).to(dtype) for n, t in dense.items()}
    before = flat(tensors)
    compact = mask.gather(tensors)
    assert compact.dtype == dtype
    assert np.array_equal(compact.double().numpy(), before[selected])
    if dtype.is_floating_point:
        mask.add_(tensors, compact, alpha=2)
        assert np.array_equal(flat(tensors), np.where(selected, 3 * before, before))
    mask.scatter_(tensors, compact * 0 + 7)
    assert np.array_equal(flat(tensors), np.where(selected, 7, before))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_set_operations_against_bool_tensors(shapes, seed):
    a, b = random_dense(shapes, seed), random_dense(shapes, seed + 1)
    x, y = CSRMask.from_dense(a), CSRMask.from_dense(b)
    assert x & y == CSRMask.from_dense({n: a[n] & b[n] for n in a})
    assert x | y == CSRMask.from_dense({n: a[n] | b[n] for n in a})
    assert x - y == CSRMask.from_dense({n: a[n] & ~b[n] for n in a})
    assert (x == y) == all(torch.equal(a[n], b[n]) for n in a)
    assert (x - x).nnz == 0
    values = torch.arange(1.0, x.nnz + 1)
    written = x.scatter_({n: torch.zeros(s) for n, s in zip(x.names, x.shapes)}, values)
    assert torch.equal(x.project(values, y), y.gather(written))


def test_masks_of_different_tensors_are_united():
    a = CSRMask.from_dense({"a": torch.tensor([True, False])})
    b = CSRMask.from_dense({"b": torch.eye(2, dtype=torch.bool)})
    assert ((a | b).names, (a | b).nnz, (a & b).nnz) == (("a", "b"), 3, 0)
    assert ((a | b) - b).to_dense()["a"].tolist() == [True, False]
    with pytest.raises(ValueError, match="'a' has shape"):
        _ = a | CSRMask.from_dense({"a": torch.ones(3, dtype=torch.bool)})


def test_layout_is_by_name_and_the_mapping_order_does_not_matter():
    dense = {"b": torch.tensor([[True, False], [True, True]]), "a": torch.tensor([False, True])}
    mask = CSRMask.from_dense(dense)
    assert mask.names == ("a", "b")
    assert (mask.crow_indices.tolist(), mask.col_indices.tolist()) == ([0, 1, 2, 4], [1, 0, 0, 1])
    assert mask == CSRMask.from_dense(dict(reversed(dense.items())))
    assert mask.summary()["b"] == {"shape": (2, 2), "numel": 4, "nnz": 3, "density": 0.75}


def test_wide_tensors_have_int32_columns():
    """spops' int16 columns overflow above 32,767; ours are uint16 up to 65,536 columns, then int32."""
    for width, dtype in ((40_000, torch.uint16), (65_536, torch.uint16), (65_537, torch.int32)):
        scores = torch.zeros(2, width)
        scores[1, width - 1] = 1
        scores[0, 33_000] = 2
        mask = topk_mask({"w": scores}, k=2)
        assert (mask.col_indices.dtype, mask.col_indices.tolist()) == (dtype, [33_000, width - 1])
        assert mask["w"].gather({"w": scores}).tolist() == [2, 1]


def test_positions_beyond_two_to_the_31():
    """composable-sft decodes tensors of 2**31 elements and more wrongly. Here: a few entries of 2.8e9 elements."""
    shapes = [(70_000, 40_000), (5,)]

    def at(*rows_and_columns):
        crow = torch.zeros(70_002, dtype=torch.int64)
        for row, _ in rows_and_columns:
            crow[row + 1 :] += 1
        return CSRMask(["big", "small"], shapes, crow, torch.tensor([c for _, c in rows_and_columns]).to(torch.uint16))

    one, two = at((0, 3), (69_999, 39_999), (70_000, 4)), at((53_688, 0), (69_999, 39_999))
    assert one.numel == 2_800_000_005
    assert one & two == at((69_999, 39_999))
    assert one - two == at((0, 3), (70_000, 4))
    assert one | two == at((0, 3), (53_688, 0), (69_999, 39_999), (70_000, 4))
    assert one.project(torch.tensor([1.0, 2.0, 3.0]), two).tolist() == [0, 2]


PROJECTED = [
    torch.tensor([-0.0, 1.5, float("inf"), -6e4, 1e-7]),
    torch.tensor([-0.0, 1 / 3, 1e300, -6e4, 1e-320], dtype=torch.float64),
    torch.tensor([True, False, True, True, False]),
    torch.tensor([2**62 + 1, -(2**63), 0, 7, -1]),
    torch.tensor([255, 1, 2, 0, 4], dtype=torch.uint8),
    torch.tensor([1 + 2j, 3j, 0, -1, 5]),
]


@pytest.mark.parametrize(
    "compact", [*PROJECTED, PROJECTED[0].bfloat16(), PROJECTED[0].half()], ids=lambda t: str(t.dtype)
)
def test_project_keeps_every_dtype(compact):
    """The bits too, also from a tensor that is not contiguous or needs a gradient, and to a wider layout."""
    one = CSRMask.from_dense({"w": torch.tensor([[True, False, True], [True, True, True]])})
    wide = torch.zeros(70_000, dtype=torch.bool)
    other = CSRMask.from_dense({"w": torch.tensor([[True, True, False], [False, True, True]]), "v": wide})
    expected = torch.stack([compact[0], compact.new_zeros(()), compact[3], compact[4]])
    strided = torch.stack([compact, compact], 1)[:, 0]
    given = strided.requires_grad_(compact.is_floating_point() or compact.is_complex())
    found = one.project(given, other)
    assert (found.dtype, found.requires_grad) == (compact.dtype, False)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    empty = CSRMask.from_dense({"w": torch.zeros(2, 3, dtype=torch.bool)})
    assert not empty.project(compact[:0], other).any()
    assert empty.project(compact[:0], empty).shape == one.project(given, empty).shape == (0,)


def test_mixed_dtypes_and_non_contiguous_tensors():
    mask = CSRMask.from_dense({"a": torch.eye(3, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)})
    base = torch.arange(9.0).view(3, 3)
    tensors = {"a": base.t(), "b": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}
    compact = mask.gather(tensors)
    assert compact.dtype == torch.float32
    assert compact.tolist() == [0, 4, 8, 1, 2]
    mask.add_(tensors, torch.ones(5))
    assert base.tolist() == [[1, 1, 2], [3, 5, 5], [6, 7, 9]]  # written through the transposed view
    assert tensors["b"].tolist() == [2, 3]


def test_writes_into_leaf_parameters_and_bumps_their_version():
    parameter = torch.nn.Parameter(torch.zeros(3))
    mask = CSRMask.from_dense({"p": torch.tensor([True, False, True])})
    version = parameter._version
    mask.add_({"p": parameter}, torch.ones(2))
    assert parameter.tolist() == [1, 0, 1]
    assert parameter._version > version


def test_sub_masks_split_and_csr():
    dense = random_dense([(3, 4), (5,), (2, 3, 4)], 3)
    mask = CSRMask.from_dense(dense)
    values = torch.arange(float(mask.nnz))
    parts = mask.split(values)
    assert list(parts) == list(mask.names)
    for name in mask.names:
        assert mask[name] == CSRMask.from_dense({name: dense[name]})
        assert parts[name].data_ptr() == values.data_ptr() + 4 * int(parts[name][0]) if len(parts[name]) else True
        matrix = mask.sparse_csr(name, values).to_dense()
        expected = torch.zeros(matrix.shape).masked_scatter_(dense[name].reshape(matrix.shape), parts[name])
        assert torch.equal(matrix, expected)
    assert mask.restrict(mask.names[1:]) == CSRMask.from_dense({n: dense[n] for n in mask.names[1:]})


def test_save_load_fingerprint_copy(tmp_path):
    mask = CSRMask.from_dense(random_dense([(3, 4), (70_000,)], 5))
    mask.save(tmp_path / "mask.safetensors")
    again = CSRMask.load(tmp_path / "mask.safetensors")
    assert (again, hash(again), again.fingerprint()) == (mask, hash(mask), mask.fingerprint())
    assert (mask - mask).fingerprint() != mask.fingerprint()
    assert copy.deepcopy(mask) == mask
    assert [p.name for p in tmp_path.iterdir()] == ["mask.safetensors"]
    with pytest.raises(AttributeError, match="immutable"):
        mask.names = ()


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mask.safetensors"
    mask = CSRMask.from_dense({"a": torch.ones(3, dtype=torch.bool)})
    mask.save(path)
    before = path.read_bytes()

    def fail(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("deftx_kernels.files.save_file", fail)
    with pytest.raises(OSError, match="mask.safetensors cannot be written: disk full"):
        (mask - mask).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_loading_another_file_raises(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        CSRMask.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="x.safetensors is not a readable CSRMask file"):
        CSRMask.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="metadata lacks format"):
        CSRMask.load(path)
    good = CSRMask.from_dense({"a": torch.ones(2, 3, dtype=torch.bool)})
    other = CSRMask.from_dense({"a": torch.tensor([[True, True, False], [True, True, True]])})
    outside = good.col_indices.clone()
    outside[2] = 9
    metadata = {"format": "deftx_csr_mask", "layout": json.dumps({"names": ["a"], "shapes": [[2, 3]]})}
    for crow, col, fingerprint, message in (
        (good.crow_indices, outside, {}, "'a' has 3 columns"),
        (other.crow_indices, other.col_indices, {}, "written by an older version"),
        # a valid mask, and not the one that was saved
        (other.crow_indices, other.col_indices, {"fingerprint": good.fingerprint()}, "checksum"),
    ):
        save_file({"crow_indices": crow, "col_indices": col}, path, metadata=metadata | fingerprint)
        with pytest.raises(ValueError, match=message):
            CSRMask.load(path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"names": [1], "shapes": [[2, 3]]}, "names must be strings, got 1"),
        ({"names": "a", "shapes": [[2, 3]]}, "names must be a sequence"),
        ({"names": ["a"], "shapes": {"a": 1}}, "shapes must be a sequence"),
        ({"names": ["a"], "shapes": [[-2, -3]]}, "negative size"),
        ({"names": ["a"], "shapes": [[True, 3]]}, "shape of ints"),
        ({"names": ["a"], "shapes": [["2", 3]]}, "shape of ints"),
        ({"names": ["a"], "shapes": [[2.0, 3]]}, "shape of ints"),
        ({"names": ["a"], "shapes": [5]}, "shape of ints"),
        ({"names": ["a"], "shapes": [[10**30, 0]]}, r"2\*\*63"),
        ({"names": ["a"], "shapes": [[10**30, 3]]}, r"2\*\*63"),
        ({"names": ["a"]}, "KeyError: 'shapes'"),
        (["a"], "TypeError"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_layouts_that_no_mask_has(tmp_path, layout, message):
    good = CSRMask.from_dense({"a": torch.ones(2, 3, dtype=torch.bool)})
    text = layout if isinstance(layout, str) else json.dumps(layout)
    path = tmp_path / "mask.safetensors"
    metadata = {"format": "deftx_csr_mask", "layout": text, "fingerprint": good.fingerprint()}
    save_file({"crow_indices": good.crow_indices, "col_indices": good.col_indices}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"mask.safetensors is not a readable CSRMask file: .*{message}"):
        CSRMask.load(path)


@pytest.mark.parametrize(
    ("crow", "col", "message"),
    [
        ([0, 2, 1], [0, 1], "rise from 0"),
        ([0, 1, 3], [0, 1], "rise from 0"),
        ([0, 1], [0], r"int64 \[3\]"),
        ([0, 2, 2], [1, 0], "strictly ascending"),
        ([0, 2, 2], [1, 1], "strictly ascending"),
        ([0, 1, 2], [0, 3], "outside"),
        ([0, 2**63 - 1, 2], [0, 1], "rise from 0"),
    ],
)
def test_construction_is_validated(crow, col, message):
    with pytest.raises(ValueError, match=message):
        CSRMask(["a"], [(2, 3)], torch.tensor(crow), torch.tensor(col).to(torch.uint16))


BOTH = CSRMask.from_dense({"a": torch.ones(2, 2, dtype=torch.bool), "b": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, b: BOTH.gather({"a": a}), ValueError, "lacks tensor 'b'"),
        (
            lambda a, b: BOTH.scatter_({"a": a, "b": torch.zeros(4)}, torch.ones(7)),
            ValueError,
            r"s\['b'\] has shape \[4\]",
        ),
        (
            lambda a, b: BOTH.add_({"a": a, "b": b}, torch.ones(6)),
            ValueError,
            r"compact must be compact, \[nnz\] = \[7\]",
        ),
        (lambda a, b: BOTH.gather({"a": a, "b": [1, 2, 3]}), TypeError, r"tensors\['b'\] must be a torch.Tensor"),
        (lambda a, b: BOTH.add_({"a": a, "b": b.int()}, torch.ones(7)), TypeError, r"tensors\['b'\] must be float32"),
        (lambda a, b: BOTH.gather([a, b]), TypeError, "must be a mapping"),
        (lambda a, b: CSRMask.from_dense({"a": a}), TypeError, r"dense\['a'\] must be a bool tensor"),
        (lambda a, b: CSRMask.from_dense({}), ValueError, "at least one tensor"),
        (
            lambda a, b: CSRMask.from_dense({"a": a > 0, "b": (b > 0).to("meta")}),
            ValueError,
            r"dense\['b'\] is on meta",
        ),
        (lambda a, b: BOTH["c"], KeyError, "no tensor 'c'"),
        (lambda a, b: BOTH.gather({"a": a, "b": b.to("meta")}), ValueError, "on meta"),
        (lambda a, b: BOTH | BOTH.to("meta"), ValueError, "the other mask is on meta, the mask on cpu"),
    ],
)
def test_bad_arguments_name_the_tensor_and_change_nothing(call, error, message):
    good = torch.zeros(2, 2), torch.zeros(3)
    with pytest.raises(error, match=message):
        call(*good)
    assert not any(t.any() for t in good)
