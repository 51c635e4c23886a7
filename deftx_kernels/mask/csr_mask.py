"""CSRMask: which entries of a set of named tensors are trained."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deftx_kernels import validation
from deftx_kernels.files import parse_json, reading, write_tensors
from deftx_kernels.kernels.tensors import FLOATS, row_starts_of, signed
from deftx_kernels.ops.schemas import ELECTIONS, OPERATIONS, column_dtype, compute_dtype, rows_and_columns

FORMAT = "deftx_csr_mask"


class CSRMask:
    """An immutable set of entries of named tensors, as one CSR matrix.

    The tensors are stacked row-wise, in ascending order of their names. An N-D tensor is the matrix
    (shape[0], prod(shape[1:])), a tensor of fewer than two dimensions one row. A *compact* tensor is 1-D [nnz]: one
    value per entry, in this order.

    Args:
        names: the tensors' names, ascending; none for a delta that has only whole tensors.
        shapes: their shapes.
        crow_indices: int64 [rows + 1], where each row's entries begin.
        col_indices: uint16 (where every tensor has at most 65,536 columns) or int32 [nnz], ascending within each row.

    Raises:
        ValueError, TypeError: the arguments do not describe such a set.

    Example:
        >>> mask = CSRMask.from_dense({"w": torch.tensor([[True, False], [False, True]])})
        >>> mask.crow_indices.tolist(), mask.col_indices.tolist()
        ([0, 1, 2], [0, 1])
        >>> mask.gather({"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
        tensor([1., 4.])
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[Sequence[int]],
        crow_indices: Tensor,  # int64 [rows + 1]
        col_indices: Tensor,  # [nnz]
    ) -> None:
        validation.check_mask_layout(names, shapes)
        for argument, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
            validation.check_plain(tensor, argument)
            validation.check_readable(tensor, argument)
        self._set(names, shapes, crow_indices, col_indices)
        self._check_entries()

    @classmethod
    def unchecked(
        cls, names: Sequence[str], shapes: Sequence[Sequence[int]], crow_indices: Tensor, col_indices: Tensor
    ) -> "CSRMask":
        """The constructor without its checks and host synchronisation: for valid indices, of any integer dtype."""
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
            crow_indices=validation.usable_in_backward(crow_indices),
            col_indices=validation.usable_in_backward(col_indices),
        )

    def __reduce__(self):  # torch cannot unpickle uint16 tensors
        return CSRMask.unchecked, (self.names, self.shapes, self.crow_indices, signed(self.col_indices))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a CSRMask is immutable: {name} cannot be set")

    def _check_entries(self) -> None:
        crow, col, rows = self.crow_indices, self.col_indices, self.row_offsets[-1]
        if crow.dtype != torch.int64 or crow.shape != (rows + 1,):
            found = f"{crow.dtype} {list(crow.shape)}"
            raise ValueError(f"crow_indices must be int64 [{rows + 1}] (the rows of all tensors + 1), got {found}")
        if col.dtype != (wanted := column_dtype(self.shapes)) or col.dim() != 1:
            raise ValueError(f"col_indices must be {wanted} [nnz], got {col.dtype} {list(col.shape)}")
        if crow.device != col.device:
            raise ValueError(f"crow_indices is on {crow.device} but col_indices on {col.device}")
        outside = (crow < 0) | (crow > col.numel())  # differences of such numbers could overflow
        if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool(outside.any()) or bool((crow.diff() < 0).any()):
            raise ValueError(f"crow_indices must rise from 0 to nnz = {col.numel()}")
        self._check_columns()

    def _check_columns(self) -> None:
        """ValueError unless the columns ascend within each row, whose last one is its largest, and are in range."""
        crow, col = self.crow_indices, signed(self.col_indices)
        ordered = col ^ -(1 << 15) if col.dtype == torch.int16 else col  # the order of uint16 in int16
        ascends = ordered[1:] > ordered[:-1]
        filled = (crow[1:] > crow[:-1]).nonzero().view(-1)  # rows with entries
        firsts, lasts = crow[filled], crow[filled + 1] - 1
        ascends[firsts[1:] - 1] = True
        columns = [rows_and_columns(s)[1] for s in self.shapes]
        widths, offsets = (torch.tensor(x, dtype=torch.int64, device=crow.device) for x in (columns, self.row_offsets))
        limits = torch.repeat_interleave(widths, offsets.diff())[filled]
        bits = 0xFFFF if col.dtype == torch.int16 else -1
        first, last = (col[at].to(torch.int64) & bits for at in (firsts, lasts))
        if bool((outside := (first < 0) | (last >= limits)).any()):
            i = bisect_right(self.row_offsets, int(filled[outside][0])) - 1
            has = f"tensor {self.names[i]!r} has {columns[i]} columns"
            raise ValueError(f"col_indices: {has}, got a column outside [0, {columns[i]})")
        if not bool(ascends.all()):
            raise ValueError("col_indices must be strictly ascending within each row (sorted, without duplicates)")

    @cached_property
    def positions(self) -> dict[str, int]:
        """Name → its index in `names`."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def row_offsets(self) -> tuple[int, ...]:
        """[len(names) + 1]: the first row of each tensor, and the number of rows."""
        return tuple(accumulate((rows_and_columns(s)[0] for s in self.shapes), initial=0))

    @cached_property
    def entry_offsets(self) -> list[int]:
        """[len(names) + 1]: the first entry of each tensor, and nnz (the first access waits for the device)."""
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
        return {
            name: {"shape": tuple(part.shapes[0]), "numel": part.numel, "nnz": part.nnz, "density": part.density}
            for name, part in ((n, self[n]) for n in self.names)
        }

    def __repr__(self) -> str:
        entries = f"nnz={self.nnz:,} of {self.numel:,}, density={self.density:.4%}"
        return f"CSRMask({len(self.names)} tensors, {entries}, device={self.device})"

    def __contains__(self, name: object) -> bool:
        return name in self.positions

    def __len__(self) -> int:
        return len(self.names)

    # ---- dense tensors and compact ones ----
    @classmethod
    def from_dense(cls, dense: Mapping[str, Tensor]) -> "CSRMask":
        """The mask of the True entries of boolean tensors of any shape, all on one device."""
        validation.check_mapping(dense, "dense")
        tensors = dict(sorted(dense.items()))
        for name, tensor in tensors.items():
            validation.check_plain(tensor, f"dense[{name!r}]")
            if tensor.dtype != torch.bool:
                raise TypeError(f"dense[{name!r}] must be a bool tensor, got {tensor.dtype}")
        if not tensors:
            raise ValueError("dense must hold at least one tensor")
        names, shapes = list(tensors), [t.shape for t in tensors.values()]
        validation.check_mask_layout(names, shapes)
        validation.check_devices(tensors, "dense")
        return cls.unchecked(names, shapes, *torch.ops.deftx.dense_to_csr([t.contiguous() for t in tensors.values()]))

    def to_dense(self) -> dict[str, Tensor]:
        """Name → bool tensor, True at the entries."""
        dense = {n: torch.zeros(s, dtype=torch.bool, device=self.device) for n, s in zip(self.names, self.shapes)}
        return self.scatter_(dense, torch.ones(self.nnz, dtype=torch.bool, device=self.device))

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The entries of the tensors as one compact tensor [nnz], of their promoted dtype."""
        parts = self._read("csr_gather", self.checked_tensors(tensors, "tensors"))
        dtype = reduce(torch.promote_types, (p.dtype for p in parts))
        return parts[0] if len(parts) == 1 else torch.cat([p.to(dtype) for p in parts])

    def square_sum(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The sum of the squares of the tensors' entries: float64 [], the same for any number of threads."""
        chosen = self.checked_tensors(tensors, "tensors")
        validation.check_floats(chosen, self.names, "tensors")
        parts = self._read("csr_square_sum", chosen)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def _read(self, op: str, tensors: list[Tensor]) -> list[Tensor]:
        """The op's result of all tensors, or of each one where their dtypes differ."""
        groups = self._of_one_dtype([t.detach().contiguous() for t in tensors])
        return [getattr(torch.ops.deftx, op)(same, mask.crow_indices, mask.col_indices) for mask, same in groups]

    def scatter_(self, tensors: Mapping[str, Tensor], compact: Tensor) -> dict[str, Tensor]:
        """Overwrite the tensors' entries with the compact values, cast to each tensor's dtype. Returns the tensors."""
        self._write("csr_scatter_", tensors, compact)
        return {n: tensors[n] for n in self.names}

    def add_(
        self,
        tensors: Mapping[str, Tensor],
        compact: Tensor,
        alpha: float = 1,
        *,
        former: Tensor | None = None,
        done: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Add alpha times the compact values, in float32 or better and rounded once. Returns the tensors.

        Args:
            former: [nnz], of the dtype of all tensors: receives the entries from before, in the same pass.
            done: bool [], set to True after `former` is filled: whether an interrupt came before or after.
        """
        self._write("csr_add_", tensors, compact, float(alpha), former, done)
        return {n: tensors[n] for n in self.names}

    def restore_(self, tensors: Mapping[str, Tensor], former: Tensor, compact: Tensor, alpha: float = 1) -> Tensor:
        """Undo an `add_` of these values, which has filled `former`. Returns int64 [tensors]: how many entries of each
        did not have the bits of the sum. The tensors have one dtype.
        """
        self.check_compact(compact, "compact")
        (changed,) = self._write("csr_restore_", tensors, former, compact.detach().contiguous(), float(alpha))
        return changed

    def _write(self, op: str, tensors: Mapping[str, Tensor], compact: Tensor, *rest: Any) -> list[Any]:
        """The op's result of all tensors, or of each one where their dtypes differ."""
        targets = self.checked_tensors(tensors, "tensors")
        if op != "csr_scatter_":
            validation.check_floats(targets, self.names, "tensors")
        self.check_compact(compact, "compact")
        detached = [t.detach() for t in targets]
        dense = [t.contiguous() for t in detached]
        labelled = {f"tensors[{name!r}]": t for name, t in zip(self.names, targets)}
        groups = self._of_one_dtype(dense)
        if len(groups) > 1 or any(copy is not t for t, copy in zip(detached, dense)):
            validation.check_writable(labelled)
        parts, results = compact.split([mask.nnz for mask, _ in groups]) if len(groups) > 1 else [compact], []
        try:
            for (mask, same), part in zip(groups, parts):
                dtype = same[0].dtype  # of values; csr_add_ takes the dtype to compute in, too
                if op == "csr_add_" and part.dtype != dtype:
                    dtype = part.dtype if part.dtype == torch.float64 else compute_dtype(dtype)
                values = part.detach().contiguous().to(dtype)
                results.append(getattr(torch.ops.deftx, op)(same, mask.crow_indices, mask.col_indices, values, *rest))
        except (RuntimeError, ValueError):
            validation.check_writable(labelled)  # names the tensors that share memory
            raise
        for tensor, copy in zip(detached, dense):
            if copy is not tensor:
                tensor.copy_(copy)
        torch.autograd.graph.increment_version(targets)
        return results

    def _of_one_dtype(self, tensors: list[Tensor]) -> list[tuple["CSRMask", list[Tensor]]]:
        """The operators take tensors of one dtype: all tensors with this mask, or each one with its own mask."""
        if len({t.dtype for t in tensors}) == 1:
            return [(self, tensors)]
        return [(self[n], [t]) for n, t in zip(self.names, tensors)]

    def split(self, compact: Tensor) -> dict[str, Tensor]:
        """Name → the view of a compact tensor that holds this tensor's entries."""
        self.check_compact(compact, "compact")
        offsets = self.entry_offsets
        return {n: compact[start:end] for n, start, end in zip(self.names, offsets, offsets[1:])}

    def part(self, name: str, compact: Tensor) -> Tensor:
        """The view of a compact tensor that holds one tensor's entries."""
        self.check_compact(compact, "compact")
        i = self._position(name)
        return compact[self.entry_offsets[i] : self.entry_offsets[i + 1]]

    def _position(self, name: str) -> int:
        if name not in self.positions:
            raise KeyError(f"the mask has no tensor {name!r}")
        return self.positions[name]

    def sparse_csr(self, name: str, compact: Tensor) -> Tensor:
        """One tensor's entries, with their values in `compact` [nnz], as a torch sparse CSR matrix."""
        one, values = self[name], self.part(name, compact)
        csr = (one.crow_indices, one.col_indices.to(torch.int64), values, rows_and_columns(one.shapes[0]))
        return torch.sparse_csr_tensor(*csr, device=self.device, check_invariants=False)

    def checked_tensors(self, tensors: Mapping[str, Tensor], argument: str) -> list[Tensor]:
        """The mask's tensors from a mapping, in order; an error where one is missing or has another shape or device."""
        validation.check_mapping(tensors, argument)
        chosen: list[Any] = [tensors.get(name) for name in self.names]
        if not validation.are_plain(chosen):
            for name, tensor in zip(self.names, chosen):
                if tensor is None:
                    raise ValueError(f"{argument} lacks tensor {name!r}, which the mask covers")
                validation.check_plain(tensor, f"{argument}[{name!r}]")
        device = self.device
        for name, shape, tensor in zip(self.names, self.shapes, chosen):
            if tensor.shape != shape:
                label = f"{argument}[{name!r}]"
                raise ValueError(f"{label} has shape {list(tensor.shape)}, the mask was made for {list(shape)}")
            if tensor.device != device:
                self._check_device(tensor, f"{argument}[{name!r}]")
        return chosen

    def check_compact(self, compact: Tensor, argument: str) -> None:
        """ValueError or TypeError unless this is a tensor [nnz] on the mask's device."""
        validation.check_plain(compact, argument)
        if compact.shape != (self.nnz,):
            raise ValueError(f"{argument} must be compact, [nnz] = [{self.nnz}], got shape {list(compact.shape)}")
        self._check_device(compact, argument)

    def _check_device(self, other: "Tensor | CSRMask", label: str) -> None:
        if other.device != self.device:
            raise ValueError(f"{label} is on {other.device}, the mask on {self.device}: move one with .to()")

    # ---- sub-masks and set operations ----
    def __getitem__(self, name: str) -> "CSRMask":
        """The mask of one tensor."""
        i = self._position(name)
        crow = self.crow_indices[self.row_offsets[i] : self.row_offsets[i + 1] + 1] - self.entry_offsets[i]
        return CSRMask.unchecked((name,), (self.shapes[i],), crow, self.part(name, self.col_indices))

    def at(self, positions: Tensor) -> "CSRMask":
        """The mask of the entries at these positions in the compact order: int64, ascending, not checked."""
        col = signed(self.col_indices)[positions].view(self.col_indices.dtype)
        return CSRMask.unchecked(self.names, self.shapes, torch.searchsorted(positions, self.crow_indices), col)

    def restrict(self, names: Sequence[str]) -> "CSRMask":
        """The mask of some of the tensors, given in any order."""
        if not (parts := [self[n] for n in sorted(names)]):
            raise ValueError("names: a CSRMask needs at least one tensor")
        return CSRMask.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence["CSRMask"]) -> "CSRMask":
        """The mask of several tensors from masks of one tensor each, on one device, in the order of their names."""
        starts = accumulate((p.nnz for p in parts), initial=0)
        crow = torch.cat([parts[0].crow_indices[:1], *(p.crow_indices[1:] + start for p, start in zip(parts, starts))])
        col = torch.cat([p.col_indices.to(torch.int32) for p in parts])
        return cls.unchecked([p.names[0] for p in parts], [p.shapes[0] for p in parts], crow, col)

    def flat_indices(self, offsets: Mapping[str, int] | None = None) -> Tensor:
        """int64 [nnz], ascending: the entries' indices in all tensors, flattened and concatenated in the order of the
        names. With `offsets`, the first element of each tensor has the index offsets[name].
        """
        starts = None if offsets is None else [offsets[n] for n in self.names]
        row_starts = row_starts_of(self.shapes, starts).to(self.device)
        return torch.repeat_interleave(row_starts, self.crow_indices.diff()) + self.col_indices.to(torch.int64)

    @classmethod
    def from_flat_indices(cls, names: Sequence[str], shapes: Sequence[torch.Size], flat: Tensor) -> "CSRMask":
        """The mask with these `flat_indices()`: int64, ascending, not checked."""
        row_starts, numel = row_starts_of(shapes).to(flat.device), sum(s.numel() for s in shapes)
        crow = torch.searchsorted(flat, torch.nn.functional.pad(row_starts, (0, 1), value=numel))
        col = flat - torch.repeat_interleave(row_starts, crow.diff())
        return cls.unchecked(names, shapes, crow, col.to(torch.int32))

    def project(self, compact: Tensor, other: "CSRMask") -> Tensor:
        """A compact tensor of this mask as one of another mask [other.nnz]: entries that only the other has are 0."""
        self.check_compact(compact, "compact")
        self._check_device(other, "other")
        shapes = self._united_shapes(other)
        mine, theirs, compact = self.over(shapes), other.over(shapes), compact.detach().contiguous()

        def at_others(values: Tensor) -> Tensor:
            others = [mine.crow_indices], [mine.col_indices], [values], [1.0]
            dtype = compute_dtype(values.dtype)
            return torch.ops.deftx.csr_sum(theirs.crow_indices, theirs.col_indices, *others, ELECTIONS["none"], dtype)

        if compact.dtype in FLOATS:
            return at_others(compact).to(compact.dtype)
        # Other dtypes by their positions, of which float64 holds every one.
        position = at_others(torch.arange(1, self.nnz + 1, dtype=torch.float64, device=self.device)).to(torch.int64)
        return torch.cat([compact.new_zeros(1), compact])[position]

    def _united_shapes(self, other: "CSRMask") -> dict[str, torch.Size]:
        """Name → shape of the tensors of both masks, by name."""
        shapes = dict(zip(self.names, self.shapes))
        for name, shape in zip(other.names, other.shapes):
            if (own := shapes.setdefault(name, shape)) != shape:
                raise ValueError(f"tensor {name!r} has shape {list(own)} in one mask and {list(shape)} in the other")
        return dict(sorted(shapes.items()))

    def over(self, shapes: Mapping[str, torch.Size]) -> "CSRMask":
        """This mask over more tensors, in which it has no entries. `shapes`: name → shape of all of them, by name."""
        return CSRMask.unchecked(list(shapes), list(shapes.values()), self._crow_of(shapes), self.col_indices)

    def _combine(self, other: "CSRMask", operation: str) -> "CSRMask":
        if not isinstance(other, CSRMask):
            return NotImplemented
        self._check_device(other, "the other mask")
        shapes = self._united_shapes(other)
        indices = [t for mask in (self.over(shapes), other.over(shapes)) for t in (mask.crow_indices, mask.col_indices)]
        crow, col = torch.ops.deftx.csr_combine(*indices, OPERATIONS[operation])
        return CSRMask.unchecked(list(shapes), list(shapes.values()), crow, col)

    def _crow_of(self, shapes: Mapping[str, torch.Size]) -> Tensor:
        """crow_indices over the rows of more tensors; rows of those that the mask does not cover are empty."""
        if len(shapes) == len(self.names):
            return self.crow_indices
        parts = [self.crow_indices[:1]]
        for name, shape in shapes.items():
            if name in self.positions:
                i = self.positions[name]
                parts.append(self.crow_indices[self.row_offsets[i] + 1 : self.row_offsets[i + 1] + 1])
            else:
                parts.append(parts[-1][-1:].expand(rows_and_columns(shape)[0]))
        return torch.cat(parts)

    def __and__(self, other: "CSRMask") -> "CSRMask":
        """Entries of both masks. The result covers the tensors of both; a mask is empty in those it does not cover."""
        return self._combine(other, "and")

    def __or__(self, other: "CSRMask") -> "CSRMask":
        """Entries of either mask."""
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
            and torch.equal(signed(self.col_indices), signed(other.col_indices.to(self.device)))
        )

    def __hash__(self) -> int:
        return hash((self.names, self.shapes, self.nnz))

    def to(self, device: torch.device | str | int) -> "CSRMask":
        """This mask on a device (itself where it is there already)."""
        crow, col = self.crow_indices.to(device), self.col_indices.to(device)
        return self if crow is self.crow_indices else CSRMask.unchecked(self.names, self.shapes, crow, col)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, shapes and entries; equal masks have equal fingerprints on every device."""
        digest = hashlib.sha256(self._layout_json().encode())
        for tensor in (self.crow_indices, signed(self.col_indices)):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _layout_json(self) -> str:
        return json.dumps({"names": self.names, "shapes": [list(s) for s in self.shapes]})

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum, atomically: a crash leaves the old file or the new one.

        Raises:
            OSError: it cannot be written; the message names the file.
        """
        tensors = {name: getattr(self, name).cpu().contiguous() for name in ("crow_indices", "col_indices")}
        metadata = {"format": FORMAT, "layout": self._layout_json(), "fingerprint": self.fingerprint()}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> "CSRMask":
        """Read a file of `save`.

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
            mask = cls(layout["names"], layout["shapes"], *map(file.get_tensor, ("crow_indices", "col_indices")))
            if "fingerprint" not in metadata:
                raise ValueError("written by an older version, without a checksum: make the mask again")
            if mask.fingerprint() != metadata["fingerprint"]:
                raise ValueError("its content does not match its checksum")
        return mask.to(device)
