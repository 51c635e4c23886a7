"""training_step: one step of fine-tuning (forward, loss, backward, optimizer, gradients freed), ours against baselines.

Models with random weights: classifiers of MiniLM's, BERT base's and XLM-R base's shape, a language model of Llama 3.2
1B's shape, and a stack of linear layers. Every implementation starts from the same weights and trains on one batch,
without dropout. As in `deftx run` the head of a classifier is trained densely, norms are frozen and the mask covers the
rest (of Llama: the linear layers and the embedding, which the output layer shares); the dense baselines train the same
tensors.

- "dense": `torch.optim.AdamW(fused=True)`.
- "dense + mask", LT-SFT: the same, with the gradients outside the mask set to zero before the step (`masked_fill_` with
  the mask's complement as bool tensors: on the CPU a third of the time of a product, and no float copy of the mask).
- "PEFT SHiRA": all linear layers, random masks, of the rank that trains as many values as our mask has; it cannot train
  embeddings.
- "PEFT LoRA": rank 16 at all linear layers. It trains fewer values: a point of reference.

On the CPU the weights are float32, of Llama bfloat16, as language models are fine-tuned. Dense gradients and the
moments of torch's AdamW have the same dtype; our values, their gradients and moments and PEFT's adapters stay float32.
On a GPU all but Llama have float32 weights and autocast: with bfloat16 weights dense AdamW loses small updates. Frozen
weights lose nothing in bfloat16, so ours and LoRA also run so ("bfloat16 weights"). All run eagerly; because the host's
time limits small models, ours, the dense baselines and SHiRA also run as a CUDA graph of the step (`captured_step`).

Peak memory is that of a training run (`Case.training`). An implementation with a mask has its own copy: holding it
counts, making it does not. A footprint counts parameters and buffers (ours: the dense tensors and the compact values;
PEFT: the adapters, too), the gradients just before the optimizer's step, the optimizer's state, and the tensors that
select the trained entries (ours: the CSR indices; "dense + mask": the bool tensors; SHiRA: its indices).
"""

import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import GRAPH, Case, Choice, Workload, available_bytes, too_large, trim, workload
from bench.rows import OURS
from bench.shapes import random_tensors
from bench.step_models import MODELS, TINY, build, make_batch, maskable, on_meta, start_weights_
from deftx_kernels import SparseAdamW, sparsify, topk_mask
from deftx_kernels.integrations import captured_step
from deftx_kernels.integrations.captured import CapturedStep
from deftx_kernels.nn import masked_parameters
from deftx_kernels.train.tensors import gradient_bytes, state_bytes

OPS = {"training_step": "one step of fine-tuning a model: forward, loss, backward, optimizer"}
SIZES = ("tiny", "minilm", "linears", "bert", "xlmr", "llama1b")
# RoBERTa's eps: a gradient that is zero but for rounding changes nothing. Without decay, as in masked training.
SETTINGS: dict[str, Any] = {"lr": 1e-4, "eps": 1e-6, "weight_decay": 0.0}
DENSE, DENSE_MASK = "dense, torch AdamW fused", "dense + mask, torch AdamW fused"
SHIRA, LORA = "PEFT SHiRA", "PEFT LoRA"
LORA_RANK = 16
HEADS = ("classifier", "lm_head")  # linear layers that PEFT leaves unchanged


def workloads(choice: Choice) -> Iterator[Workload]:
    for size in sorted(choice.sizes, key=SIZES.index):
        shape = MODELS[size]
        dtype = torch.bfloat16 if choice.device == "cuda" or shape.family == "llama" else torch.float32
        for setting in choice.settings([(dtype, shape.density)]):
            yield step_workload(size, choice.device, *setting)


def step_workload(name: str, device: str, dtype: torch.dtype, density: float) -> Workload:
    shape = MODELS[name]
    title, of = f"{name}, {shape}", (name, TINY[shape.family])
    return workload(step_case, "training_step", name, (dtype, density), device, title=title, of=of)


# ---- implementations ----
@dataclass
class Run:
    """One implementation's training. A call takes a step and returns this run, for the check."""

    trainers: "Trainers"
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mask: Iterable[Tensor] = ()  # the tensors that select the trained entries
    kind: str = "other"  # which weights change: "dense", "masked"; "other": only the loss is checked
    dtype: torch.dtype | None = None  # of the weights, where it is not the others'
    name: str = ""
    loss: float | Tensor = 0.0  # before the last step
    captured: CapturedStep | None = None  # takes the steps

    def __call__(self) -> "Run":
        if self.captured is not None:
            self.loss = self.captured(self.trainers.batch)
            return self
        loss = self.trainers.loss(self.model, self.trainers.batch)
        loss.backward()
        first = self.name not in self.trainers.footprints
        gradients = gradient_bytes(self.model) if first else 0
        self.optimizer.step()
        if first:
            held = {"weight": bytes_of([*self.model.parameters(), *self.model.buffers()]), "gradient": gradients}
            held |= {"state": state_bytes(self.optimizer), "mask": bytes_of(self.mask)}
            self.trainers.footprints[self.name] = held
        self.optimizer.zero_grad()
        self.loss = loss.detach()
        return self


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Shared memory counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Trainers:
    """The implementations' models and optimizers for one workload."""

    def __init__(self, name: str, dtype: torch.dtype, density: float, device: str) -> None:
        self.shape, self.device, self.density = MODELS[name], device, density
        self.autocast = dtype if device == "cuda" and dtype != torch.float32 else None
        self.dtype = torch.float32 if self.autocast and self.shape.family != "llama" else dtype  # of the weights
        scores = random_tensors(maskable(self.shape), torch.float32, device, seed=1)
        self.mask = topk_mask(scores, density=density)
        self.batch = make_batch(self.shape, self.dtype, device)
        plain = on_meta(self.shape)
        self.names = [n for n, _ in plain.named_parameters()]
        self.numel = sum(p.numel() for p in plain.parameters())
        self.linears = sum(m.weight.numel() for m in plain.modules() if isinstance(m, nn.Linear))
        self.footprints: dict[str, dict[str, int]] = {}

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        clear_shira_cache()
        trim()  # a dropped model may be part of a cycle, and there may be memory for one only
        return build(self.shape, dtype or self.dtype, self.device)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        # No weight is cast twice in a step, and a CUDA graph must not keep its casts.
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            if self.shape.family == "linears":
                return (model(batch["x"]).float() - batch["y"]).square().mean()
            if self.shape.family == "llama":
                return model(**batch).loss
            # In float32: transformers does so for language models, not for classifiers of 16 bits.
            return nn.functional.cross_entropy(model(batch["input_ids"]).logits.float(), batch["labels"])

    def captured(self, name: str, make: Callable[[], Run]) -> Callable[[], Run]:
        """The same with its step as a CUDA graph, captured when it is made; on the CPU, without a graph."""

        def made() -> Run:
            run = make()
            return replace(run, name=name, captured=captured_step(run.model, run.optimizer, self.loss, self.batch))

        return made

    def ours(self, dtype: torch.dtype | None = None, kind: str = "masked") -> Run:
        model, mask = self.model(dtype), copy.deepcopy(self.mask)
        sparsify(model, mask)
        optimizer = SparseAdamW(model.named_parameters(), mask, **SETTINGS)
        masks = [mask, *(record.mask for record in masked_parameters(model).values())]
        indices = [t for m in masks for t in (m.crow_indices, m.col_indices)]
        return Run(self, model, optimizer, indices, kind=kind, dtype=dtype)

    def dense(self, **options: bool) -> Run:
        model = self.model()
        return Run(self, model, fused_adamw(model, **options), kind="dense")

    def dense_mask(self, **options: bool) -> Run:
        run = self.dense(**options)
        dropped = {n: keep.logical_not_() for n, keep in self.mask.to_dense().items()}
        parameters = [run.model.get_parameter(n) for n in dropped]

        def drop(*_: Any) -> None:
            for parameter, others in zip(parameters, dropped.values()):
                parameter.grad.masked_fill_(others, 0.0)

        run.optimizer.register_step_pre_hook(drop)
        return replace(run, mask=dropped.values(), kind="masked")

    def peft(self, method: str, dtype: torch.dtype | None = None, **options: bool) -> Run:
        """SHiRA of about as many values as the mask has, or LoRA."""
        import peft

        torch.sparse.check_sparse_tensor_invariants.disable()  # the default, set explicitly: else SHiRA warns
        model = self.model(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, peft_config(method, self.mask.nnz, model)).train()
        indices = [i for m in model.modules() for i in getattr(m, "shira_indices", {}).values()]
        return Run(self, model, fused_adamw(model, **options), indices, dtype=dtype)


def clear_shira_cache() -> None:
    """PEFT caches every SHiRA layer that has run, for a warning, and so keeps all their weights."""
    layers = sys.modules.get("peft.tuners.shira.layer")
    if warned := getattr(layers, "_warn_once_about_module_hooks", None):
        warned.cache_clear()


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def fused_adamw(model: nn.Module, **options: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, **SETTINGS, **options)


def peft_config(method: str, values: int, model: nn.Module) -> Any:
    """All linear layers but the head: a classifier's is trained densely, a language model's is the embedding."""
    import peft

    task = "CAUSAL_LM" if hasattr(model, "lm_head") else "SEQ_CLS"
    options: dict[str, Any] = {"target_modules": "all-linear", "task_type": task}
    if isinstance(model, nn.Sequential):
        options = {"target_modules": [n for n, _ in model.named_children()]}
    if method == SHIRA:
        return peft.ShiraConfig(r=shira_rank(values, model), random_seed=0, **options)
    return peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, **options)


def shira_rank(values: int, model: nn.Module) -> int:
    """SHiRA trains r * (m + n) values of a linear layer [m, n]: the r closest to this many in all, at most all."""
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(HEADS)]
    shapes = [(m.out_features, m.in_features) for m in layers]
    return max(1, min(round(values / sum(map(sum, shapes))), *(m * n // (m + n) for m, n in shapes)))


# ---- the case ----
def step_case(name: str, dtype: torch.dtype, density: float, device: str) -> Case:
    shape = MODELS[name]
    if shape.family != "linears" and not has("transformers"):
        return Case(0, {}, lambda run: None, absent={OURS: "transformers is not installed"})
    trainers = Trainers(name, dtype, density, device)
    mask = trainers.mask
    shira, lora = partial(trainers.peft, SHIRA), partial(trainers.peft, LORA)
    makers: dict[str, Callable[..., Run]] = {OURS: trainers.ours, DENSE: trainers.dense}
    makers |= {DENSE_MASK: trainers.dense_mask, SHIRA: shira, LORA: lora}
    if trainers.autocast and trainers.dtype != trainers.autocast:
        # From rounded weights: the first loss is compared with that of a dense model with the same rounding.
        makers[f"{OURS}, bfloat16 weights"] = partial(trainers.ours, torch.bfloat16, kind="other")
        makers[f"{LORA}, bfloat16 weights"] = partial(lora, torch.bfloat16)
    implementations: dict[str, Callable] = {n: lambda n=n, m=m: replace(m(), name=n) for n, m in makers.items()}
    if device == "cuda" and not shape.isolated:
        baselines = {n: partial(makers[n], capturable=True) for n in (DENSE, DENSE_MASK, SHIRA)}
        graphs = {f"{n}{GRAPH}": make for n, make in ({OURS: trainers.ours} | baselines).items()}
        implementations |= {n: trainers.captured(n, m) for n, m in graphs.items()}
    else:
        graphs = {}
    absent = too_large(needs(trainers), available_bytes()) if device == "cpu" else {}
    if not has("peft"):
        absent |= {n: "peft is not installed" for n in implementations if n.startswith("PEFT")}
    # Values and moments are read and written, columns read, every weight of a linear layer read once.
    moved = trainers.dtype.itemsize * trainers.linears + mask.nnz * (24 + mask.col_indices.element_size())
    case = Case(moved, implementations, checker(trainers), flops(trainers), absent=absent, training=True)
    case.rounds, case.served_by = shape.rounds if device == "cpu" else 25, "masked_linear_grad"
    case.parameters, case.footprints, case.isolated = trainers.numel, trainers.footprints, shape.isolated
    case.apart = tuple(graphs)
    return case


def flops(trainers: Trainers) -> float:
    """Forward, and as many backward to the activations; of the gradients of weights, those of the mask's entries."""
    shape = trainers.shape
    positions = shape.batch * shape.tokens
    attention = shape.layers * 4 * positions * shape.tokens * shape.width if shape.vocabulary else 0
    if shape.family == "llama":  # each token attends to half of the others
        attention //= 2
    return (2 + trainers.density) * 2 * trainers.linears * positions + 3 * attention


def needs(trainers: Trainers) -> dict[str, float]:
    """Bytes of main memory: those of training, and of the check the dense model, one gradient at a time."""
    weights, nnz = trainers.numel * trainers.dtype.itemsize, trainers.mask.nnz
    # SHiRA keeps each layer's sum for the backward pass.
    training = {OURS: weights + 18 * nnz, DENSE: 4 * weights, DENSE_MASK: 4 * weights + trainers.numel}
    training |= {SHIRA: 2 * weights + 24 * nnz, LORA: weights}
    return {name: size + 1.5 * weights for name, size in training.items()}


# ---- the check ----
@dataclass
class Truth:
    """The dense model's first loss and gradients."""

    loss: float
    # float32: at the mask's entries [nnz of the tensor]; of a trained tensor outside the mask, all of it
    gradients: dict[str, Tensor]
    outside: dict[str, float]  # the largest gradient outside the mask


def truth(trainers: Trainers) -> Truth:
    """One backward pass of the dense model that holds one dense gradient at a time."""
    model, mask = trainers.model(), trainers.mask
    found = Truth(0.0, {}, {})

    def keep(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if name in mask:
            part = mask[name]
            found.gradients[name] = part.gather({name: gradient}).float()
            part.scatter_({name: gradient}, torch.zeros_like(found.gradients[name]))
        else:
            found.gradients[name] = gradient.float()
        found.outside[name] = float(torch.linalg.vector_norm(gradient, torch.inf))

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(keep, name))
    loss = trainers.loss(model, trainers.batch)
    loss.backward()
    found.loss = float(loss.detach())
    return found


def wrong_update(run: Run, found: Truth, tolerance: float) -> str | None:
    """How a first step differs from AdamW's."""
    after, mask = dict(run.model.named_parameters()), run.trainers.mask
    values = {n: record.values.detach() for n, record in masked_parameters(run.model).items()}
    for name in run.trainers.names:
        now = after[name].detach()
        before = start_weights_(name, torch.empty_like(now), run.trainers.shape.spread)
        if name not in found.gradients:
            if not torch.equal(now, before):
                return f"{name}, which is frozen, has moved"
            continue
        masked, trained, old = name in mask, now, before
        if masked:
            part = mask[name]
            trained, old = (part.gather({name: t}) for t in (now, before))
            part.scatter_({name: before}, trained)
        unchanged = torch.equal(now, before)  # outside the mask
        if masked and run.kind == "masked" and not unchanged:
            return f"entries of {name} outside the mask have moved"
        if not (masked and run.kind == "masked") and unchanged and found.outside[name] > SETTINGS["eps"]:
            return f"{name} has not moved outside the mask"
        if name in values:  # the trained values, in full precision
            if not torch.equal(values[name].to(now.dtype), trained):
                return f"the entries of {name} are not its compact values"
            trained = values[name]
        off = distance(trained, old, found.gradients[name])
        if not off <= tolerance:
            return f"{name} is {off:.1%} of a step away from AdamW's"
    return None


def distance(after: Tensor, before: Tensor, gradient: Tensor) -> float:
    """Distance from the result of AdamW's first step, relative to that step (at least 1 % of the learning rate)."""
    lr = SETTINGS["lr"]
    step = gradient / (gradient.abs() + SETTINGS["eps"]) * -lr
    error = after.float() - (before.float() + step).to(after.dtype).float()
    length = float(torch.linalg.vector_norm(step)), 0.01 * lr * max(1, step.numel()) ** 0.5
    return float(torch.linalg.vector_norm(error)) / max(length)


def checker(trainers: Trainers) -> Callable[[Any], str | None]:
    exact = trainers.dtype == torch.float32 and not trainers.autocast
    loss_tolerance, tolerance = (1e-5, 0.01) if exact else (5e-3, 0.1)
    start = cache(partial(truth, trainers))

    @cache
    def loss_of(dtype: torch.dtype) -> float:
        with torch.no_grad():
            return float(trainers.loss(trainers.model(dtype), trainers.batch))

    def check(run: Run) -> str | None:
        loss, expected = float(run.loss), loss_of(run.dtype) if run.dtype else start().loss
        if not abs(loss - expected) <= loss_tolerance * expected:
            return f"first loss {loss}, of the dense model {expected}"
        if run.kind != "other":
            return wrong_update(run, start(), tolerance)
        for _ in range(1 if exact else 4):  # bfloat16 hides a small step
            later = float(run().loss)
            if later < (1 - loss_tolerance) * loss:
                break
        return None if later < loss else f"first loss {loss}, some steps later {later}"

    return check
