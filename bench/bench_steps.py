"""training_step: a whole step of fine-tuning (forward, loss, backward, optimizer, gradients freed), ours against the usual ways.

Works: classifiers of MiniLM's and XLM-R base's shape with random weights, and a plain stack of linear layers. Every provider starts
from the same weights and trains on one batch, without dropout. As in `deftx run` the head is trained densely, layer norms are
frozen and the mask covers all the rest; so the dense providers train just the tensors that the mask and the head are of.

- "dense": `torch.optim.AdamW(fused=True)`.
- "dense + mask", LT-SFT's way: the same, with the gradients outside the mask set to zero before the step (`masked_fill_` with the
  mask's complement as bool tensors: on the CPU a third of the time of a product, and no float copy of the mask).
- "PEFT SHiRA": all linear layers, random masks, of the rank that trains as many values as our mask has; it cannot train
  embeddings, so these values lie closer together there.
- "PEFT LoRA": rank 16 at all linear layers. It trains fewer values: a point of reference, not the same work.

On a GPU, all have float32 weights and bfloat16 autocast, as most who fine-tune encoders of this size: bfloat16 weights alone lose
small updates of dense AdamW. Frozen weights lose nothing in bfloat16, so ours and LoRA, whose trained values stay float32, run so
as well ("bfloat16 weights"). All run eagerly.

Peak memory is that of a whole training run (`Case.whole`). Masks are loaded from files, as users load them: holding them counts,
making them does not.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import OURS, Case
from bench.shapes import random_tensors, token_ids
from deftx_kernels import CSRMask, SparseAdamW, sparsify, topk_mask
from deftx_kernels.train.tensors import state_bytes as optimizer_state_bytes

SIZES = ("tiny", "minilm", "linears", "xlmr")
# RoBERTa's eps: a gradient that is zero but for rounding moves nothing. Without decay, as masked training has it.
SETTINGS: dict[str, Any] = {"lr": 1e-4, "eps": 1e-6, "weight_decay": 0.0}
DENSE, DENSE_MASK = "dense, torch AdamW fused", "dense + mask, torch AdamW fused"
SHIRA, LORA = "PEFT SHiRA", "PEFT LoRA"
LORA_RANK = 16


@dataclass(frozen=True)
class Work:
    """Shapes of a model and of its batch. Without a vocabulary: linear layers of `width`, one after the other."""

    layers: int
    width: int
    batch: int
    tokens: int = 1
    vocabulary: int = 0
    heads: int = 0
    inner: int = 0
    density: float = 0.05
    rounds: int = 5  # on the CPU

    def __str__(self) -> str:
        if self.vocabulary:
            return f"{self.batch}x{self.tokens} tokens"
        return f"{self.layers} of {self.width}x{self.width}, {self.batch} rows"


WORKS = {
    "tiny": Work(2, 32, batch=2, tokens=16, vocabulary=200, heads=2, inner=64),
    "tiny linears": Work(4, 64, batch=4, density=0.02),
    "small linears": Work(32, 1024, batch=64, density=0.02),  # for the test of peak memory
    "minilm": Work(6, 384, batch=8, tokens=128, vocabulary=30522, heads=12, inner=1536, rounds=7),
    "linears": Work(32, 2048, batch=128, density=0.02, rounds=7),
    "xlmr": Work(12, 768, batch=8, tokens=256, vocabulary=250002, heads=12, inner=3072, rounds=3),
}


def cases(device: str, quick: bool, sizes: tuple[str, ...]) -> Iterator[Case]:
    with TemporaryDirectory() as folder:
        for size in sizes:
            yield step_case(size, device, folder)


# ---- models ----


def build(name: str) -> nn.Module:
    """The model of a work with its start weights, the same at each call. What masked training never moves is frozen."""
    work = WORKS[name]
    torch.manual_seed(0)
    if not work.vocabulary:
        model = nn.Sequential(*(nn.Linear(work.width, work.width, bias=False) for _ in range(work.layers)))
        for layer in model:
            nn.init.normal_(layer.weight, std=work.width**-0.5)  # the activations neither grow nor vanish
        return model
    from transformers import AutoModelForSequenceClassification, BertConfig, XLMRobertaConfig

    from deftx_kernels.train.models import freeze_for_vector

    options = {"vocab_size": work.vocabulary, "hidden_size": work.width, "num_hidden_layers": work.layers, "num_labels": 3}
    options |= {"num_attention_heads": work.heads, "intermediate_size": work.inner, "use_cache": False}
    options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = (
        XLMRobertaConfig(max_position_embeddings=514, type_vocab_size=1, **options) if name == "xlmr" else BertConfig(**options)
    )
    model = AutoModelForSequenceClassification.from_config(config).train()
    freeze_for_vector(model)
    return model


def maskable(name: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors that the mask covers; no weights are made."""
    with torch.device("meta"):
        model = build(name)
    if not WORKS[name].vocabulary:
        return {n: tuple(p.shape) for n, p in model.named_parameters()}
    from deftx_kernels.train.models import maskable_names

    return {n: tuple(model.get_parameter(n).shape) for n in maskable_names(model)}


def mask_file(name: str, folder: str, device: str) -> Path:
    """The mask of a work: the largest of random scores, saved in the folder."""
    path = Path(folder) / f"{name}.safetensors"
    if not path.exists():
        scores = random_tensors(maskable(name), torch.float32, device, seed=1)
        topk_mask(scores, density=WORKS[name].density).save(path)
    return path


def make_batch(work: Work, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if not work.vocabulary:
        x, y = torch.randn(2, work.batch, work.width, generator=generator).to(device)
        return {"x": x, "y": y}
    ids = token_ids(work.batch * work.tokens, work.vocabulary, generator).view(work.batch, work.tokens)
    return {"input_ids": ids.to(device), "labels": torch.arange(work.batch, device=device) % 3}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if "x" in batch:
        return (model(batch["x"]) - batch["y"]).square().mean()
    return model(**batch).loss


# ---- providers ----


@dataclass
class Step:
    """What a call gives: enough to check it."""

    loss: Tensor  # before the step
    model: nn.Module
    kind: str  # "dense", "masked": which weights moved; "other": that the loss falls is all that can be said
    again: Callable[[], "Step"]


class Trainers:
    """The providers' models and optimizers for one work."""

    def __init__(self, name: str, device: str, folder: str) -> None:
        self.name, self.device = name, device
        self.mask_path = mask_file(name, folder, device)
        self.batch = make_batch(WORKS[name], device)
        with torch.device("meta"):
            plain = build(name)
        self.numel = sum(p.numel() for p in plain.parameters())
        self.linears = sum(m.weight.numel() for m in plain.modules() if isinstance(m, nn.Linear))
        self.state_bytes: dict[str, float] = {}  # per parameter of the model

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return build(self.name).to(self.device, dtype)

    def provider(self, name: str, kind: str, make: Callable[[], tuple]) -> Callable[[], Callable[[], Step]]:
        """`make()` gives the model, its optimizer and what is to be done before its step."""

        def provide():
            model, optimizer, before_step = make()

            def call() -> Step:
                loss = self.loss(model)
                loss.backward()
                before_step()
                optimizer.step()
                optimizer.zero_grad()
                if name not in self.state_bytes:
                    self.state_bytes[name] = optimizer_state_bytes(optimizer) / self.numel
                return Step(loss.detach(), model, kind, call)

            return call

        return provide

    def loss(self, model: nn.Module) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            return loss_of(model, self.batch)

    def ours(self, dtype: torch.dtype = torch.float32):
        model, mask = self.model(dtype), CSRMask.load(self.mask_path, device=self.device)
        sparsify(model, mask)
        return model, SparseAdamW(model.named_parameters(), mask, **SETTINGS), nothing

    def dense(self):
        model = self.model()
        return model, fused_adamw(model), nothing

    def dense_mask(self):
        model, optimizer, _ = self.dense()
        kept = CSRMask.load(self.mask_path, device=self.device).to_dense()
        dropped = [(model.get_parameter(n), keep.logical_not_()) for n, keep in kept.items()]

        def drop() -> None:
            for parameter, others in dropped:
                parameter.grad.masked_fill_(others, 0.0)

        return model, optimizer, drop

    def peft(self, config: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float32):
        import peft

        torch.sparse.check_sparse_tensor_invariants.disable()  # as without this line, but SHiRA does not warn
        model = self.model(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config(model)).train()
        return model, fused_adamw(model), nothing


def nothing() -> None:
    pass


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def fused_adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, **SETTINGS)


def peft_options(model: nn.Module) -> dict[str, Any]:
    """All linear layers; of a classifier all but the head, which is trained densely."""
    if isinstance(model, nn.Sequential):
        return {"target_modules": [n for n, _ in model.named_children()]}
    return {"target_modules": "all-linear", "task_type": "SEQ_CLS"}


def shira_config(values: int, model: nn.Module):
    from peft import ShiraConfig

    return ShiraConfig(r=shira_rank(values, model), random_seed=0, **peft_options(model))


def shira_rank(values: int, model: nn.Module) -> int:
    """SHiRA trains r * (m + n) values of a linear layer [m, n]: the r that comes nearest to this many in all, at most all."""
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "classifier" not in n]
    shapes = [(m.out_features, m.in_features) for m in layers]
    return max(1, min(round(values / sum(map(sum, shapes))), *(m * n // (m + n) for m, n in shapes)))


def lora_config(model: nn.Module):
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, **peft_options(model))


# ---- the case ----


def step_case(work: str, device: str, folder: str, size: str = "") -> Case:
    again = partial(step_case, work, device, folder)
    if size == "tiny":
        work = "tiny" if WORKS[work].vocabulary else "tiny linears"
    shape = WORKS[work]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    title = f"{work}, {shape}"
    if shape.vocabulary and not has("transformers"):
        absent = {OURS: "transformers is not installed"}
        return Case("training_step", title, dtype, shape.density, 0, {}, lambda step: None, absent=absent)
    trainers = Trainers(work, device, folder)
    mask = CSRMask.load(trainers.mask_path, device=device)
    shira, lora = partial(trainers.peft, partial(shira_config, mask.nnz)), partial(trainers.peft, lora_config)
    makers: dict[str, tuple[str, Callable[[], tuple]]] = {
        OURS: ("masked", trainers.ours),
        DENSE: ("dense", trainers.dense),
        DENSE_MASK: ("masked", trainers.dense_mask),
        SHIRA: ("other", shira),
        LORA: ("other", lora),
    }
    if device == "cuda":
        makers[f"{OURS}, bfloat16 weights"] = ("other", partial(trainers.ours, torch.bfloat16))
        makers[f"{LORA}, bfloat16 weights"] = ("other", partial(lora, torch.bfloat16))
    absent = {} if has("peft") else {name: "peft is not installed" for name in makers if name.startswith("PEFT")}
    providers = {n: trainers.provider(n, kind, make) for n, (kind, make) in makers.items() if n not in absent}
    positions = shape.batch * shape.tokens
    attention = shape.layers * 4 * positions * shape.tokens * shape.width if shape.vocabulary else 0
    # Forward, and as many backward to the activations; of the gradients of weights, those of the mask's entries.
    flops = (2 + shape.density) * 2 * trainers.linears * positions + 3 * attention
    # Values and moments are read and written, columns read, every weight of a linear layer read once.
    moved = 4 * trainers.linears + mask.nnz * (24 + mask.col_indices.element_size())
    return Case(
        "training_step", title, dtype, shape.density, moved, providers, checker(trainers, mask), flops=flops,
        rounds=shape.rounds if device == "cpu" else 25, backend_of="masked_linear_grad", absent=absent,
        state_bytes=trainers.state_bytes, whole=True, again=again,
    )  # fmt: skip


def checker(trainers: Trainers, mask: CSRMask) -> Callable[[Step], str | None]:
    """Against one backward pass of the dense model: AdamW's first step from there is known."""
    loss_tolerance, tolerance = (1e-5, 0.01) if trainers.device == "cpu" else (5e-3, 0.1)

    @cache
    def start() -> tuple[float, dict[str, nn.Parameter]]:
        model = trainers.model()
        loss = trainers.loss(model)
        loss.backward()
        return float(loss.detach()), dict(model.named_parameters())

    def error(after: Tensor, before: Tensor, gradient: Tensor) -> tuple[float, float]:
        """(square of the difference from what AdamW's first step gives, square of that step)."""
        update = gradient / (gradient.abs() + SETTINGS["eps"]) * -SETTINGS["lr"]
        return float((after - before - update).square().sum(dtype=torch.float64)), float(update.square().sum(dtype=torch.float64))

    def moved_wrongly(kind: str, after: dict[str, Tensor]) -> str | None:
        sums = [0.0, 0.0]
        for name, before in start()[1].items():
            now, old = after[name].detach(), before.detach()
            if before.grad is None:
                if not torch.equal(now, old):
                    return f"{name}, which is frozen, has moved"
                continue
            grad = before.grad
            if kind == "masked" and name in mask:
                part = mask[name]
                rest = now.clone()
                part.scatter_({name: rest}, part.gather({name: old}))
                if not torch.equal(rest, old):
                    return f"entries of {name} outside the mask have moved"
                now, old, grad = (part.gather({name: t}) for t in (now, old, grad))
            elif torch.equal(now, old) and float(grad.abs().max()) > SETTINGS["eps"]:
                return f"{name} has not moved"
            sums = [a + b for a, b in zip(sums, error(now, old, grad))]
        off = (sums[0] / sums[1]) ** 0.5
        return None if off <= tolerance else f"the weights are {off:.1%} of a step away from AdamW's"

    def check(step: Step) -> str | None:
        loss, expected = float(step.loss), start()[0]
        if not abs(loss - expected) <= loss_tolerance * expected:
            return f"first loss {loss}, of the dense model {expected}"
        if step.kind != "other":
            return moved_wrongly(step.kind, {n: p.detach() for n, p in step.model.named_parameters()})
        later = [float(step.again().loss) for _ in range(1 if trainers.device == "cpu" else 4)]  # bfloat16 hides a small step
        return None if later[-1] < loss else f"first loss {loss}, after as many steps {later}"

    return check
