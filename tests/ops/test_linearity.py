"""Calls grow linearly with the number of tensors, of which a mixture of experts has thousands: counted, not timed."""

import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deftx_kernels import CSRMask, SparseAdamW, SparseDelta, compose, densify, interop, select_mask, sparsify, topk_mask
from deftx_kernels.ops import reference
from deftx_kernels.select import low_rank_mask

FEW, MANY = 20, 160  # tensors


class CallCounter(TorchDispatchMode):
    """Counts, while it is entered, torch's operators, calls of functions, and comparisons of names."""

    def __enter__(self):
        self.count = 0
        Name.counter = self
        sys.setprofile(self._called)
        return super().__enter__()

    def __exit__(self, *error):
        sys.setprofile(None)
        Name.counter = None
        return super().__exit__(*error)

    def _called(self, frame, event, argument):
        self.count += event in ("call", "c_call")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class Name(str):
    """A tensor's name whose comparisons are counted: a search in a tuple makes no calls otherwise."""

    counter: CallCounter | None = None
    __hash__ = str.__hash__

    def __eq__(self, other):
        if Name.counter is not None:
            Name.counter.count += 1
        return str.__eq__(self, other)


class Case:
    """n small tensors, two masks over them, and one over half of them."""

    def __init__(self, n):
        generator = torch.Generator().manual_seed(0)
        names = [Name(f"experts.{i:05d}.weight") for i in range(n)]
        self.base = {name: torch.randn(4, 3, generator=generator) for name in names}
        self.tuned = {name: t + 1 for name, t in self.base.items()}
        self.mixed = {name: t.bfloat16() if i % 2 else t for i, (name, t) in enumerate(self.base.items())}
        self.mask, self.other = topk_mask(self.base, density=0.3), topk_mask(self.base, density=0.5, scope="tensor")
        self.half = topk_mask({name: self.base[name] for name in names[::2]}, density=0.3)
        assert all(isinstance(name, Name) for name in self.mask.names)
        self.values = torch.ones(self.mask.nnz)

    def optimizer(self, groups=1):
        params = [(name, nn.Parameter(t.clone())) for name, t in self.base.items()]
        for _, p in params:
            p.grad = torch.ones_like(p)
        each = len(params) // groups
        return SparseAdamW(
            [{"params": params[i : i + each]} for i in range(0, len(params), each)], self.mask, decay_to=self.values
        )


def for_each_name(case, function):
    return [function(name) for name in case.mask.names]


def step_in_part(case):
    optimizer = case.optimizer()
    next(iter(optimizer.param_groups[0]["params"])).grad = None
    optimizer.step()
    optimizer.step()


def resumed(case):
    optimizer = case.optimizer()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    optimizer.update_mask(case.other & case.mask)
    optimizer.step()


def model_there_and_back(case):
    model = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(t.clone()) for name, t in case.base.items()})
    with pytest.warns(UserWarning, match="masked tensors belong to no"):
        sparsify(model, topk_mask({n: p.detach() for n, p in model.named_parameters()}, density=0.3))
    densify(model)


def delta_there_and_back(case):
    delta = SparseDelta.from_models(case.tuned, case.base)
    compose(delta, SparseDelta(case.mask, case.values))
    with delta.applied({n: t.clone() for n, t in case.base.items()}):
        pass
    SparseDelta.from_models(case.tuned, case.base, mask=delta.mask)


CASES = {
    "mask[name]": lambda c: for_each_name(c, lambda n: c.mask[n]),
    "name in mask": lambda c: for_each_name(c, lambda n: n in c.mask),
    "part": lambda c: for_each_name(c, lambda n: c.mask.part(n, c.values)),
    "sparse_csr": lambda c: for_each_name(c, lambda n: c.mask.sparse_csr(n, c.values)),
    "to_scipy_csr": lambda c: for_each_name(c, lambda n: interop.to_scipy_csr(c.mask, n, c.values)),
    "construction": lambda c: CSRMask(c.mask.names, c.mask.shapes, c.mask.crow_indices, c.mask.col_indices),
    "restrict": lambda c: c.mask.restrict(c.mask.names[::2]),
    "split, summary, fingerprint": lambda c: (c.mask.split(c.values), c.mask.summary(), c.mask.fingerprint()),
    "gather": lambda c: c.mask.gather(c.mixed),
    "square_sum": lambda c: c.mask.square_sum(c.mixed),
    "scatter_": lambda c: c.mask.scatter_(c.mixed, c.values),
    "add_": lambda c: c.mask.add_(c.mixed, c.values),
    "set operations": lambda c: (c.mask & c.other, c.mask | c.half, c.half - c.mask),
    "project": lambda c: (c.mask.project(c.values, c.other), c.mask.project(c.values, c.half)),
    "topk_mask": lambda c: [topk_mask(c.base, density=0.2, scope=scope) for scope in ("global", "tensor", "row")],
    "select_mask": lambda c: [
        select_mask(c.tuned, c.base, density=d, rank=1, scope=s)
        for d, s in ((0.1, "global"), (0.5, "global"), (0.1, "tensor"), (0.1, "row"))
    ],
    "low_rank_mask": lambda c: low_rank_mask(c.base, rank=1, density=0.1),
    "optimizer": resumed,
    "optimizer, without some gradients": step_in_part,
    "optimizer, a group for each 5 parameters": lambda c: c.optimizer(groups=len(c.base) // 5).step(),
    "delta": delta_there_and_back,
    "sparsify and densify": model_there_and_back,
}


@pytest.mark.parametrize("name", CASES)
def test_calls_are_linear(name):
    if name == "to_scipy_csr":
        pytest.importorskip("scipy")
    counts = []
    for n in (FEW, MANY):
        case = Case(n)
        CASES[name](case)  # what is made once
        case = Case(n)
        with CallCounter() as counter:
            CASES[name](case)
        counts.append(counter.count)
    assert 0 < counts[1] <= 1.5 * MANY / FEW * counts[0], counts


def test_a_search_among_the_names_is_seen():
    """What the tests above count grows with the square where each name is looked for among all."""
    counts = []
    for n in (FEW, MANY):
        case = Case(n)
        with CallCounter() as counter:
            [case.mask.names.index(Name(name)) for name in case.mask.names]
        counts.append(counter.count)
    assert counts[1] > 4 * MANY / FEW * counts[0]


def test_the_reference_needs_one_histogram_for_many_scores():
    """65,536 bins for each of 20,000 tensors would be 10 GB."""
    scores = [torch.ones(2) for _ in range(50)]

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    with Largest() as largest:
        counts = reference.magnitude_histogram(scores, 0, 16)
        reference.kth_magnitude(lambda: scores, 30)
    assert int(counts.sum()) == 100
    assert largest.numel == 1 << 16
