"""`masked_linear` and `masked_embedding`, and the autograd functions that compute gradients of compact values."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import check_float, check_plain


def is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _apply(function: type[torch.autograd.Function], *arguments):
    """`function.apply` without binding the arguments to `forward`'s signature in Python (35 us of 50 on a Xeon)."""
    if is_traced():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _not_a_view(out: Tensor) -> Tensor:
    """The same memory as a tensor that is no view. F.linear and F.embedding return views for more than two dimensions,
    and a view that a Function returns cannot be modified in place (`nn.ReLU(inplace=True)`).
    """
    if out.dim() == 2:
        return out
    # `.data` takes half of the time
    return torch.ops.aten._unsafe_view(out, out.shape) if is_traced() else out.data


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts the input of a product; None where it does not. float64 is not cast."""
    dtype = _autocast_dtype(x.device.type)
    return dtype if dtype and x.is_floating_point() and x.dtype != torch.float64 else None


# ---- autograd functions ----
class _RaiseInBackward(torch.autograd.Function):
    """Returns `tensors[sources:]` unchanged. They depend on all tensors, and their backward raises RuntimeError."""

    @staticmethod
    def forward(message, sources, *tensors):
        return tuple(None if t is None else t.view_as(t) for t in tensors[sources:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)


def _first_derivative_only(name: str):
    """Decorates a backward: no autocast (forward has cast already), and RuntimeError where it is differentiated."""
    message = f"{name} cannot be differentiated twice: its second derivatives are not available"

    def decorate(backward: Callable) -> Callable:
        def run(ctx, grad_output):
            device_type = grad_output.device.type
            create_graph = torch.is_grad_enabled()
            if torch.compiler.is_compiling() or not (create_graph or _autocast_dtype(device_type)):
                return backward(ctx, grad_output)
            with torch.no_grad(), torch.autocast(device_type, enabled=False):
                grads = backward(ctx, grad_output)
            if not create_graph:
                return grads
            # The saved tensors, too: the gradient of x depends on the values and theirs on x, also where grad_output
            # needs no gradient (that of a sum).
            sources = [grad_output, *(t for t in ctx.saved_tensors if t is not None and t.is_floating_point())]
            return _RaiseInBackward.apply(message, len(sources), *sources, *grads)

        return run

    return decorate


class _MaskedMatmul(torch.autograd.Function):
    """x @ weight.T + bias (x @ weight + bias where `transposed`) with a compact gradient of the weight, and of the bias
    where it has values. `dtype`: that of autocast, to which x and bias are cast already.
    """

    @staticmethod
    def forward(
        x, weight, values, crow_indices, col_indices, bias, bias_values, bias_crow, bias_col, transposed, dtype
    ):
        weight = weight if dtype is None else weight.to(dtype)
        return _not_a_view(F.linear(x, weight.mT if transposed else weight, bias))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, values, crow, col, _, bias_values, bias_crow, bias_col, ctx.transposed, ctx.dtype = inputs
        ctx.dtypes = values.dtype, None if bias_values is None else bias_values.dtype
        x, weight = x if ctx.needs_input_grad[2] else None, weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, weight, crow, col, bias_crow, bias_col, None if weight is None else values)

    @staticmethod
    @_first_derivative_only("masked_linear")
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
        return _not_a_view(F.embedding(ids, weight))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ids, _, values, crow_indices, col_indices, ctx.padding_idx = inputs
        ctx.dtype = values.dtype
        ctx.save_for_backward(ids, crow_indices, col_indices)

    @staticmethod
    @_first_derivative_only("masked_embedding")
    def backward(ctx, grad_output):
        ids, crow_indices, col_indices = ctx.saved_tensors
        flat = grad_output.reshape(ids.numel(), grad_output.shape[-1]).contiguous()
        d_values = torch.ops.deftx.masked_embedding_grad(
            flat, ids.flatten().contiguous(), crow_indices, col_indices, ctx.padding_idx, ctx.dtype
        )
        return None, None, d_values, None, None, None


def _gradient_of_experts(
    rows: Tensor,  # [N, m], the tokens of one expert after the other
    columns: Tensor,  # [N, n]
    ends: list[int],  # [experts]: where the tokens of each one end
    masks: Sequence[CSRMask],  # [experts], each of one [m, n] tensor
    dtype: torch.dtype,
) -> Tensor:
    """[nnz of all masks]: the masked entries of each expert's rows.T @ columns; 0 where an expert has no tokens."""
    sizes, start = [mask.nnz for mask in masks], 0
    out = torch.empty(sum(sizes), dtype=dtype, device=rows.device)
    for part, mask, end in zip(out.split(sizes), masks, ends):
        entries = mask.crow_indices, mask.col_indices
        part.copy_(torch.ops.deftx.masked_linear_grad(rows[start:end], columns[start:end], *entries, dtype))
        start = end
    return out


class _MaskedBmm(torch.autograd.Function):
    """torch.bmm(x, weight), or torch.bmm(weight, x), where matrix s of the weight is that of expert `experts[s]`, or of
    expert s. The masks are those of the experts' matrices, of which the weight's are the transposed where `transposed`.
    """

    @staticmethod
    def forward(x, weight, values, experts, masks, weight_first, transposed, dtype):
        weight = weight if dtype is None else weight.to(dtype)
        return torch.bmm(weight, x) if weight_first else torch.bmm(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, values, experts, ctx.masks, ctx.weight_first, ctx.transposed, ctx.dtype = inputs
        ctx.values_dtype = values.dtype
        x, weight = x if ctx.needs_input_grad[2] else None, weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, weight, experts, None if weight is None else values)

    @staticmethod
    @_first_derivative_only("the product with the weights of experts")
    def backward(ctx, grad_output):
        x, weight, experts, _ = ctx.saved_tensors
        d_x = d_values = None
        if ctx.needs_input_grad[0]:
            weight = (weight if ctx.dtype is None else weight.to(ctx.dtype)).mT
            d_x = torch.bmm(weight, grad_output) if ctx.weight_first else torch.bmm(grad_output, weight)
        if ctx.needs_input_grad[2]:
            rows, columns = (grad_output.mT, x.mT) if ctx.weight_first else (x, grad_output)  # [s, tokens, features]
            if ctx.transposed:
                rows, columns = columns, rows
            counts = torch.ones(len(ctx.masks), dtype=torch.int64)
            if experts is not None:
                order, counts = experts.argsort(), experts.bincount(minlength=len(ctx.masks))
                rows, columns = rows[order], columns[order]
            ends = (counts.cumsum(0) * rows.shape[1]).tolist()
            flat = rows.flatten(0, 1).contiguous(), columns.flatten(0, 1).contiguous()
            d_values = _gradient_of_experts(*flat, ends, ctx.masks, ctx.values_dtype)
        return d_x, None, d_values, None, None, None, None, None


class _MaskedGroupedMm(torch.autograd.Function):
    """`product(x, weight, offs=offs)`: the rows of x up to offs[0] by the first matrix of the weight, those up to
    offs[1] by the second one, and so on. `masks` and `transposed` as in `_MaskedBmm`.
    """

    @staticmethod
    def forward(x, weight, values, offs, masks, transposed, product):
        return product(x, weight, offs=offs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, values, offs, ctx.masks, ctx.transposed, ctx.product = inputs
        ctx.values_dtype = values.dtype
        x, weight = x if ctx.needs_input_grad[2] else None, weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, weight, offs, None if weight is None else values)

    @staticmethod
    @_first_derivative_only("the product with the weights of experts")
    def backward(ctx, grad_output):
        x, weight, offs, _ = ctx.saved_tensors
        grad_output, d_x, d_values = grad_output.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            d_x = ctx.product(grad_output, weight.mT, offs=offs)
        if ctx.needs_input_grad[2]:
            rows, columns = (grad_output, x.contiguous()) if ctx.transposed else (x.contiguous(), grad_output)
            d_values = _gradient_of_experts(rows, columns, offs.tolist(), ctx.masks, ctx.values_dtype)
        return d_x, None, d_values, None, None, None, None


class _GatherGradient(torch.autograd.Function):
    @staticmethod
    def forward(dense, values, crow_indices, col_indices):
        return dense.view_as(dense)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, values, crow_indices, col_indices = inputs
        ctx.dtype = values.dtype
        ctx.save_for_backward(crow_indices, col_indices)

    @staticmethod
    @_first_derivative_only("a masked parameter")
    def backward(ctx, grad_output):
        crow_indices, col_indices = ctx.saved_tensors
        if not torch.compiler.is_compiling() and grad_output.layout != torch.strided:  # of EmbeddingBag(sparse=True)
            grad_output = grad_output.to_dense()
        compact = torch.ops.deftx.csr_gather([grad_output.contiguous()], crow_indices, col_indices)
        return None, compact.to(ctx.dtype), None, None


class _ScatteredCopy(torch.autograd.Function):
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


# ---- what the masked modules call ----
def masked_linear_unchecked(
    x: Tensor,  # [..., n]
    weight: Tensor,  # [m, n]; [n, m] where transposed
    values: Tensor,  # [nnz]
    mask: CSRMask,
    bias: Tensor | None,  # [m]
    bias_values: Tensor | None = None,  # compact; where given, they get the bias's gradient
    bias_mask: CSRMask | None = None,
    *,
    transposed: bool = False,  # transformers' Conv1D
) -> Tensor:
    if not torch.is_grad_enabled():
        return F.linear(x, weight.mT if transposed else weight, bias)
    dtype = autocast_dtype(x)
    if dtype and weight.dtype != torch.float64:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    else:
        dtype = None
    if bias_values is not None and bias is not None:
        bias = bias.detach()
    bias_crow, bias_col = (None, None) if bias_mask is None else (bias_mask.crow_indices, bias_mask.col_indices)
    mask_and_bias = mask.crow_indices, mask.col_indices, bias, bias_values, bias_crow, bias_col
    return _apply(_MaskedMatmul, x, weight.detach(), values, *mask_and_bias, transposed, dtype)


def masked_embedding_unchecked(
    ids: Tensor, weight: Tensor, values: Tensor, mask: CSRMask, padding_idx: int | None
) -> Tensor:
    if not torch.is_grad_enabled():
        return F.embedding(ids, weight)
    padding_idx = -1 if padding_idx is None else padding_idx
    return _apply(_MaskedEmbedding, ids, weight.detach(), values, mask.crow_indices, mask.col_indices, padding_idx)


def masked_bmm_unchecked(
    x: Tensor,  # [s, tokens, n]; [s, n, tokens] where weight_first
    weight: Tensor,  # [s, n, m]; [s, m, n] where weight_first
    values: Tensor,  # [nnz]
    experts: Tensor | None,  # int [s]: whose matrices the weight consists of; None: those of all, in order
    masks: Sequence[CSRMask],  # [experts]
    *,
    weight_first: bool,
    transposed: bool,  # the matrices are the transposed of those that the masks are of
) -> Tensor:
    dtype = autocast_dtype(x) if weight.dtype != torch.float64 else None
    x = x if dtype is None else x.to(dtype)
    return _apply(_MaskedBmm, x, weight.detach(), values, experts, masks, weight_first, transposed, dtype)


def masked_grouped_mm_unchecked(
    x: Tensor,  # [tokens, n]
    weight: Tensor,  # [experts, n, m]
    values: Tensor,  # [nnz]
    offs: Tensor,  # int32 [experts]
    masks: Sequence[CSRMask],  # [experts]
    product: Callable[..., Tensor],  # torch's grouped_mm, or a function with the same arguments
    *,
    transposed: bool,
) -> Tensor:
    return _apply(_MaskedGroupedMm, x, weight.detach(), values, offs, masks, transposed, product)


def gather_gradient(dense: Tensor, values: Tensor, mask: CSRMask) -> Tensor:
    """The dense tensor; in backward, the mask's entries of its gradient become the gradient of `values` [nnz]."""
    if not torch.is_grad_enabled():
        return dense
    return _apply(_GatherGradient, dense.detach(), values, mask.crow_indices, mask.col_indices)


def raise_in_backward(dense: Tensor, values: Tensor, message: str) -> Tensor:
    """The dense tensor; a backward through it raises RuntimeError."""
    return _apply(_RaiseInBackward, message, 1, values, dense.detach())[0]


def scattered_copy(dense: Tensor, values: Tensor, mask: CSRMask) -> Tensor:
    """A copy of the dense tensor with `values` [nnz] at the mask's entries, without gradient."""
    return _apply(_ScatteredCopy, dense.detach(), values, mask.crow_indices, mask.col_indices)


# ---- public functions ----
def _check_masked(
    input: Tensor, argument: str, weight: Tensor, values: Tensor, mask: CSRMask, bias: Tensor | None = None
) -> None:
    for label, tensor in (("weight", weight), ("values", values), ("bias", bias)):
        if tensor is not None:
            check_float(tensor, label)
    if len(mask.names) != 1 or mask.shapes[0] != weight.shape or weight.dim() != 2:
        covered = [list(s) for s in mask.shapes]
        raise ValueError(f"mask must cover one tensor of weight's shape {list(weight.shape)}, it covers {covered}")
    mask.check_compact(values, "values")
    if weight.device != mask.device:
        raise ValueError(f"weight is on {weight.device}, the mask on {mask.device}: move one with .to()")
    for label, tensor in ((argument, input), ("bias", bias)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{label} is on {tensor.device}, weight on {weight.device}: move one with .to()")
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for label, saved, other in ((argument, input, values), ("weight", weight, input), ("values", values, input)):
        if saved.is_inference() and other.requires_grad:
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

    Forward reads the dense `weight`, which must hold `values` at the mask's entries, and does not copy it. Backward
    computes the gradients of `values` (compact, in their dtype), `x` and `bias`, but no dense weight gradient.
    Under autocast, backward uses the dtypes of forward. Gradients cannot be differentiated again.

    Args:
        x: floating point [..., n], of the weight's dtype (under autocast, any but float64).
        weight: float32, float64, float16 or bfloat16 [m, n].
        values: floating point [nnz]; float32 is recommended for a 16-bit weight.
        mask: of one [m, n] tensor.
        bias: [m].

    Returns:
        [..., m], of the dtype that `torch.nn.functional.linear` gives.

    Raises:
        ValueError: `mask` is not the mask of one tensor of `weight`'s shape, `values` is not compact [nnz], the devices
            differ, or backward would need a tensor that was made in inference_mode.
        TypeError: `x`, `weight`, `values` or `bias` is not a dense floating-point tensor.
        RuntimeError: from `torch.nn.functional.linear`: dtypes or shapes do not match.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> mask = CSRMask.from_dense({"weight": torch.tensor([[True, False], [False, True]])})
        >>> values = mask.gather({"weight": weight}).requires_grad_()
        >>> masked_linear(torch.tensor([[1.0, 10.0]]), weight, values, mask).sum().backward()
        >>> values.grad
        tensor([ 1., 10.])
    """
    check_plain(x, "x")
    _check_masked(x, "x", weight, values, mask, bias)
    return masked_linear_unchecked(x, weight, values, mask, bias)


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
        padding_idx: the masked entries of this row receive no gradient; negative numbers count from the end.

    Returns:
        [..., d], of the weight's dtype, also under autocast.

    Raises:
        ValueError, TypeError: as `masked_linear`; `ids` is not an integer tensor; `padding_idx` is out of range.
        IndexError: from `torch.nn.functional.embedding`: ids are out of range.

    Example:
        >>> weight = torch.zeros(3, 2)
        >>> mask = CSRMask.from_dense({"weight": torch.tensor([[1, 0], [0, 0], [1, 1]]).bool()})
        >>> values = mask.gather({"weight": weight}).requires_grad_()
        >>> masked_embedding(torch.tensor([2, 2, 0]), weight, values, mask).sum().backward()
        >>> values.grad
        tensor([1., 2., 2.])
    """
    check_plain(ids, "ids")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    _check_masked(ids, "ids", weight, values, mask)
    if padding_idx is not None:
        if not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise ValueError(f"padding_idx must be within the {weight.shape[0]} rows of weight, got {padding_idx}")
        padding_idx %= weight.shape[0]
    return masked_embedding_unchecked(ids, weight, values, mask, padding_idx)
