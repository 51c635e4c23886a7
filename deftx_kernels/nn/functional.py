"""The autograd functions of masked parameters: forward reads the dense tensor, backward gives its compact values their
gradient.

Arguments have been checked: by `functional`, or by `nn` when a model was sparsified.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import check_float, check_plain


def _is_traced() -> bool:
    """Whether the arguments are not what they will be: under torch.compile and torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply`, without binding the arguments to the signature of `forward` in Python (35 us of 50 on a Xeon)."""
    if _is_traced():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class _NoSecondDerivative(torch.autograd.Function):
    """The gradients as they are; whoever differentiates them, by one of `sources`, is told that they cannot be."""

    @staticmethod
    def forward(name, sources, *rest):
        return tuple(None if g is None else g.view_as(g) for g in rest[sources:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} cannot be differentiated twice: its second derivatives are not available")


def _first_derivative(name: str):
    """Of a backward: its result cannot be differentiated again, and autocast, whose casts forward has made, is off."""

    def decorate(backward: Callable) -> Callable:
        def run(ctx, grad_output):
            kind = grad_output.device.type
            again = torch.is_grad_enabled()  # create_graph=True
            if torch.compiler.is_compiling() or not (again or _autocast_dtype(kind)):
                return backward(ctx, grad_output)
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                grads = backward(ctx, grad_output)
            if not again:
                return grads
            # Also where grad_output needs no gradient (that of a sum): the gradient of x depends on the values, theirs
            # on x.
            sources = [grad_output, *(t for t in ctx.saved_tensors if t is not None and t.is_floating_point())]
            return _NoSecondDerivative.apply(name, len(sources), *sources, *grads)

        return run

    return decorate


def _autocast_dtype(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def _own(out: Tensor) -> Tensor:
    """What F.linear and F.embedding make of more than two dimensions is a view, and a view that a Function returns
    could not be modified in place afterwards (`nn.ReLU(inplace=True)`)."""
    if out.dim() == 2:
        return out
    return torch.ops.aten._unsafe_view(out, out.shape) if _is_traced() else out.data  # for half of the time


class _MaskedMatmul(torch.autograd.Function):
    """x @ weight.T + bias (x @ weight + bias where `transposed`, as in transformers' Conv1D) with compact gradients:
    that of the weight, and that of the bias where it has values of its own. `dtype` is autocast's, of which x and bias
    are already.
    """

    @staticmethod
    def forward(
        x, weight, values, crow_indices, col_indices, bias, bias_values, bias_crow, bias_col, transposed, dtype
    ):
        weight = weight if dtype is None else weight.to(dtype)
        return _own(F.linear(x, weight.mT if transposed else weight, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, values, crow, col, _, bias_values, bias_crow, bias_col, ctx.transposed, ctx.dtype = inputs
        ctx.dtypes = values.dtype, None if bias_values is None else bias_values.dtype
        x, weight = x if ctx.needs_input_grad[2] else None, weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, weight, crow, col, bias_crow, bias_col, None if weight is None else values)

    @staticmethod
    @_first_derivative("masked_linear")
    def backward(ctx, grad_output):
        x, weight, crow, col, bias_crow, bias_col, _ = ctx.saved_tensors
        d_x = d_values = d_bias = d_bias_values = None
        if ctx.needs_input_grad[0]:
            weight = weight if ctx.dtype is None else weight.to(ctx.dtype)
            d_x = grad_output @ (weight.mT if ctx.transposed else weight)
        flat = grad_output.flatten(0, -2) if grad_output.dim() > 1 else grad_output[None]  # [N, m]
        if ctx.needs_input_grad[2]:
            rows, columns = flat, x.flatten(0, -2) if x.dim() > 1 else x[None]
            if ctx.transposed:
                rows, columns = columns, rows
            d_values = torch.ops.deftx.masked_linear_grad(
                rows.contiguous(), columns.contiguous(), crow, col, ctx.dtypes[0]
            )
        if ctx.needs_input_grad[5]:
            d_bias = flat.sum(0)
        if ctx.needs_input_grad[6]:
            d_bias_values = torch.ops.deftx.csr_gather([flat.sum(0, dtype=ctx.dtypes[1])], bias_crow, bias_col)
        return d_x, None, d_values, None, None, d_bias, d_bias_values, None, None, None, None


class _MaskedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ids, weight, values, crow_indices, col_indices, padding_idx):
        return _own(F.embedding(ids, weight))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ids, _, values, crow_indices, col_indices, ctx.padding_idx = inputs
        ctx.dtype = values.dtype
        ctx.save_for_backward(ids, crow_indices, col_indices)

    @staticmethod
    @_first_derivative("masked_embedding")
    def backward(ctx, grad_output):
        ids, crow_indices, col_indices = ctx.saved_tensors
        flat = grad_output.reshape(ids.numel(), grad_output.shape[-1]).contiguous()
        d_values = torch.ops.deftx.masked_embedding_grad(
            flat, ids.flatten().contiguous(), crow_indices, col_indices, ctx.padding_idx, ctx.dtype
        )
        return None, None, d_values, None, None, None


class _GatherGradient(torch.autograd.Function):
    """The dense tensor as it is, with a gradient for its compact values alone."""

    @staticmethod
    def forward(dense, values, crow_indices, col_indices):
        return dense.view_as(dense)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, values, crow_indices, col_indices = inputs
        ctx.dtype = values.dtype
        ctx.save_for_backward(crow_indices, col_indices)

    @staticmethod
    @_first_derivative("a masked parameter")
    def backward(ctx, grad_output):
        crow_indices, col_indices = ctx.saved_tensors
        if not torch.compiler.is_compiling() and grad_output.layout != torch.strided:  # of EmbeddingBag(sparse=True)
            grad_output = grad_output.to_dense()
        compact = torch.ops.deftx.csr_gather([grad_output.contiguous()], crow_indices, col_indices)
        return None, compact.to(ctx.dtype), None, None


class _RefusedGradient(torch.autograd.Function):
    """The dense tensor as it is; a backward through it raises an error that says why there is no gradient."""

    @staticmethod
    def forward(dense, values, reason):
        return dense.view_as(dense)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.reason = inputs[2]

    @staticmethod
    def backward(ctx, grad_output):
        raise RuntimeError(ctx.reason)


class _Scattered(torch.autograd.Function):
    """A copy of the dense tensor that holds other values; no gradient."""

    @staticmethod
    def forward(dense, values, crow_indices, col_indices):
        copy = dense.clone(memory_format=torch.contiguous_format)
        torch.ops.deftx.csr_scatter_([copy], crow_indices, col_indices, values.to(dense.dtype))
        return copy

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, grad_output):
        return None, None, None, None


def masked_matmul(
    x: Tensor,  # [..., n]
    weight: Tensor,  # [m, n]; [n, m] where transposed, as transformers' Conv1D has it
    values: Tensor,  # [nnz]
    mask: CSRMask,
    bias: Tensor | None,  # [m]
    bias_values: Tensor | None = None,  # compact: then these have the bias's gradient
    bias_mask: CSRMask | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """`masked_linear` without its checks."""
    if not torch.is_grad_enabled():
        return F.linear(x, weight.mT if transposed else weight, bias)
    dtype = _autocast_dtype(x.device.type)
    # autocast's own rule
    if dtype and x.is_floating_point() and x.dtype != torch.float64 and weight.dtype != torch.float64:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    else:
        dtype = None
    if bias_values is not None and bias is not None:
        bias = bias.detach()
    bias_crow, bias_col = (None, None) if bias_mask is None else (bias_mask.crow_indices, bias_mask.col_indices)
    return _apply(
        _MaskedMatmul, x, weight.detach(), values, mask.crow_indices, mask.col_indices, bias, bias_values, bias_crow, bias_col,
        transposed, dtype,
    )  # fmt: skip


def masked_lookup(ids: Tensor, weight: Tensor, values: Tensor, mask: CSRMask, padding_idx: int | None) -> Tensor:
    """`masked_embedding` without its checks."""
    if not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    padding_idx = -1 if padding_idx is None else padding_idx
    return _apply(_MaskedEmbedding, ids, weight.detach(), values, mask.crow_indices, mask.col_indices, padding_idx)


def masked_tensor(dense: Tensor, values: Tensor, mask: CSRMask) -> Tensor:
    """The dense tensor, whose gradient is gathered into that of its compact values [nnz]."""
    if not torch.is_grad_enabled():
        return dense
    return _apply(_GatherGradient, dense.detach(), values, mask.crow_indices, mask.col_indices)


def without_gradient(dense: Tensor, values: Tensor, reason: str) -> Tensor:
    """The dense tensor, whose gradient is an error for this reason."""
    return _apply(_RefusedGradient, dense.detach(), values, reason)


def scattered(dense: Tensor, values: Tensor, mask: CSRMask) -> Tensor:
    """A copy of the dense tensor with these values [nnz] at the mask's entries; without gradient."""
    return _apply(_Scattered, dense.detach(), values, mask.crow_indices, mask.col_indices)


# ---- public functions ----


def _check_masked(
    source: Tensor, argument: str, weight: Tensor, values: Tensor, mask: CSRMask, bias: Tensor | None = None
) -> None:
    """`source`: x or ids."""
    for label, tensor in (("weight", weight), ("values", values), ("bias", bias)):
        if tensor is not None:
            check_float(tensor, label)
    if len(mask.names) != 1 or mask.shapes[0] != weight.shape or weight.dim() != 2:
        raise ValueError(
            f"mask must cover one tensor of weight's shape {list(weight.shape)}, it covers {[list(s) for s in mask.shapes]}"
        )
    mask.check_compact(values, "values")
    if weight.device != mask.device:
        raise ValueError(f"weight is on {weight.device}, the mask on {mask.device}: move one with .to()")
    for label, tensor in ((argument, source), ("bias", bias)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{label} is on {tensor.device}, weight on {weight.device}: move one with .to()")
    # what backward needs must not be an inference tensor
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for label, tensor, other in (
            (argument, source, values),
            ("weight", weight, source),
            ("values", values, source),
        ):
            if tensor.is_inference() and other.requires_grad:
                raise ValueError(
                    f"{label} was made in inference_mode, so that backward cannot use it: clone it outside of that"
                )


def masked_linear(
    x: Tensor,  # [..., n]
    weight: Tensor,  # [m, n]
    values: Tensor,  # [nnz]
    mask: CSRMask,
    bias: Tensor | None = None,  # [m]
) -> Tensor:
    """`torch.nn.functional.linear` whose weight is trained at the mask's entries only.

    Forward reads the dense `weight`, which already holds `values` at its entries, and makes no copy of it. Backward
    gives the gradient of `values` (compact, in their dtype), of `x` and of `bias`; no dense weight gradient exists.
    Autocast is honoured, as forward found it, in backward too. First derivatives only: differentiating a gradient again
    is a RuntimeError.

    Args:
        x: floating point [..., n], of the weight's dtype (any float but float64, under autocast).
        weight: float32, float64, float16 or bfloat16 [m, n].
        values: floating point [nnz], by preference float32 beside a 16-bit weight.
        mask: of one [m, n] tensor.
        bias: [m].

    Returns:
        [..., m], of the dtype that `torch.nn.functional.linear` gives.

    Raises:
        ValueError: `mask` is not the mask of one tensor of `weight`'s shape, `values` is not compact [nnz], the devices
            differ, or backward would need a tensor that was made in inference_mode.
        TypeError: `x`, `weight`, `values` or `bias` is not a dense floating-point tensor.
        RuntimeError: of `torch.nn.functional.linear`: dtypes or shapes do not fit.
    """
    check_plain(x, "x")
    _check_masked(x, "x", weight, values, mask, bias)
    return masked_matmul(x, weight, values, mask, bias)


def masked_embedding(
    ids: Tensor,  # integer [...]
    weight: Tensor,  # [vocabulary, d]
    values: Tensor,  # [nnz]
    mask: CSRMask,
    padding_idx: int | None = None,
) -> Tensor:
    """`torch.nn.functional.embedding` whose weight is trained at the mask's entries only (see `masked_linear`).

    Args:
        ids: int64 or int32 [...].
        weight: floating point [vocabulary, d].
        values: floating point [nnz].
        mask: of one [vocabulary, d] tensor.
        padding_idx: masked entries of this row receive no gradient; negative ones count from the end.

    Returns:
        [..., d], of the weight's dtype, also under autocast.

    Raises:
        ValueError, TypeError: as `masked_linear`; `ids` that are not integer; `padding_idx` outside the vocabulary.
        IndexError: of `torch.nn.functional.embedding`: ids out of range.
    """
    check_plain(ids, "ids")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    _check_masked(ids, "ids", weight, values, mask)
    if padding_idx is not None:
        if not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise ValueError(f"padding_idx must be within the {weight.shape[0]} rows of weight, got {padding_idx}")
        padding_idx %= weight.shape[0]
    return masked_lookup(ids, weight, values, mask, padding_idx)
