"""The whole public path on each device, against the same path on the CPU: selection, training, deltas."""

import copy

import pytest
import torch
from torch import nn

import deftx_kernels as dk

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on(tensors, device):
    return {n: t.to(device) for n, t in tensors.items()}


def scores(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (300, 70), "b": (501,), "c": (3, 40, 5), "d": (), "e": (0, 4), "wide": (2, 70_000)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_topk_mask_is_the_same_on_every_device(device, dtype, scope):
    for tied in (False, True):
        x = {n: (t * 2).round() if tied else t for n, t in scores(dtype).items()}
        assert dk.topk_mask(on(x, device), density=0.07, scope=scope).to("cpu") == dk.topk_mask(
            x, density=0.07, scope=scope
        )
    bad = on(scores(dtype), device)
    bad["c"][1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"scores\['c'\] holds nan at flat index 213"):
        dk.topk_mask(bad, k=5, scope="global")


@pytest.mark.parametrize("device", DEVICES)
def test_mask_operations(device):
    one, two = dk.topk_mask(scores(), density=0.1), dk.topk_mask(scores(seed=1), density=0.1)
    x, y = one.to(device), two.to(device)
    for a, b in ((x & y, one & two), (x | y, one | two), (x - y, one - two)):
        assert a.to("cpu") == b
        assert a.fingerprint() == b.fingerprint()
    tensors = on(scores(), device)
    compact = x.gather(tensors)
    assert torch.equal(compact.cpu(), one.gather(scores()))
    assert torch.equal(x.project(compact, y).cpu(), one.project(compact.cpu(), two))
    x.add_(tensors, compact, alpha=-1.0)
    assert not x.gather(tensors).any()
    assert dk.CSRMask.from_dense(x.to_dense()).to("cpu") == one


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "rule", [{}, {"energy": 0.9}, {"rank": 3}, {"rank": "gavish-donoho", "residual_density": 0.01}]
)
def test_denoising_and_selection(device, rule):
    generator = torch.Generator().manual_seed(3)
    base = {"w": torch.randn(60, 40, generator=generator), "v": torch.randn(64, generator=generator)}
    delta = torch.randn(60, 3, generator=generator) @ torch.randn(3, 40, generator=generator)
    tuned = {"w": base["w"] + delta + 0.01 * torch.randn(60, 40, generator=generator), "v": base["v"] * 1.1}
    got = dk.select_mask(on(tuned, device), on(base, device), density=0.1, **rule)
    want = dk.select_mask(tuned, base, density=0.1, **rule)
    assert got.device.type == device
    assert (got.to("cpu") - want).nnz <= (0 if not rule else 3)  # denoised scores agree up to rounding
    assert dk.select_mask(tuned, on(base, device), density=0.1, **rule) == got  # one model elsewhere
    if rule:
        denoised = dk.svd_denoise(on({"w": delta}, device), **rule)["w"].cpu()
        torch.testing.assert_close(denoised, dk.svd_denoise({"w": delta}, **rule)["w"], atol=1e-3, rtol=1e-3)


def model_and_mask(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 5)
    ).to(dtype)
    covered = {n: p for n, p in model.named_parameters() if not n.startswith("3")}
    return model, dk.topk_mask({n: torch.randn(p.shape) for n, p in covered.items()}, density=0.2)


def train(model, optimizer, device, steps=10):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids, labels = (
            torch.randint(0, 50, (8, 6), generator=generator),
            torch.randint(0, 5, (8, 6), generator=generator),
        )
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids.to(device)).flatten(0, 1).float(), labels.to(device).flatten()).backward()
        optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsified", [False, True])
def test_training(device, dtype, sparsified):
    model, mask = model_and_mask(dtype)
    start = copy.deepcopy(model)
    results = []
    for where in ("cpu", device):
        twin, there = copy.deepcopy(model).to(where), mask.to(where)
        if sparsified:
            dk.sparsify(twin, there)
        train(twin, dk.SparseAdamW(twin.named_parameters(), there, lr=1e-2, weight_decay=0.1), where)
        results.append({n: p.detach().cpu() for n, p in (dk.densify(twin) if sparsified else twin).named_parameters()})
    selected = mask.to_dense()
    for name, parameter in start.named_parameters():
        if name in selected:
            assert torch.equal(results[1][name][~selected[name]], parameter.detach()[~selected[name]]), name
        tolerance = dict(atol=2e-3, rtol=1e-2) if dtype == torch.float32 else dict(atol=3e-2, rtol=0.1)
        torch.testing.assert_close(results[1][name], results[0][name], **tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_sparsified_model_moves_between_devices(device):
    model, mask = model_and_mask()
    dk.sparsify(model, mask)
    model.to(device)
    assert model[1].masks["weight"].device.type == device
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), device, 2)
    assert torch.equal(model[1].masks["weight"].gather({"1.weight": model[1].weight}), model[1].values)


@pytest.mark.parametrize("device", DEVICES)
def test_deltas_move_to_the_model(device, tmp_path):
    base, mask = model_and_mask()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        mask.add_(dict(tuned.named_parameters()), torch.full((mask.nnz,), 0.1))
    dk.SparseDelta.from_models(tuned, base).save_pretrained(tmp_path)
    delta = dk.SparseDelta.from_pretrained(tmp_path)
    there = base.to(device)
    with delta.applied(there):
        for p, q in zip(there.parameters(), tuned.parameters()):
            assert torch.equal(p.cpu(), q)
    on_device = dk.SparseDelta.from_models(tuned.to(device), there)
    assert on_device.mask.to("cpu") == delta.mask
    assert torch.equal(on_device.values.cpu(), delta.values)
    assert on_device.metadata["base_fingerprint"] == delta.metadata["base_fingerprint"]


@pytest.mark.gpu
def test_an_optimizer_step_is_captured_in_a_cuda_graph():
    model, mask = model_and_mask()
    model, mask = model.cuda(), mask.to("cuda")
    eager = copy.deepcopy(model)
    optimizers = [
        dk.SparseAdamW(m.named_parameters(), mask, lr=torch.tensor(1e-2, device="cuda")) for m in (model, eager)
    ]
    generator = torch.Generator().manual_seed(5)
    gradients = [[torch.randn(p.shape, generator=generator).cuda() for p in model.parameters()] for _ in range(4)]
    for p, q, g in zip(model.parameters(), eager.parameters(), gradients[0]):
        p.grad, q.grad = g.clone(), g.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up: builds state and compiles
        optimizers[0].step()
    torch.cuda.current_stream().wait_stream(side)
    optimizers[1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for step in gradients[1:]:
        for p, q, g in zip(model.parameters(), eager.parameters(), step):
            p.grad.copy_(g)
            q.grad.copy_(g)
        graph.replay()
        optimizers[1].step()
    for p, q in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.gpu
def test_what_a_cuda_graph_cannot_hold_is_an_error():
    model, mask = model_and_mask()
    model, scores = model.cuda(), torch.randn(1000, device="cuda")
    lr = torch.tensor(1e-2)
    optimizer = dk.SparseAdamW(model.named_parameters(), mask.to("cuda"), lr=lr)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    dk.topk_mask(scores, k=10)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            torch.ops.deftx.topk_mask([scores], [], [10], 0)
        with pytest.raises(ValueError, match="lr is on the CPU: in a CUDA graph it must be on cuda"):
            optimizer.step()


@pytest.mark.gpu
def test_a_pinned_learning_rate_may_change_after_the_step():
    model, mask = model_and_mask()
    copies = [copy.deepcopy(model).cuda() for _ in range(2)]
    rates = [torch.tensor(1e-2).pin_memory(), torch.tensor(1e-2)]
    for m, lr in zip(copies, rates):
        optimizer = dk.SparseAdamW(m.named_parameters(), mask.to("cuda"), lr=lr)
        for _ in range(3):
            for p in m.parameters():
                p.grad = torch.ones_like(p)
            torch.cuda._sleep(10_000_000)  # the step's kernels wait
            optimizer.step()
            lr.mul_(0.5)
    for p, q in zip(*(m.parameters() for m in copies)):
        assert torch.equal(p, q)
