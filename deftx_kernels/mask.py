"""CSRMask: which entries of a set of named tensors are trained."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from deftx_kernels.files import parse_json, reading, write_tensors
from deftx_kernels.ops.schemas import OPERATIONS, column_dtype, rows_and_columns
from deftx_kernels.validation import FLOATS, are_plain, check_floats, check_plain, check_readable, check_writable

FORMAT = "deftx_csr_mask"


class CSRMask:
    """An immutable set of entries of named tensors, as one CSR matrix.

    The tensors stand one above the other, ordered by name (lexicographically, whatever the order of the mapping they
    came in). An N-D tensor is the matrix (shape[0], prod(shape[1:])), a tensor of fewer than two dimensions one row. A
    *compact* tensor is 1-D [nnz]: one value per entry, in this order.

    Args:
        names: the tensors' names, ascending.
        shapes: their shapes.
        crow_indices: int64 [rows + 1], where each row's entries begin.
        col_indices: uint16 (where every tensor has at most 65,536 columns) or int32 [nnz], ascending within each row.

    Raises:
        ValueError, TypeError: the arguments do not describe such a set.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        crow_indices: Tensor,  # int64 [rows + 1]
        col_indices: Tensor,  # [nnz]
    ) -> None:
        self.check_layout(names, shapes)
        for argument, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            check_plain(tensor, argument)
            check_readable(tensor, argument)
        self._set(names, shapes, crow_indices, col_indices)
        self._check_entries()

    @classmethod
    def _trusted(cls, names, shapes, crow_indices: Tensor, col_indices: Tensor) -> "CSRMask":
        """The constructor for indices that our own kernels made: no check, so no host synchronisation."""
        mask = cls.__new__(cls)
        mask._set(names, shapes, crow_indices, col_indices.to(column_dtype(shapes)))
        return mask

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    crow_indices: Tensor
    col_indices: Tensor

    def _set(self, names, shapes, crow_indices: Tensor, col_indices: Tensor) -> None:
        self.__dict__.update(
            names=tuple(names),
            shapes=tuple(torch.Size(s) for s in shapes),
            crow_indices=usable_in_backward(crow_indices),
            col_indices=usable_in_backward(col_indices),
        )

    def __reduce__(self):  # torch cannot unpickle a uint16 tensor
        return _unpickled, (self.names, self.shapes, self.crow_indices, _signed(self.col_indices))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a CSRMask is immutable: {name} cannot be set")

    @staticmethod
    def check_layout(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
        """ValueError or TypeError unless tensors of these names and shapes can stand in one mask."""
        for argument, given in (("names", names), ("shapes", shapes)):
            if not isinstance(given, Sequence) or isinstance(given, str):
                raise TypeError(f"{argument} must be a sequence, got {type(given).__name__}")
        if not names:
            raise ValueError("names: a CSRMask needs at least one tensor")
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"names must be strings, got {name!r}")
        if len(names) != len(shapes):
            raise ValueError(f"names and shapes differ in length: {len(names)} and {len(shapes)}")
        for before, after in zip(names, names[1:]):
            if before >= after:
                raise ValueError(f"names must be unique and ascending, got {before!r} before {after!r}")
        for name, shape in zip(names, shapes):
            if not isinstance(shape, Sequence) or any(
                isinstance(n, bool) or not hasattr(n, "__index__") for n in shape
            ):
                raise TypeError(f"tensor {name!r} must have a shape of ints, got {shape!r}")
            if any(n < 0 for n in shape):
                raise ValueError(f"tensor {name!r} of shape {tuple(shape)} has a negative size")
            if rows_and_columns(shape)[1] > torch.iinfo(torch.int32).max:
                raise ValueError(f"tensor {name!r} of shape {tuple(shape)} has more than 2**31 - 1 columns")
        if sum(math.prod(max(1, n) for n in shape) for shape in shapes) > torch.iinfo(torch.int64).max:
            raise ValueError("shapes: the tensors have more than 2**63 - 1 elements")

    def _check_entries(self) -> None:
        crow, col = self.crow_indices, self.col_indices
        if crow.dtype != torch.int64 or crow.shape != (self.row_offsets[-1] + 1,):
            raise ValueError(
                f"crow_indices must be int64 [{self.row_offsets[-1] + 1}] (the rows of all tensors + 1), "
                f"got {crow.dtype} {list(crow.shape)}"
            )
        if col.dtype != column_dtype(self.shapes) or col.dim() != 1:
            raise ValueError(
                f"col_indices must be {column_dtype(self.shapes)} [nnz], got {col.dtype} {list(col.shape)}"
            )
        if crow.device != col.device:
            raise ValueError(f"crow_indices is on {crow.device} but col_indices on {col.device}")
        outside = (crow < 0) | (crow > col.numel())  # differences of such numbers could overflow to what looks right
        if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool(outside.any()) or bool((crow.diff() < 0).any()):
            raise ValueError(f"crow_indices must rise from 0 to nnz = {col.numel()}")
        for name, shape, start, end in zip(self.names, self.shapes, self._bounds, self._bounds[1:]):
            wide = col[start:end].to(torch.int64)
            columns = rows_and_columns(shape)[1]
            if bool(((wide < 0) | (wide >= columns)).any()):
                raise ValueError(
                    f"col_indices: tensor {name!r} has {columns} columns, got a column outside [0, {columns})"
                )
        key = self._keys()
        if bool((key.diff() <= 0).any()):
            raise ValueError("col_indices must be strictly ascending within each row (sorted, without duplicates)")

    # ---- layout ----

    @cached_property
    def places(self) -> dict[str, int]:
        """Name → its place in `names`."""
        return dict(zip(self.names, range(len(self.names))))

    @cached_property
    def row_offsets(self) -> tuple[int, ...]:
        """[len(names) + 1]: the first row of each tensor, and the number of rows."""
        return tuple(accumulate((rows_and_columns(s)[0] for s in self.shapes), initial=0))

    @cached_property
    def _bounds(self) -> list[int]:
        """[len(names) + 1]: where each tensor's entries begin in a compact tensor (one host synchronisation, once)."""
        return self.crow_indices[list(self.row_offsets)].tolist()

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.col_indices.numel()

    @cached_property
    def numel(self) -> int:
        """Number of elements of all tensors."""
        return sum(s.numel() for s in self.shapes)

    @property
    def density(self) -> float:
        """nnz / numel (0 for tensors without elements)."""
        return self.nnz / self.numel if self.numel else 0.0

    @property
    def device(self) -> torch.device:
        return self.crow_indices.device

    def summary(self) -> dict[str, dict[str, Any]]:
        """Name → shape, numel, nnz and density of each tensor."""
        rows = {}
        for name, shape, start, end in zip(self.names, self.shapes, self._bounds, self._bounds[1:]):
            nnz, numel = end - start, shape.numel()
            rows[name] = {"shape": tuple(shape), "numel": numel, "nnz": nnz, "density": nnz / numel if numel else 0.0}
        return rows

    def __repr__(self) -> str:
        share = f"nnz={self.nnz:,} of {self.numel:,}, density={self.density:.4%}"
        return f"CSRMask({len(self.names)} tensors, {share}, device={self.device})"

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __len__(self) -> int:
        return len(self.names)

    # ---- dense tensors and compact ones ----

    @classmethod
    def from_dense(cls, dense: Mapping[str, Tensor]) -> "CSRMask":
        """The mask of the True entries of boolean tensors of any shape, all on one device."""
        _check_mapping(dense, "dense")
        names = sorted(dense)
        for name in names:
            check_plain(dense[name], f"dense[{name!r}]")
        shapes = [dense[n].shape for n in names]
        cls.check_layout(names, shapes)
        device = dense[names[0]].device
        for name in names:
            tensor = dense[name]
            if tensor.dtype != torch.bool:
                raise TypeError(f"dense[{name!r}] must be a bool tensor, got {tensor.dtype}")
            if tensor.device != device:
                raise ValueError(
                    f"dense[{name!r}] is on {tensor.device}, dense[{names[0]!r}] on {device}: one device is needed"
                )
            check_readable(tensor, f"dense[{name!r}]")
        return cls._trusted(names, shapes, *torch.ops.deftx.dense_to_csr([dense[n].contiguous() for n in names]))

    def to_dense(self) -> dict[str, Tensor]:
        """Name → bool tensor, True at the entries."""
        dense = {n: torch.zeros(s, dtype=torch.bool, device=self.device) for n, s in zip(self.names, self.shapes)}
        return self.scatter_(dense, torch.ones(self.nnz, dtype=torch.bool, device=self.device))

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The entries of the tensors as one compact tensor [nnz], of their common dtype (promoted where they differ)."""
        chosen = [t.detach().contiguous() for t in self.select(tensors, "tensors")]
        if len({t.dtype for t in chosen}) == 1:
            return torch.ops.deftx.csr_gather(chosen, self.crow_indices, self.col_indices)
        parts = [_one(self[n], "csr_gather", t) for n, t in zip(self.names, chosen)]
        dtype = parts[0].dtype
        for part in parts:
            dtype = torch.promote_types(dtype, part.dtype)
        return torch.cat([p.to(dtype) for p in parts])

    def square_sum(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the squares of the tensors' entries: float64 [], the same for any number of threads; no entry is
        copied.
        """
        chosen = [t.detach().contiguous() for t in self.select(tensors, "tensors")]
        if len(check_floats(chosen, self.names, "tensors")) == 1:
            return torch.ops.deftx.csr_square_sum(chosen, self.crow_indices, self.col_indices)
        return torch.stack([_one(self[n], "csr_square_sum", t) for n, t in zip(self.names, chosen)]).sum()

    def scatter_(self, tensors: Mapping[str, Tensor], compact: Tensor) -> dict[str, Tensor]:
        """Overwrite the entries of the tensors with the compact values (cast to each tensor's dtype). Returns the
        tensors.
        """
        return self._write("csr_scatter_", tensors, compact)

    def add_(self, tensors: Mapping[str, Tensor], compact: Tensor, alpha: float = 1) -> dict[str, Tensor]:
        """Add alpha times the compact values to the entries, in float32 or better, rounded once. Returns the tensors."""
        for name, tensor in zip(self.names, self.select(tensors, "tensors")):
            if tensor.dtype not in FLOATS:
                raise TypeError(
                    f"tensors[{name!r}] must be floating point: float32, float64, float16 or bfloat16, got {tensor.dtype}"
                )
        return self._write("csr_add_", tensors, compact, float(alpha))

    def _write(self, op: str, tensors: Mapping[str, Tensor], compact: Tensor, *alpha: float) -> dict[str, Tensor]:
        targets = self.select(tensors, "tensors")
        self.check_compact(compact, "compact")
        chosen = [t.detach() for t in targets]
        dense = [t.contiguous() for t in chosen]  # a copy only where the tensor is not contiguous
        labels = [f"tensors[{name!r}]" for name in self.names]
        if len({t.dtype for t in dense}) > 1 or any(copy is not t for t, copy in zip(chosen, dense)):
            check_writable(dict(zip(labels, targets)))
        if len({t.dtype for t in dense}) == 1:
            values = _values_for(op, compact, dense[0].dtype)
            try:
                getattr(torch.ops.deftx, op)(dense, self.crow_indices, self.col_indices, values, *alpha)
            except (RuntimeError, ValueError):
                check_writable(dict(zip(labels, targets)))  # names what shares memory
                raise
        else:
            for name, tensor, part in zip(self.names, dense, self.split(compact).values()):
                _one(self[name], op, tensor, _values_for(op, part, tensor.dtype), *alpha)
        for tensor, copy in zip(chosen, dense):
            if copy is not tensor:
                tensor.copy_(copy)
        torch.autograd.graph.increment_version(targets)
        return {n: tensors[n] for n in self.names}

    def split(self, compact: Tensor) -> dict[str, Tensor]:
        """Name → the view of a compact tensor that holds this tensor's entries."""
        self.check_compact(compact, "compact")
        return {n: compact[s:e] for n, s, e in zip(self.names, self._bounds, self._bounds[1:])}

    def part(self, name: str, compact: Tensor) -> Tensor:
        """The view of a compact tensor that holds one tensor's entries."""
        self.check_compact(compact, "compact")
        i = self._place(name)
        return compact[self._bounds[i] : self._bounds[i + 1]]

    def _place(self, name: str) -> int:
        if name not in self.places:
            raise KeyError(f"the mask has no tensor {name!r}")
        return self.places[name]

    def sparse_csr(self, name: str, compact: Tensor) -> Tensor:
        """One tensor's entries with their values (from `compact` [nnz] of the whole mask) as a torch sparse CSR matrix."""
        one, values = self[name], self.part(name, compact)
        return torch.sparse_csr_tensor(
            one.crow_indices,
            one.col_indices.to(torch.int64),
            values,
            size=rows_and_columns(one.shapes[0]),
            device=self.device,
            check_invariants=False,
        )

    def select(self, tensors: Mapping[str, Tensor], argument: str) -> list[Tensor]:
        """The mask's tensors out of a mapping, checked: present, of the right shape, on the mask's device."""
        _check_mapping(tensors, argument)
        chosen: list[Any] = [tensors.get(name) for name in self.names]
        if not are_plain(chosen):
            for name, tensor in zip(self.names, chosen):
                if tensor is None:
                    raise ValueError(f"{argument} lacks tensor {name!r}, which the mask covers")
                check_plain(tensor, f"{argument}[{name!r}]")
        device = self.device
        for name, shape, tensor in zip(self.names, self.shapes, chosen):
            if tensor.shape != shape or tensor.device != device:
                self._refuse(name, tensor, argument)
        return chosen

    def _refuse(self, name: str, tensor: Tensor, argument: str) -> NoReturn:
        """Says what is wrong with the tensor."""
        shape = self.shapes[self.places[name]]
        if tensor.shape != shape:
            raise ValueError(
                f"{argument}[{name!r}] has shape {list(tensor.shape)}, the mask was made for {list(shape)}"
            )
        raise ValueError(f"{argument}[{name!r}] is on {tensor.device}, the mask on {self.device}: move one with .to()")

    def check_compact(self, compact: Tensor, argument: str) -> None:
        """ValueError or TypeError unless this is a tensor [nnz] on the mask's device."""
        check_plain(compact, argument)
        if compact.shape != (self.nnz,):
            raise ValueError(f"{argument} must be compact, [nnz] = [{self.nnz}], got shape {list(compact.shape)}")
        if compact.device != self.device:
            raise ValueError(f"{argument} is on {compact.device}, the mask on {self.device}: move one with .to()")

    # ---- sub-masks and set operations ----

    def __getitem__(self, name: str) -> "CSRMask":
        """The mask of one tensor."""
        i = self._place(name)
        first, last = self.row_offsets[i], self.row_offsets[i + 1]
        start, end = self._bounds[i], self._bounds[i + 1]
        crow = self.crow_indices[first : last + 1] - start
        return CSRMask._trusted((name,), (self.shapes[i],), crow, self.col_indices[start:end])

    def restrict(self, names: Sequence[str]) -> "CSRMask":
        """The mask of some of the tensors; in the given names, order does not matter."""
        parts = [self[n] for n in sorted(names)]
        counts = [p.crow_indices.diff() for p in parts]
        shapes = [p.shapes[0] for p in parts]
        cols = [p.col_indices.to(torch.int32) for p in parts]
        if not parts:
            raise ValueError("names: a CSRMask needs at least one tensor")
        return CSRMask._trusted(sorted(names), shapes, _crow(counts), torch.cat(cols))

    def _keys(self, layout: Mapping[str, int] | None = None) -> Tensor:
        """int64 [nnz]: each entry's flat position when tensor `name` begins at layout[name] (by default: one after the
        other).
        """
        if layout is None:
            layout = dict(zip(self.names, accumulate((s.numel() for s in self.shapes), initial=0)))
        rows, columns = zip(*(rows_and_columns(s) for s in self.shapes))
        row_start = torch.cat(
            [
                torch.arange(r, dtype=torch.int64, device="cpu") * c + layout[n]
                for n, r, c in zip(self.names, rows, columns)
            ]
        ).to(self.device)
        return torch.repeat_interleave(row_start, self.crow_indices.diff()) + self.col_indices.to(torch.int64)

    def _combine(self, other: "CSRMask", operation: str) -> "CSRMask":
        if not isinstance(other, CSRMask):
            return NotImplemented
        if self.device != other.device:
            raise ValueError(f"masks are on {self.device} and {other.device}: move one with .to()")
        names = list(self._common_layout(other))
        shapes = dict(zip(other.names, other.shapes)) | dict(zip(self.names, self.shapes))
        mine, theirs = self._crow_of(names, shapes), other._crow_of(names, shapes)
        col, other_col = self.col_indices, other.col_indices
        if col.dtype != other_col.dtype:
            col, other_col = col.to(torch.int32), other_col.to(torch.int32)
        crow, col = torch.ops.deftx.csr_combine(mine, col, theirs, other_col, OPERATIONS[operation])
        return CSRMask._trusted(names, [shapes[n] for n in names], crow, col)

    def _crow_of(self, names: Sequence[str], shapes: Mapping[str, torch.Size]) -> Tensor:
        """crow_indices over the rows of more tensors, ascending by name; those that the mask does not cover are empty."""
        if len(names) == len(self.names):
            return self.crow_indices
        parts = [self.crow_indices[:1]]
        for name in names:
            if name in self.places:
                first, last = self.row_offsets[self.places[name]], self.row_offsets[self.places[name] + 1]
                parts.append(self.crow_indices[first + 1 : last + 1])
            else:
                parts.append(parts[-1][-1:].expand(rows_and_columns(shapes[name])[0]))
        return torch.cat(parts)

    @classmethod
    def _from_keys(cls, names: Sequence[str], shapes: Sequence[torch.Size], keys: Tensor) -> "CSRMask":
        """From ascending int64 flat positions, the tensors standing one after the other (see `_keys`)."""
        offsets = list(accumulate((s.numel() for s in shapes), initial=0))
        bounds = torch.searchsorted(keys, torch.tensor(offsets, device=keys.device)).tolist()
        counts, columns_found = [], []
        for shape, offset, start, end in zip(shapes, offsets, bounds, bounds[1:]):
            rows, columns = rows_and_columns(shape)
            index = keys[start:end] - offset
            row = index // max(columns, 1)
            counts.append(torch.bincount(row, minlength=rows))
            columns_found.append((index - row * columns).to(torch.int32))
        return cls._trusted(names, shapes, _crow(counts), torch.cat(columns_found))

    def project(self, compact: Tensor, other: "CSRMask") -> Tensor:
        """A compact tensor of this mask as one of another mask [other.nnz]: entries that only the other has are 0."""
        self.check_compact(compact, "compact")
        if self.device != other.device:
            raise ValueError(f"masks are on {self.device} and {other.device}: move one with .to()")
        layout = self._common_layout(other)
        mine, theirs = self._keys(layout), other._keys(layout)
        out = compact.new_zeros(other.nnz)
        place = torch.searchsorted(theirs, mine)
        found = place < len(theirs)
        found[found.clone()] = theirs[place[found]] == mine[found]
        out[place[found]] = compact.detach()[found]
        return out

    def _common_layout(self, other: "CSRMask") -> dict[str, int]:
        """Name → flat offset of the tensors of both masks, one after the other by name."""
        shapes = dict(zip(self.names, self.shapes))
        for name, shape in zip(other.names, other.shapes):
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"tensor {name!r} has shape {list(shapes[name])} in one mask and {list(shape)} in the other"
                )
        names = sorted(shapes)
        return dict(zip(names, accumulate((shapes[n].numel() for n in names), initial=0)))

    def __and__(self, other: "CSRMask") -> "CSRMask":
        """Entries of both. A mask has no entries in a tensor that it does not cover; the result covers the tensors of
        both.
        """
        return self._combine(other, "and")

    def __or__(self, other: "CSRMask") -> "CSRMask":
        """Entries of either."""
        return self._combine(other, "or")

    def __sub__(self, other: "CSRMask") -> "CSRMask":
        """Entries of this mask that are not in the other."""
        return self._combine(other, "sub")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CSRMask):
            return NotImplemented
        return (
            (self.names, self.shapes, self.nnz) == (other.names, other.shapes, other.nnz)
            and torch.equal(self.crow_indices, other.crow_indices.to(self.device))
            and torch.equal(_signed(self.col_indices), _signed(other.col_indices.to(self.device)))
        )

    def __hash__(self) -> int:
        return hash((self.names, self.shapes, self.nnz))

    # ---- devices and files ----

    def to(self, device: torch.device | str | int) -> "CSRMask":
        """This mask on a device (itself where it is there already)."""
        crow, col = self.crow_indices.to(device), self.col_indices.to(device)
        return self if crow is self.crow_indices else CSRMask._trusted(self.names, self.shapes, crow, col)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, shapes and entries; equal masks have equal fingerprints on every device."""
        digest = hashlib.sha256(self._layout_json().encode())
        for tensor in (self.crow_indices, _signed(self.col_indices)):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _layout_json(self) -> str:
        return json.dumps({"names": self.names, "shapes": [list(s) for s in self.shapes]})

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, with its checksum (atomically: a crash leaves the old file or the new one).

        Raises:
            OSError: it cannot be written; the message names the file.
        """
        tensors = {
            "crow_indices": self.crow_indices.cpu().contiguous(),
            "col_indices": self.col_indices.cpu().contiguous(),
        }
        write_tensors(
            path, tensors, {"format": FORMAT, "layout": self._layout_json(), "fingerprint": self.fingerprint()}
        )

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> "CSRMask":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not such a mask, or is damaged; the message names the file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no mask file at {path}")
        with reading(path, "CSRMask file"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its metadata lacks format = {FORMAT}")
            layout = parse_json(metadata["layout"])
            mask = cls(
                layout["names"], layout["shapes"], file.get_tensor("crow_indices"), file.get_tensor("col_indices")
            )
            if "fingerprint" not in metadata:
                raise ValueError(
                    "it was written by an older version of deftx-kernels, without a checksum: make the mask again"
                )
            if mask.fingerprint() != metadata["fingerprint"]:
                raise ValueError("its content does not have the checksum that it was saved with")
        return mask.to(device)


def usable_in_backward(tensor: Tensor) -> Tensor:
    """The tensor itself; one that was made in inference_mode, which autograd refuses, is copied."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _check_mapping(tensors: object, argument: str) -> None:
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{argument} must be a mapping of names to tensors, got {type(tensors).__name__}")


def _crow(counts: list[Tensor]) -> Tensor:
    """int64 [rows + 1] from the entries per row of each tensor."""
    crow = torch.zeros(sum(len(c) for c in counts) + 1, dtype=torch.int64, device=counts[0].device)
    torch.cumsum(torch.cat(counts), 0, out=crow[1:])
    return crow


def _signed(col_indices: Tensor) -> Tensor:
    """The same bits in a dtype that every torch operation knows."""
    return col_indices.view(torch.int16) if col_indices.dtype == torch.uint16 else col_indices


def _unpickled(names, shapes, crow_indices: Tensor, signed: Tensor) -> CSRMask:
    return CSRMask._trusted(
        names, shapes, crow_indices, signed.view(torch.uint16) if signed.dtype == torch.int16 else signed
    )


def _one(mask: CSRMask, op: str, tensor: Tensor, *arguments):
    return getattr(torch.ops.deftx, op)([tensor], mask.crow_indices, mask.col_indices, *arguments)


def _values_for(op: str, compact: Tensor, dtype: torch.dtype) -> Tensor:
    """Compact values as the op takes them: csr_add_ takes float32 beside 16-bit tensors, csr_scatter_ the tensors'
    dtype.
    """
    compact = compact.detach().contiguous()
    if op == "csr_add_" and dtype != torch.float64:
        return compact if compact.dtype == dtype else compact.to(torch.float32)
    return compact.to(dtype)
