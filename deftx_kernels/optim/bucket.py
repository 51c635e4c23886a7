"""The parameters that an optimizer steps with the kernel, in buckets: a step is one launch for each bucket."""

from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import is_dtensor, local_gradient, local_part, local_tensor, mesh_of_rows
from deftx_kernels.nn import entries_of, write_copies
from deftx_kernels.ops.schemas import compute_dtype
from deftx_kernels.optim.full import FullMask
from deftx_kernels.optim.functional import CompactState, StepOptions, apply_step, check_targets
from deftx_kernels.validation import scalar

# Name in the mask → (dense tensor, parameter), of parameters that a mask covers. The parameter is the dense tensor
# itself or the compact values [nnz] of a sparsified model. Of a DTensor a bucket steps this rank's part.
Pairs = dict[str, tuple[Tensor, Tensor]]


class Bucket:
    """Parameters of one group, dtype and device. Their compact state is one flat buffer, a step one launch.

    Args:
        group: the parameter group, whose options are read at each step.
        optimizer_state: of all parameters. It is copied into the bucket's buffers and replaced by views of them.
        pairs: the parameters, all dense or all compact; all divided by rows over one mesh, or none.
        mask: of the whole tensors of the whole optimizer.
        decay_to: name → compact tensor of this rank's entries.
        track_changes: mark the entries whose stored bits the steps change.
    """

    def __init__(
        self,
        group: Mapping[str, Any],
        optimizer_state: dict[Tensor, Any],
        pairs: Pairs,
        mask: CSRMask,
        decay_to: dict[str, Tensor] | None,
        track_changes: bool = False,
    ) -> None:
        self.arguments = group, optimizer_state, pairs, mask, decay_to, track_changes
        self.group, self.optimizer_state = group, optimizer_state
        self.names = sorted(pairs)
        self.dense, self.params = ([pairs[name][i] for name in self.names] for i in (0, 1))
        for name, tensor in zip(self.names, self.dense):
            if tensor.is_meta:
                raise ValueError(
                    f"named_params[{name!r}] is on meta: the model needs its weights before the first step"
                )
        self.is_compact = self.params[0] is not self.dense[0]
        self.mesh = mesh_of_rows(self.params[0])
        self.has_dtensors = any(map(is_dtensor, self.params))
        has_values = self.is_compact and self.has_dtensors
        if has_values:  # not of this rank's rows: a step writes no dense tensors, which are written after it (`nn`)
            self.dense, self.is_compact = self.params, False
        self.device, dtype = self.dense[0].device, self.dense[0].dtype
        # The launches of a step use different random numbers: the seed's upper half is the index of the first tensor.
        self.seed_offset = mask.names.index(self.names[0]) << 32
        if self.mesh is not None:  # and those of the ranks differ, where each has its own rows
            self.seed_offset += self.mesh.get_local_rank() << 48
        if len(self.names) < len(mask):
            mask = mask[self.names[0]] if len(self.names) == 1 else mask.restrict(self.names)
        if has_values:
            mask = FullMask({n: local_tensor(p).shape for n, p in zip(self.names, self.params)}, self.device)
        elif self.mesh is not None:
            mask = CSRMask.joined([local_part(mask[n], t) for n, t in zip(self.names, self.dense)])
        self.mask = mask.to(self.device)
        self._find_local_tensors()
        compute = compute_dtype(dtype)
        moments = compute if compute == torch.float64 else group["state_dtype"] or compute
        has_master = not self.is_compact and group["master"] and dtype in (torch.float16, torch.bfloat16)
        self.states = [optimizer_state[p] for p in self.params]
        self.views: list[tuple[dict[str, Any], str, Tensor]] = []  # a parameter's state, key and the tensor there
        self.state = CompactState(
            self._flat_state("exp_avg", moments),
            self._flat_state("exp_avg_sq", moments),
            self._flat_state("values", compute) if has_master else None,
            None if decay_to is None else torch.cat([decay_to[n] for n in self.names]).to(self.device, compute),
        )
        words = -(-self.mask.nnz // 32)
        self.changed = torch.zeros(words, dtype=torch.int32, device=self.device) if track_changes else None
        self.steps = self._flat_state("step", torch.float32)
        self.first_step = self.steps[0]
        self.steps_differ = len(set(self.steps.tolist())) > 1
        self.must_copy_values = False  # compact values that are not views of one buffer: copied before and after a step
        self.checked_storage: tuple | None = None  # `_storage_keys` of what a step writes, when last checked
        self.entries = list(entries_of(self.params).values()) if self.is_compact else []  # of a sparsified model
        self.copied: tuple[list[str], CSRMask] = [], self.mask  # names of weights with autocast copies, and their mask

    def _flat_state(self, key: str, dtype: torch.dtype) -> Tensor:
        """One tensor for the states, [nnz] or, for "step", [parameters]; the parameters' states become views of it. For
        a single parameter it is that parameter's own state, so that `split` copies nothing.
        """
        saved = [state.get(key) for state in self.states]
        if key != "step":  # a loaded state keeps its dtype; that of fused AdamW may have float16
            dtype = next((t.dtype for t in saved if t is not None and t.dtype != torch.float16), dtype)
        if len(saved) == 1 and saved[0] is not None:
            flat = saved[0].to(self.device, dtype).contiguous().view(-1)
        elif key == "values":
            flat = self.mask.gather(dict(zip(self.names, self.dense))).to(dtype)
        else:
            size = len(saved) if key == "step" else self.mask.nnz
            flat = torch.zeros(size, dtype=dtype, device=self.device)
        views = flat.unbind() if key == "step" else self.mask.split(flat).values()
        for before, state, view in zip(saved, self.states, views):
            if before is not None:
                view.copy_(before)
            state[key] = view
            self.views.append((state, key, view))
        return flat

    def _find_local_tensors(self) -> None:
        """FSDP2 may replace the local tensors of its parameters between steps."""
        if self.has_dtensors:
            self.dense = [local_tensor(p) for p in self.params]

    def needs_rebuild(self) -> bool:
        """Whether other code has replaced or removed tensors of the optimizer's state, or densified the model."""
        if not all(map(is_, map(self.optimizer_state.get, self.params), self.states)):
            return True
        if self.is_compact and any(p.tracker is None for p in self.params):  # type: ignore[attr-defined]  # densified
            return True
        return any(state.get(key) is not view for state, key, view in self.views)

    def split(self) -> list["Bucket"]:
        """The bucket; or one for each parameter where steps differ (a launch has one) or some have no gradient. Their
        states stay where they are in memory.
        """
        if not self.steps_differ and len({p.grad is None for p in self.params}) == 1:
            return [self]
        group, state, pairs, mask, decay_to, track_changes = self.arguments
        return [Bucket(group, state, {n: pairs[n]}, mask, decay_to, track_changes) for n in self.names]

    def marked(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(dense tensor, int32 or int64 flat indices of its marked entries, ascending), for each tensor."""
        assert self.changed is not None
        starts = torch.tensor(self.mask.entry_offsets, device=self.device)
        offsets, entries = torch.ops.deftx.set_bits(self.changed, starts)
        for name, dense, marked in zip(self.names, self.dense, entries.split(offsets.diff().tolist())):
            full = isinstance(self.mask, FullMask) or not len(marked)
            yield dense, marked if full else self.mask[name].flat_indices()[marked]

    def square_sums(self) -> list[Tensor]:
        """float64, each [any number]: sums of squares of masked gradients, which add up to that of all."""
        grads = {n: grad for n, grad in zip(self.names, map(local_gradient, self.params)) if grad is not None}
        if not grads:
            return []
        if self.is_compact:
            norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads.values()]
            return [torch.stack(norms).square()]
        if len(grads) == len(self.names):
            return [self.mask.square_sum(grads).view(1)]
        return [self.mask[name].square_sum({name: grad}).view(1) for name, grad in grads.items()]

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One step of all parameters; nothing if they have no gradients."""
        grads: Any = dict(zip(self.names, map(local_gradient, self.params)))
        if grads[self.names[0]] is None:
            return
        if self.is_compact:
            grads = torch.cat(list(grads.values()))
        self._find_local_tensors()
        self._check_storage()
        options = StepOptions(**{key: self.group[key] for key in StepOptions._fields})
        # A schedule may end at a rounding error below 0: the sign is checked where a group is added, not here.
        lr = options.lr if isinstance(options.lr, Tensor) else scalar(float(options.lr), "lr", self.device)
        options = options._replace(lr=lr, seed=options.seed + self.seed_offset)
        copied = [entry for entry in self.entries if entry.current_copy() is not None]
        self.steps.add_(1.0)
        try:
            step = self.first_step, self.mask, options, grad_scale, found_inf, self.changed
            apply_step(self.dense, grads, self.state, *step)
        except Exception:
            self.steps.sub_(1.0)
            raise
        if found_inf is not None:  # a skipped step does not count
            self.steps.sub_(found_inf.to(self.steps).view(()))
        for entry, dense in zip(self.entries, self.dense):  # the step wrote the values into the dense tensors
            entry.dense_tracker.version = dense._version
        if copied:
            self._write_copies({e.name: (e.copy, e.dense) for e in copied})
        if self.must_copy_values and self.state.values is not None:
            # Other owners of this memory (other processes, FSDP) read the result of the step from it.
            parts = self.state.values.split([p.numel() for p in self.params])
            torch._foreach_copy_([p.detach() for p in self.params], list(parts))

    def _write_copies(self, copies: dict[str, Any]) -> None:
        """Write the new values into the weights' copies for autocast, too: one launch."""
        values, names = self.state.values, list(copies)
        assert values is not None
        if names == self.names:
            write_copies(list(copies.values()), self.mask, values)
            return
        if self.copied[0] != names:
            self.copied = names, self.mask.restrict(names)
        parts = self.mask.split(values)
        write_copies(list(copies.values()), self.copied[1], torch.cat([parts[n] for n in names]))

    def _check_storage(self) -> None:
        """Check what a step writes, unless unchanged since the last; put a sparsified model's values into the state."""
        keys = *_storage_keys(self.dense), *(_storage_keys(self.params) if self.is_compact else ())
        if keys != self.checked_storage:  # the first step, or the model was moved, cast or loaded since the last one
            if self.is_compact:
                values = [p.detach() for p in self.params]
                buffer = _common_buffer(values)
                self.must_copy_values = buffer is None
                self.state = self.state._replace(values=torch.cat(values) if buffer is None else buffer)
            check_targets(dict(zip(self.names, self.dense)), self.state, self.mask)
            self.checked_storage = keys
        elif self.must_copy_values:
            torch.cat([p.detach() for p in self.params], out=self.state.values)


def _storage_keys(tensors: list[Tensor]) -> list[tuple]:
    """Unchanged as long as each tensor object has the memory, dtype and shape that were checked."""
    return [(t.data_ptr(), t.dtype, t.shape) for t in tensors]


def _common_buffer(parts: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of which the parts are successive views, as `sparsify` makes them; None if they are not."""
    filled = [p for p in parts if p.numel()]
    if not filled:
        return parts[0]
    storage, end = filled[0].untyped_storage().data_ptr(), filled[0].storage_offset()
    for part in filled:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end or not part.is_contiguous():
            return None
        end += part.numel()
    return filled[0].as_strided((sum(p.numel() for p in filled),), (1,))
