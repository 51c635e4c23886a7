"""Unusual tensors, and modes of torch that are active during a call: the right result, or an error that names them."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from deftx_kernels import (
    CSRMask,
    SparseAdamW,
    SparseDelta,
    compose,
    densify,
    eigh,
    eigvalsh,
    masked_embedding,
    masked_linear,
    select_mask,
    sparse_adamw,
    sparsify,
    svd_denoise,
    topk_mask,
    truncated_svd,
)
from deftx_kernels.select import low_rank_mask

pytestmark = pytest.mark.usefixtures("one_thread")

W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
MASK = topk_mask({"w": W}, k=7)
ONES = torch.ones(7)


@pytest.fixture(scope="module")
def mesh():
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def distributed(t, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(t, mesh, [Shard(0)])


# Kind -> a tensor of that kind with the values of another one.
KINDS = {
    "DTensor": distributed,
    "nested": lambda t, _: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t, _: torch.nested.nested_tensor([t.reshape(1, -1), t.reshape(1, -1)], layout=torch.jagged),
    "sparse": lambda t, _: t.to_sparse(),
    "quantized": lambda t, _: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "meta": lambda t, _: t.to("meta"),
    "no tensor": lambda t, _: t.numpy(),
}
NOT_FLOATING = {"complex": lambda t, _: t.to(torch.complex64), "float8": lambda t, _: t.to(torch.float8_e4m3fn)}


def adamw(**given):
    """One step, with some arguments replaced."""
    arguments = dict(params={"w": W.clone()}, grads={"w": W}, exp_avg=ONES.clone(), exp_avg_sq=ONES.clone(), step=1)
    arguments |= dict(mask=MASK, lr=0.1) | given
    sparse_adamw(**arguments)
    return arguments["params"]["w"]


# A function of a tensor; the tensor from which the unusual one is made, and the name in the function's errors.
FLOATING = {
    "topk_mask": (W, lambda t: topk_mask({"w": t}, k=7), "scores['w']"),
    "topk_mask, one tensor": (W, lambda t: topk_mask(t, density=0.5, scope="row"), "scores"),
    "select_mask, tuned": (W, lambda t: select_mask({"w": t}, {"w": W}, k=7, names=["w"]), "tuned['w']"),
    "select_mask, base": (W, lambda t: select_mask({"w": W}, {"w": t}, k=7, rank=1, names=["w"]), "base['w']"),
    "low_rank_mask": (W, lambda t: low_rank_mask({"w": t}, k=7, rank=1), "weights['w']"),
    "svd_denoise": (W, lambda t: svd_denoise([W, t], energy=0.9), "delta[1]"),
    "truncated_svd": (W, lambda t: truncated_svd(t, 2), "a "),
    "eigh": (W[:4], eigh, "a "),
    "eigvalsh": (W[:4], eigvalsh, "a "),
    "square_sum": (W, lambda t: MASK.square_sum({"w": t}), "tensors['w']"),
    "add_": (W, lambda t: MASK.add_({"w": t}, ONES), "tensors['w']"),
    "masked_linear, weight": (W, lambda t: masked_linear(torch.ones(2, 4), t, ONES, MASK), "weight"),
    "masked_linear, values": (ONES, lambda t: masked_linear(torch.ones(2, 4), W, t, MASK), "values"),
    "masked_linear, bias": (torch.ones(6), lambda t: masked_linear(torch.ones(2, 4), W, ONES, MASK, t), "bias"),
    "masked_embedding, weight": (W, lambda t: masked_embedding(torch.tensor([1]), t, ONES, MASK), "weight"),
    "masked_embedding, values": (ONES, lambda t: masked_embedding(torch.tensor([1]), W, t, MASK), "values"),
    "sparse_adamw, params": (W, lambda t: adamw(params={"w": t}), "params['w']"),
    "sparse_adamw, grads": (W, lambda t: adamw(grads={"w": t}), "grads['w']"),
    "sparse_adamw, compact grads": (ONES, lambda t: adamw(grads=t), "grads"),
    "sparse_adamw, exp_avg": (ONES, lambda t: adamw(exp_avg=t), "exp_avg"),
    "sparse_adamw, values": (ONES, lambda t: adamw(values=t), "values"),
    "sparse_adamw, decay_to": (ONES, lambda t: adamw(decay_to=t), "decay_to"),
}
OTHERS = {
    "from_dense": (W > 0, lambda t: CSRMask.from_dense({"v": W > 0, "w": t}), "dense['w']"),
    "CSRMask": (MASK.crow_indices, lambda t: CSRMask(["w"], [[6, 4]], t, MASK.col_indices), "crow_indices"),
    "gather": (W, lambda t: MASK.gather({"w": t}), "tensors['w']"),
    "scatter_": (W, lambda t: MASK.scatter_({"w": t}, ONES), "tensors['w']"),
    "scatter_, compact": (ONES, lambda t: MASK.scatter_({"w": W.clone()}, t), "compact"),
    "split": (ONES, lambda t: MASK.split(t), "compact"),
    "masked_linear, x": (torch.ones(2, 4), lambda t: masked_linear(t, W, ONES, MASK), "x "),
    "masked_embedding, ids": (torch.ones(2, dtype=torch.int64), lambda t: masked_embedding(t, W, ONES, MASK), "ids"),
}


CASES = [(call, kind) for call in FLOATING | OTHERS for kind in (KINDS if call in OTHERS else KINDS | NOT_FLOATING)]


@pytest.mark.parametrize(("call", "kind"), CASES)
def test_an_unusual_tensor_is_named(call, kind, request):
    source, function, name = (FLOATING | OTHERS)[call]
    mesh = request.getfixturevalue("mesh") if kind == "DTensor" else None
    tensor = (KINDS | NOT_FLOATING)[kind](source.clone(), mesh)
    with pytest.raises((TypeError, ValueError)) as found:
        function(tensor)
    assert str(found.value).startswith(name), found.value


@pytest.mark.parametrize("kind", [k for k in KINDS | NOT_FLOATING if k not in ("no tensor", "quantized")])
def test_an_unusual_parameter_is_named(kind, request):
    mesh = request.getfixturevalue("mesh") if kind == "DTensor" else None
    model = nn.Module()
    model.w = nn.Parameter((KINDS | NOT_FLOATING)[kind](W.clone(), mesh))
    if kind != "meta":  # whose weights are loaded later
        with pytest.raises((TypeError, ValueError), match=r"^model\['w'\]"):
            sparsify(model, MASK)
    assert type(model) is nn.Module

    def first_step():
        optimizer = SparseAdamW(model.named_parameters(), MASK)
        model.w.grad = model.w.detach().clone()
        optimizer.step()

    if kind == "DTensor":  # which only the optimizer trains
        first_step()
        return
    with pytest.raises((TypeError, ValueError), match=r"^(named_)?params\['w'\]"):
        first_step()


@pytest.mark.parametrize("name", ["step", "lr", "grad_scale", "found_inf"])
def test_an_unusual_scalar_is_named(name, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    one = torch.tensor(1.0)
    bad = [one.to("meta"), one.to(torch.complex64), one.bfloat16(), one.expand(2), one.to_sparse(), one.bool()]
    for tensor in [*bad, distribute_tensor(one, mesh, [Replicate()])]:
        with pytest.raises((TypeError, ValueError), match=f"^{name} "):
            adamw(**{name: tensor})


def test_tensors_that_cannot_be_written_raise_before_any_write(mesh):
    both = topk_mask({"a": W, "b": -W}, k=20)
    moments = [torch.zeros(20) for _ in range(2)]
    for bad, message in (
        (torch._neg_view(torch.ones(6, 4)), r"\['b'\] is a view that negates"),
        (torch.ones(1, 4).expand(6, 4), r"elements of \w+\['b'\] share memory"),
        (distributed(torch.ones(6, 4), mesh), r"\['b'\] must be a plain tensor, got a DTensor: take its to_local\(\)"),
    ):
        first = W.clone()
        for call in (
            lambda t: both.scatter_(t, torch.zeros(20)),
            lambda t: both.add_(t, torch.ones(20)),
            lambda t: sparse_adamw(t, torch.ones(20), *moments, 1, both, lr=0.1),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                call({"a": first, "b": bad})
        assert torch.equal(first, W)
        assert not moments[0].any()
    model = nn.Linear(4, 6)
    model.weight = nn.Parameter(torch.ones(1, 4).expand(6, 4))
    with pytest.raises(ValueError, match=r"elements of model\['weight'\] share memory"):
        sparsify(model, topk_mask({"weight": W}, k=7))
    block, first = torch.zeros(8, 4), W.clone()
    with pytest.raises(ValueError, match=r"tensors\['a'\] and tensors\['b'\] share memory"):
        both.scatter_({"a": block[:6], "b": block[2:]}, torch.ones(20))
    with pytest.raises(ValueError, match=r"params\['a'\] and params\['b'\] share memory"):
        sparse_adamw({"a": first, "b": first}, torch.ones(20), *moments, 1, both, lr=0.1)
    with pytest.raises(ValueError, match="exp_avg and exp_avg_sq share memory"):
        adamw(exp_avg=ONES, exp_avg_sq=ONES)
    assert not block.any()
    assert torch.equal(first, W)
    assert torch.equal(ONES, torch.ones(7))
    columns = torch.zeros(6, 8)  # interleaved, but apart
    both.scatter_({"a": columns[:, ::2], "b": columns[:, 1::2]}, torch.ones(20))
    assert columns.sum() == 20


def test_tracers_and_transforms_are_named():
    fake = FakeTensorMode().from_tensor(W)
    for call, message in (
        (lambda: topk_mask({"w": fake}, k=7), r"scores\['w'\] is being traced"),
        (
            lambda: torch.vmap(lambda x: svd_denoise(x, rank=1))(torch.randn(3, 6, 4)),
            r"delta is batched by torch\.vmap",
        ),
        (
            lambda: torch.vmap(lambda x: topk_mask(x, k=2).nnz * x)(torch.randn(3, 6, 4)),
            r"scores\['tensor'\] is batched by torch\.vmap",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    chosen = []
    # values are there: they can be chosen from
    torch.func.grad(lambda x: (chosen.append(topk_mask(x, k=7)), x.sum())[1])(W)
    assert chosen[0] == topk_mask(W, k=7)


def test_subclasses_that_hold_their_own_elements_are_taken():
    class Named(torch.Tensor):
        pass

    named = W.clone().as_subclass(Named)
    assert topk_mask({"w": named}, k=7) == MASK
    MASK.scatter_({"w": named}, torch.zeros(7))
    assert not MASK.gather({"w": named}).any()


# ---- inference_mode ----
def inference(function):
    return torch.inference_mode()(function)()


CHOICES = {
    "topk_mask": lambda: topk_mask({"w": W}, k=7),
    "select_mask": lambda: select_mask({"w": W}, {"w": W * 0}, k=7, rank=4),
    "low_rank_mask": lambda: low_rank_mask({"w": W}, k=7, rank=4),
    "from_dense": lambda: CSRMask.from_dense(MASK.to_dense()),
    "CSRMask": lambda: CSRMask(MASK.names, MASK.shapes, MASK.crow_indices.clone(), MASK.col_indices.clone()),
    "[]": lambda: (MASK | CSRMask.from_dense({"v": W > 0}))["w"],
    "|": lambda: MASK | MASK,
    "restrict": lambda: MASK.restrict(["w"]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_mask_chosen_under_inference_mode_can_be_trained_with(choice):
    mask = inference(CHOICES[choice])
    assert mask == MASK or choice in ("select_mask", "low_rank_mask")
    values = mask.gather({"w": W}).requires_grad_()
    x = torch.ones(2, 4, requires_grad=True)
    masked_linear(x, W, values, mask).sum().backward()
    assert torch.equal(values.grad, torch.full((7,), 2.0))
    assert x.grad is not None


def test_a_model_is_sparsified_under_inference_mode():
    model, mask = nn.Linear(4, 6, bias=False), topk_mask({"weight": W}, k=7)
    inference(lambda: sparsify(model, mask))
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert torch.equal(model.values.grad, torch.full((7,), 2.0))
    with pytest.raises(ValueError, match=r"model\['weight'\] was made in inference_mode"):
        sparsify(inference(lambda: nn.Linear(4, 6)), mask)


def test_inference_tensors_are_taken_where_torch_takes_them():
    made = inference(W.clone)
    weight = inference(lambda: W.clone())
    assert topk_mask({"w": made}, k=7) == inference(lambda: topk_mask({"w": made}, k=7)) == MASK
    assert torch.equal(adamw(params={"w": weight}, grads={"w": made}), adamw())
    inference(lambda: adamw(params={"w": weight}, exp_avg=inference(ONES.clone)))
    values, x = ONES.clone().requires_grad_(), torch.ones(2, 4, requires_grad=True)
    masked_linear(x.detach(), made, values, MASK).sum().backward()  # backward does not need the weight
    assert torch.equal(values.grad, torch.full((7,), 2.0))
    for name, call in {
        "x": lambda: masked_linear(inference(x.clone), W, values, MASK),
        "weight": lambda: masked_linear(x, made, values, MASK),
        "ids": lambda: masked_embedding(inference(lambda: torch.tensor([1])), W, values, MASK),
    }.items():
        with pytest.raises(ValueError, match=f"{name} was made in inference_mode"):
            call()
    with torch.no_grad():
        assert torch.equal(masked_linear(inference(x.clone), made, values, MASK), nn.functional.linear(x, W))


# ---- defaults of torch ----
@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
BIG = torch.randn(80, 70, generator=torch.Generator().manual_seed(1))
BASE = {"b": BIG * 0.9, "w": W[:, :3].clone()}
TUNED = {"b": BIG, "w": W[:, 1:].clone()}
X = torch.ones(3, 4)


def trained():
    model = nn.Linear(4, 6, bias=False, device="cpu", dtype=torch.float32)
    model.weight.data.copy_(W)
    mask = topk_mask({"weight": W}, k=7)
    sparsify(model, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    return densify(model).weight.detach()


def trained_dense():
    weight = nn.Parameter(W.clone())
    first, second = topk_mask({"w": W}, k=7), topk_mask({"w": -W.flip(0)}, k=9)
    optimizer = SparseAdamW([("w", weight)], first, lr=0.1, l1=0.1, decay_to=first.gather({"w": W}))
    weight.grad = W.clone()
    optimizer.step()
    optimizer.update_mask(second)
    optimizer.step()
    return weight.detach()


def composed():
    delta = SparseDelta.from_models(TUNED, BASE)
    model = {n: t.clone() for n, t in BASE.items()}
    compose(delta, delta).apply_(model, strict=False)
    return list(model.values())


def combined():
    other = topk_mask({"w": -W.flip(0), "v": W[0]}, k=9)
    both, values = MASK | other, MASK.gather({"w": W})
    return [
        MASK.project(values, both),
        both.crow_indices,
        (both - other).crow_indices,
        (both & MASK).to_dense()["w"],
        MASK.sparse_csr("w", values).to_dense(),
        other.restrict(["w"]).crow_indices,
        MASK.square_sum({"w": W}),
        CSRMask(MASK.names, MASK.shapes, MASK.crow_indices, MASK.col_indices).crow_indices,
    ]


def gradients():
    values = ONES.clone().requires_grad_()
    (masked_linear(X, W, values, MASK, W[:, 0]).square().sum()).backward()
    masked_embedding(torch.tensor([[1, 2], [1, 0]], device="cpu"), W, values, MASK, 0).square().sum().backward()
    return values.grad


RUNS = {
    "topk_mask": lambda: topk_mask(TUNED, density=0.1, scope="row"),
    "select_mask": lambda: select_mask(TUNED, BASE, k=50),
    "select_mask, rank": lambda: select_mask(TUNED, BASE, density=0.3, rank=2),
    "select_mask, residual": lambda: select_mask(TUNED, BASE, k=50, rank=2, residual_density=0.1),
    "select_mask, Gavish-Donoho": lambda: select_mask(TUNED, BASE, k=50, rank="gavish-donoho"),
    "low_rank_mask": lambda: low_rank_mask(TUNED, density=0.2, rank=2),
    "svd_denoise": lambda: svd_denoise(
        [*TUNED.values(), BIG.bfloat16()], energy=0.9, residual_density=0.1, return_info=True
    ),
    "truncated_svd": lambda: truncated_svd(BIG, 2),
    "sparse_adamw": lambda: adamw(),
    "trained": trained,
    "trained_dense": trained_dense,
    "composed": composed,
    "combined": combined,
    "gradients": gradients,
}


def leaves(found):
    """The tensors of a result."""
    if isinstance(found, CSRMask):
        return [found.crow_indices, found.col_indices]
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for part in (found.values() if isinstance(found, dict) else found or ()) for t in leaves(part)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("run", RUNS)
def test_default_device_and_dtype_do_not_matter(run, mode):
    from deftx_kernels.denoise.rule import gavish_donoho_multiple

    expected = leaves(RUNS[run]())
    gavish_donoho_multiple.cache_clear()
    with MODES[mode]():
        got = leaves(RUNS[run]())
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected):
        assert (one.dtype, one.device) == (other.dtype, other.device)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
