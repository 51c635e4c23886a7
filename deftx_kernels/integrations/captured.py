"""A whole training step as one CUDA graph: forward, backward, clipping and the optimizer's step."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deftx_kernels.nn import copies_in_graphs, entries_of
from deftx_kernels.optim import SparseAdamW
from deftx_kernels.validation import check_int, is_number

LossFunction = Callable[[nn.Module, Any], Tensor]


def captured_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFunction,
    example_batch: Any,
    *,
    warmup: int = 3,
    max_grad_norm: float | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> "CapturedStep":
    """Capture a training step as a CUDA graph: the host then launches a whole step at once, not kernel by kernel.

    A call, `loss = step(batch)`, does what this loop does, with the same results; on the CPU it is this loop:

        optimizer.zero_grad()
        with torch.autocast(device, autocast_dtype):
            loss = loss_fn(model, batch)
        loss.backward()
        optimizer.clip_grad_norm_(max_grad_norm)
        optimizer.step()

    Warm-up and capture train nothing: weights, buffers, moments, step numbers and random numbers are then what they
    were before. Gradients present before are dropped; after a call, `param.grad` has those of this call. The learning
    rate is read at each call, so that every scheduler works. The step is captured again (some seconds) where a call
    finds that the model or the optimizer's state has been moved, cast, frozen or loaded, `model.train()` or `eval()`
    called, or another option of the optimizer changed (OneCycleLR needs `cycle_momentum=False`: it would change the
    betas at each step). A captured step reads nothing back from the device. Not supported are gradient accumulation,
    GradScaler and several devices.

    Args:
        model: plain or sparsified, on one device.
        optimizer: SparseAdamW, or `torch.optim.AdamW` or `Adam`: on a GPU with `fused=True, capturable=True`.
        loss_fn: (model, batch) → scalar loss. On a GPU it must not wait for the device (`.item()`, `nonzero`), and
            what it does in Python happens only at capture.
        example_batch: a tensor, or dicts, lists and tuples of tensors and constants. All batches must have its shapes,
            dtypes and constants: a last, smaller batch is for an eager step, or for `drop_last=True`.
        warmup: steps before the capture, at least 1.
        max_grad_norm: clip the gradients to this norm (`SparseAdamW.clip_grad_norm_`, or torch's); None: do not clip.
        autocast_dtype: torch.bfloat16, or None without autocast.

    Returns:
        A callable, batch → loss: a tensor of its own (not overwritten by later calls), detached, on the device.

    Raises:
        ValueError, TypeError: an argument is out of range, or the optimizer cannot be captured; from a call, a batch
            that differs from the example, by the tensor's name.

    Example:
        >>> from deftx_kernels import SparseAdamW
        >>> from deftx_kernels.integrations import captured_step
        >>> model = torch.nn.Linear(3, 1)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = SparseAdamW(model.named_parameters(), None, lr=0.1)
        >>> batch = {"x": torch.ones(4, 3), "y": torch.zeros(4, 1)}
        >>> def loss_fn(model, batch):
        ...     return (model(batch["x"]) - batch["y"]).square().mean()
        >>> step = captured_step(model, optimizer, loss_fn, batch, max_grad_norm=1.0)
        >>> losses = [step(batch) for _ in range(3)]
        >>> bool(losses[2] < losses[0])
        True
    """
    return CapturedStep(model, optimizer, loss_fn, example_batch, warmup, max_grad_norm, autocast_dtype)


class CapturedStep:
    """What `captured_step` returns.

    Attributes:
        grad_norm: float32 []: the norm of the last call's gradients before clipping; None without max_grad_norm.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFunction,
        example_batch: Any,
        warmup: int = 3,
        max_grad_norm: float | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        check_int(warmup, "warmup", 1)
        if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
            raise ValueError(f"max_grad_norm must be a number above 0 or None, got {max_grad_norm!r}")
        if autocast_dtype not in (None, torch.bfloat16):
            raise ValueError(f"autocast_dtype must be torch.bfloat16 or None, got {autocast_dtype}")
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.warmup, self.max_grad_norm, self.autocast_dtype = warmup, max_grad_norm, autocast_dtype
        self.grad_norm: Tensor | None = None
        self._loss: Tensor | None = None  # of the captured step
        self.device = _device_of(model, optimizer)
        self._example = dict(_leaves(example_batch))
        self._graph: torch.cuda.CUDAGraph | None = None
        if is_capturable(self.device):
            _check_capturable(optimizer)
            self._inputs = {n: x.to(self.device, copy=True) for n, x in self._example.items() if isinstance(x, Tensor)}
            self._batch = _with_tensors(example_batch, self._inputs)
            self._found_inf = torch.zeros((), device=self.device)
            self._capture()
        self._example = {n: _description(x) for n, x in self._example.items()}

    def __call__(self, batch: Any) -> Tensor:
        """One training step; returns its loss."""
        leaves = dict(_leaves(batch))
        self._check_batch(leaves)
        if not is_capturable(self.device):
            return self._eager(batch)
        for entry in self._entries:  # the captured forward does not: values may have been written since the last call
            entry.synchronise()
            entry.refresh_copy()
        if self._storage_keys() != self._captured_keys:
            self._capture()
        assert self._graph is not None
        assert self._loss is not None
        for name, tensor in self._inputs.items():
            tensor.copy_(leaves[name], non_blocking=True)
        self._set_rates()
        self._graph.replay()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # else a scheduler warns that no step was taken
        return self._loss.clone()

    # ---- the step ----
    def _eager(self, batch: Any) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(
            self.device.type,
            self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
            cache_enabled=False,  # a graph must not keep the casts of weights
        ):
            loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            found = f"{list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor with a gradient, got {found}")
        loss.backward()
        if self.max_grad_norm is not None:
            if isinstance(self.optimizer, SparseAdamW):
                self.grad_norm = self.optimizer.clip_grad_norm_(self.max_grad_norm)
            else:
                self.grad_norm = nn.utils.clip_grad_norm_(_parameters(self.optimizer), self.max_grad_norm)
        self.optimizer.step()
        return loss.detach()

    def _static_step(self) -> Tensor:
        """The step as it is captured: inputs, learning rates and whether to skip are read from fixed addresses."""
        optimizer: Any = self.optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        for group, static in zip(optimizer.param_groups, self._rates):
            if not _is_on(group["lr"], self.device):
                group["lr"] = static
        optimizer.grad_scale, optimizer.found_inf = None, self._found_inf  # as GradScaler does
        try:
            return self._eager(self._batch)
        finally:
            del optimizer.grad_scale, optimizer.found_inf
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate

    def _capture(self) -> None:
        """Take steps that `found_inf` skips, so that kernels are compiled and states allocated; capture one."""
        self._graph = self._loss = None  # frees the memory of an older graph
        self._rates = [torch.zeros((), device=self.device) for _ in self.optimizer.param_groups]
        self._entries = list(entries_of(_parameters(self.optimizer)).values())
        self._set_rates()
        with _unchanged(self.model, self.device), torch.cuda.device(self.device):
            self._found_inf.fill_(1.0)
            main, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                for _ in range(self.warmup):
                    self._static_step()
            main.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with copies_in_graphs(), torch.cuda.graph(graph):
                self._loss = self._static_step()
            self._found_inf.zero_()
        self._graph, self._captured_keys = graph, self._storage_keys()

    def _set_rates(self) -> None:
        for group, static in zip(self.optimizer.param_groups, self._rates):
            if not _is_on(group["lr"], self.device):
                static.fill_(float(group["lr"]))

    def _storage_keys(self) -> list[Any]:
        """What a captured step has fixed: addresses of what it reads and writes, and options."""
        tensors: list[Tensor] = [*self.model.parameters()]
        keys: list[Any] = [self.model.training, [t.requires_grad for t in tensors]]
        tensors += self.model.buffers()
        for group in self.optimizer.param_groups:
            options = {k: group.get(k) for k in self.optimizer.defaults if k != "lr"}
            keys.append({k: v for k, v in options.items() if not isinstance(v, Tensor)})
            tensors += [v for v in group.values() if isinstance(v, Tensor)]
        for state in self.optimizer.state.values():
            tensors += [v for v in state.values() if isinstance(v, Tensor)]
        tensors += [e.copy.tensor for e in self._entries if e.copy is not None and e.copy.tensor is not None]
        return [*keys, [t.data_ptr() for t in tensors]]

    def _check_batch(self, leaves: dict[str, Any]) -> None:
        if different := leaves.keys() ^ self._example.keys():
            name = min(different)
            raise ValueError(f"{name} is in {'the batch' if name in leaves else 'the example'} only")
        for name, x in leaves.items():
            if (found := _description(x)) != (wanted := self._example[name]):
                raise ValueError(f"{name} must be {_words(wanted)}, as in the example batch, got {_words(found)}")


def is_capturable(device: torch.device) -> bool:
    return device.type == "cuda"


# ---- model and optimizer ----
def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _device_of(model: nn.Module, optimizer: Optimizer) -> torch.device:
    devices = {t.device for t in (*model.parameters(), *_parameters(optimizer))}
    if len(devices) != 1:
        raise ValueError(f"model must be on one device, got {', '.join(sorted(map(str, devices))) or 'no parameters'}")
    return devices.pop()


def _check_capturable(optimizer: Optimizer) -> None:
    """The warm-up needs a step that `found_inf` skips, and a state that then is what a first step begins with."""
    if isinstance(optimizer, SparseAdamW):
        return
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise TypeError(f"optimizer must be SparseAdamW, AdamW or Adam, got {type(optimizer).__name__}")
    for option in ("fused", "capturable"):
        if not all(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"optimizer: torch's {type(optimizer).__name__} must be made with {option}=True")


def _is_on(rate: Any, device: torch.device) -> bool:
    return isinstance(rate, Tensor) and rate.device == device


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores what a forward changes: buffers (running means) and random numbers."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


# ---- batches ----
def _leaves(batch: Any, name: str = "batch") -> Iterator[tuple[str, Any]]:
    """The tensors and constants of a batch, with names such as batch['labels'] and batch[0]."""
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _leaves(value, f"{name}[{key!r}]")
    elif isinstance(batch, list | tuple):
        for i, value in enumerate(batch):
            yield from _leaves(value, f"{name}[{i}]")
    else:
        yield name, batch


def _with_tensors(batch: Any, tensors: Mapping[str, Tensor], name: str = "batch") -> Any:
    """The batch with other tensors, given by name."""
    if isinstance(batch, Mapping):
        result: Any = copy.copy(batch)  # also transformers' BatchEncoding
        for key, value in batch.items():
            result[key] = _with_tensors(value, tensors, f"{name}[{key!r}]")
        return result
    if isinstance(batch, list | tuple):
        values = [_with_tensors(value, tensors, f"{name}[{i}]") for i, value in enumerate(batch)]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return tensors.get(name, batch)


def _description(x: Any) -> Any:
    return (x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else x


def _words(description: Any) -> str:
    if isinstance(description, tuple) and isinstance(description[0], torch.dtype):
        return f"{description[0]} {list(description[1])}"
    return repr(description)
