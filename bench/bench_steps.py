"""training_step: a whole step of fine-tuning (forward, loss, backward, optimizer, gradients freed), ours against the
usual ways.

Works: classifiers of MiniLM's, BERT base's and XLM-R base's shape, a language model of Llama 3.2 1B's shape, and a
plain stack of linear layers, all with random weights. Every provider starts from the same weights and trains on one
batch, without dropout. As in `deftx run` the head of a classifier is trained densely, norms are frozen and the mask
covers all the rest (of Llama: the linear layers and the embedding, which the output layer shares); so the dense
providers train just the tensors that the mask and the head are of.

- "dense": `torch.optim.AdamW(fused=True)`.
- "dense + mask", LT-SFT's way: the same, with the gradients outside the mask set to zero before the step
(`masked_fill_` with the
  mask's complement as bool tensors: on the CPU a third of the time of a product, and no float copy of the mask).
- "PEFT SHiRA": all linear layers, random masks, of the rank that trains as many values as our mask has; it cannot train
  embeddings, so these values lie closer together there.
- "PEFT LoRA": rank 16 at all linear layers. It trains fewer values: a point of reference, not the same work.

On the CPU the dtype is that of the weights: float32, of Llama bfloat16, as language models are fine-tuned. Dense
gradients and both moments of torch's AdamW are then bfloat16, too; our values, their gradients and moments stay
float32, and so do PEFT's adapters.

On a GPU, all have float32 weights and autocast, as most who fine-tune encoders of this size: bfloat16 weights alone
lose small updates of dense AdamW. Frozen weights lose nothing in bfloat16, so ours and LoRA, whose trained values stay
float32, run so as well ("bfloat16 weights"). Of Llama all weights are bfloat16. All run eagerly; where the host is the
slower one, its time is what such a step takes, so ours, the dense ways and SHiRA run as a CUDA graph of the whole step,
too, which is replayed ("CUDA graph").

Peak memory is that of a whole training run (`Case.whole`). Masks are loaded from files, as users load them: holding
them counts, making them does not. A footprint counts the model's parameters and buffers (ours: the dense tensors and
the compact values; PEFT: the adapters, too), the gradients just before the optimizer's step, the optimizer's state, and
the tensors by which the entries to be trained are known (ours: the CSR indices; "dense + mask": the bool tensors;
SHiRA: its indices).
"""

import atexit
import importlib.util
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Case, Choice, Footprint, Work, available_bytes, trim
from bench.rows import OURS
from bench.shapes import random_tensors, token_ids
from deftx_kernels import CSRMask, SparseAdamW, sparsify, topk_mask
from deftx_kernels.nn import masked_parameters
from deftx_kernels.train.tensors import state_bytes as optimizer_state_bytes

OPS = {"training_step": "one whole step of fine-tuning a model: forward, loss, backward, optimizer"}
SIZES = ("tiny", "minilm", "linears", "bert", "xlmr", "llama1b")
# RoBERTa's eps: a gradient that is zero but for rounding moves nothing. Without decay, as masked training has it.
SETTINGS: dict[str, Any] = {"lr": 1e-4, "eps": 1e-6, "weight_decay": 0.0}
DENSE, DENSE_MASK = "dense, torch AdamW fused", "dense + mask, torch AdamW fused"
SHIRA, LORA = "PEFT SHiRA", "PEFT LoRA"
LORA_RANK = 16
GRAPH = ", CUDA graph"  # behind a provider's name
HEADS = ("classifier", "lm_head")  # linear layers that PEFT leaves as they are


@dataclass(frozen=True)
class Shape:
    """Of a model and of its batch. Of family "linears": linear layers of `width`, one after the other."""

    family: str
    layers: int
    width: int
    batch: int
    tokens: int = 1
    vocabulary: int = 0
    heads: int = 0
    key_value_heads: int = 0  # of family "llama"
    inner: int = 0
    density: float = 0.05
    rounds: int = 5  # on the CPU
    apart: bool = False

    def __str__(self) -> str:
        if self.family == "linears":
            return f"{self.layers} of {self.width}x{self.width}, {self.batch} rows"
        return f"{self.batch}x{self.tokens} tokens"

    @property
    def spread(self) -> float:
        """Standard deviation of the start weights: BERT's and Llama's own; of a stack, such that activations keep their
        size.
        """
        return self.width**-0.5 if self.family == "linears" else 0.02


WORKS = {
    "tiny": Shape("bert", 2, 32, batch=2, tokens=16, vocabulary=200, heads=2, inner=64),
    "tiny linears": Shape("linears", 4, 64, batch=4, density=0.02),
    "tiny llama": Shape("llama", 2, 32, batch=2, tokens=16, vocabulary=200, heads=4, key_value_heads=2, inner=64),
    "small linears": Shape("linears", 32, 1024, batch=64, density=0.02),  # for the test of peak memory
    "minilm": Shape("bert", 6, 384, batch=8, tokens=128, vocabulary=30522, heads=12, inner=1536, rounds=7),
    "linears": Shape("linears", 32, 2048, batch=128, density=0.02, rounds=7),
    "bert": Shape("bert", 12, 768, batch=8, tokens=128, vocabulary=30522, heads=12, inner=3072),
    "xlmr": Shape("xlmr", 12, 768, batch=8, tokens=256, vocabulary=250002, heads=12, inner=3072, rounds=3),
    "llama1b": Shape(
        "llama",
        16,
        2048,
        batch=2,
        tokens=128,
        vocabulary=128256,
        heads=32,
        key_value_heads=8,
        inner=8192,
        rounds=3,
        apart=True,
    ),
}
TINY = {"linears": "tiny linears", "bert": "tiny", "xlmr": "tiny", "llama": "tiny llama"}


def works(choice: Choice) -> Iterator[Work]:
    for size in sorted(choice.sizes, key=SIZES.index):
        for dtype, density in choice.settings([(usual_dtype(size, choice.device), WORKS[size].density)]):
            yield step_work(size, choice.device, dtype, density)


def step_work(name: str, device: str, dtype: torch.dtype, density: float) -> Work:
    shape = WORKS[name]
    make, tiny = (partial(step_case, n, device, mask_folder(), dtype, density) for n in (name, TINY[shape.family]))
    return Work("training_step", name, f"{name}, {shape}", dtype, density, device, make, tiny)


def usual_dtype(name: str, device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" or WORKS[name].family == "llama" else torch.float32


@cache
def mask_folder() -> str:
    """For the masks of this run: the processes that are started for single providers find them there, made."""
    folder = tempfile.mkdtemp(prefix="deftx-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# ---- models ----


def skeleton(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """The model on torch's current device, with weights of no account. What masked training never moves is frozen."""
    if shape.family == "linears":
        return nn.Sequential(
            *(nn.Linear(shape.width, shape.width, bias=False, dtype=dtype) for _ in range(shape.layers))
        )
    import transformers

    from deftx_kernels.train.models import freeze_for_vector

    options = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "use_cache": False,
    }
    options |= {"num_attention_heads": shape.heads, "intermediate_size": shape.inner}
    if shape.family == "llama":
        config = transformers.LlamaConfig(
            num_key_value_heads=shape.key_value_heads, tie_word_embeddings=True, **options
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
        if shape.family == "xlmr":
            config = transformers.XLMRobertaConfig(max_position_embeddings=514, type_vocab_size=1, **options)
        else:
            config = transformers.BertConfig(**options)
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    freeze_for_vector(model)
    return model.train()


def on_meta(shape: Shape) -> nn.Module:
    """Names and shapes without memory."""
    with torch.device("meta"):
        return skeleton(shape, torch.float32)


@torch.no_grad()
def build(shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    """The model with its start weights, the same at each call; nothing else of its size is made on the way."""
    with torch.device("meta"):
        model = skeleton(shape, dtype)
    model.to_empty(device=device)
    if shape.family != "linears":
        model.tie_weights()
        # Buffers, such as positions, depend neither on the number of layers nor on the vocabulary.
        small = skeleton(replace(shape, layers=1, vocabulary=16), dtype)
        for (_, buffer), (_, known) in zip(model.named_buffers(), small.named_buffers(), strict=True):
            buffer.copy_(known)
    for name, parameter in model.named_parameters():
        start_weights_(name, parameter, shape.spread)
    return model


@torch.no_grad()
def start_weights_(name: str, tensor: Tensor, spread: float) -> Tensor:
    """Fills one parameter. Its name is the seed, so that each can be made again without the others."""
    if tensor.dim() < 2:
        return tensor.fill_(float(name.endswith("weight")))  # norms: 1; biases: 0
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    return tensor.normal_(std=spread, generator=generator)


def maskable(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors that the mask covers."""
    model = on_meta(shape)
    if shape.family == "linears":
        return {n: tuple(p.shape) for n, p in model.named_parameters()}
    from deftx_kernels.train.models import maskable_names

    return {n: tuple(model.get_parameter(n).shape) for n in maskable_names(model)}


def mask_file(name: str, density: float, folder: str, device: str) -> Path:
    """The mask of a work: the largest of random scores, saved in the folder."""
    path = Path(folder) / f"{name}-{density:g}.safetensors"
    if not path.exists():
        topk_mask(random_tensors(maskable(WORKS[name]), torch.float32, device, seed=1), density=density).save(path)
    return path


def make_batch(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if shape.family == "linears":
        x, y = torch.randn(2, shape.batch, shape.width, generator=generator).to(device)
        return {"x": x.to(dtype), "y": y}
    ids = token_ids(shape.batch * shape.tokens, shape.vocabulary, generator).view(shape.batch, shape.tokens).to(device)
    return {
        "input_ids": ids,
        "labels": ids if shape.family == "llama" else torch.arange(shape.batch, device=device) % 3,
    }


# ---- providers ----


def nothing() -> None:
    pass


@dataclass
class Run:
    """One provider's training. A call takes a step and gives this run, which is enough to check it."""

    trainers: "Trainers"
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mask: Iterable[Tensor] = ()  # by which the entries to be trained are known
    before_step: Callable[[], None] = nothing
    kind: str = "other"  # "dense", "masked": which weights move; "other": that the loss falls is all that can be said
    dtype: torch.dtype | None = None  # of the weights, where these are not the others'
    name: str = ""
    loss: float | Tensor = 0.0  # before the last step

    def __call__(self) -> "Run":
        loss = self.trainers.loss(self.model)
        loss.backward()
        self.before_step()
        footprint = None if self.name in self.trainers.footprints else self.footprint()
        self.optimizer.step()
        if footprint:
            footprint.state = optimizer_state_bytes(self.optimizer)
            self.trainers.footprints[self.name] = footprint
        self.optimizer.zero_grad()
        self.loss = loss.detach()
        return self

    def footprint(self) -> Footprint:
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return Footprint(held([*parameters, *self.model.buffers()]), held(gradients), mask=held(self.mask))


@dataclass
class Captured:
    """A run whose steps are replays of a CUDA graph. The first call takes three steps eagerly, captures one and replays
    it.
    """

    run: Run
    first_loss: float = 0.0
    graph: Any = None

    def __call__(self) -> "Captured":
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return self

    def capture(self) -> None:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        # as torch's documentation has it: what a first step makes must not be the graph's
        with torch.cuda.stream(side):
            self.first_loss = float(self.run().loss)
            for _ in range(2):
                self.run()
        here.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def fault(self, expected: float, tolerance: float) -> str | None:
        """After the first call: four steps whose first is known."""
        loss = float(self.run.loss)
        if not abs(self.first_loss - expected) <= tolerance * expected:
            return f"first loss {self.first_loss}, of the dense model {expected}"
        return None if loss < self.first_loss else f"first loss {self.first_loss}, of the first replay {loss}"


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, shared memory counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class Trainers:
    """The providers' models and optimizers for one work."""

    def __init__(self, name: str, device: str, folder: str, dtype: torch.dtype, density: float) -> None:
        self.shape, self.device = WORKS[name], device
        self.autocast = dtype if device == "cuda" and dtype != torch.float32 else None
        self.dtype = torch.float32 if self.autocast and self.shape.family != "llama" else dtype  # of the weights
        self.mask_path = mask_file(name, density, folder, device)
        self.batch = make_batch(self.shape, self.dtype, device)
        plain = on_meta(self.shape)
        self.names = [n for n, _ in plain.named_parameters()]
        self.numel = sum(p.numel() for p in plain.parameters())
        self.linears = sum(m.weight.numel() for m in plain.modules() if isinstance(m, nn.Linear))
        self.footprints: dict[str, Footprint] = {}

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        forget_shira()
        trim()  # a dropped model may be part of a cycle, and there may be memory for one only
        return build(self.shape, dtype or self.dtype, self.device)

    def loss(self, model: nn.Module) -> Tensor:
        # No weight is cast twice in a step, and what a CUDA graph has cast must not be kept beyond it.
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            if self.shape.family == "linears":
                return (model(self.batch["x"]).float() - self.batch["y"]).square().mean()
            if self.shape.family == "llama":
                return model(**self.batch).loss
            # In float32, as transformers has it for language models but not for classifiers of 16 bits.
            return nn.functional.cross_entropy(model(self.batch["input_ids"]).logits.float(), self.batch["labels"])

    def provider(self, name: str, make: Callable[[], Run]) -> Callable[[], Run]:
        return lambda: replace(make(), name=name)

    def captured(self, name: str, make: Callable[..., Run]) -> Callable[[], Captured]:
        """`make` takes what an optimizer needs so that its step can be captured."""
        return lambda: Captured(replace(make(capturable=True), name=name))

    def ours(self, dtype: torch.dtype | None = None, kind: str = "masked", capturable: bool = False) -> Run:
        model, mask = self.model(dtype), CSRMask.load(self.mask_path, device=self.device)
        sparsify(model, mask)
        settings = SETTINGS | ({"lr": torch.tensor(SETTINGS["lr"], device=self.device)} if capturable else {})
        optimizer = SparseAdamW(model.named_parameters(), mask, **settings)
        masks = [mask, *(record.mask for record in masked_parameters(model).values())]
        return Run(
            self, model, optimizer, [t for m in masks for t in (m.crow_indices, m.col_indices)], kind=kind, dtype=dtype
        )

    def dense(self, **options: bool) -> Run:
        model = self.model()
        return Run(self, model, fused_adamw(model, **options), kind="dense")

    def dense_mask(self, **options: bool) -> Run:
        run = self.dense(**options)
        dropped = {
            n: keep.logical_not_() for n, keep in CSRMask.load(self.mask_path, device=self.device).to_dense().items()
        }
        parameters = [run.model.get_parameter(n) for n in dropped]

        def drop() -> None:
            for parameter, others in zip(parameters, dropped.values()):
                parameter.grad.masked_fill_(others, 0.0)

        return replace(run, mask=dropped.values(), before_step=drop, kind="masked")

    def peft(self, config: Callable[[nn.Module], Any], dtype: torch.dtype | None = None, **options: bool) -> Run:
        import peft

        torch.sparse.check_sparse_tensor_invariants.disable()  # as without this line, but SHiRA does not warn
        model = self.model(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(model, config(model)).train()
        indices = [i for m in model.modules() for i in getattr(m, "shira_indices", {}).values()]
        return Run(self, model, fused_adamw(model, **options), indices, dtype=dtype)


def forget_shira() -> None:
    """PEFT keeps every SHiRA layer that has run in a cache, for a warning, and so all their weights."""
    layers = sys.modules.get("peft.tuners.shira.layer")
    if warned := getattr(layers, "_warn_once_about_module_hooks", None):
        warned.cache_clear()


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def fused_adamw(model: nn.Module, **options: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, **SETTINGS, **options)


def peft_options(model: nn.Module) -> dict[str, Any]:
    """All linear layers but the head: that of a classifier is trained densely, that of a language model is the
    embedding.
    """
    if isinstance(model, nn.Sequential):
        return {"target_modules": [n for n, _ in model.named_children()]}
    return {"target_modules": "all-linear", "task_type": "CAUSAL_LM" if hasattr(model, "lm_head") else "SEQ_CLS"}


def shira_config(values: int, model: nn.Module):
    from peft import ShiraConfig

    return ShiraConfig(r=shira_rank(values, model), random_seed=0, **peft_options(model))


def shira_rank(values: int, model: nn.Module) -> int:
    """SHiRA trains r * (m + n) values of a linear layer [m, n]: the r that comes nearest to this many in all, at most
    all.
    """
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(HEADS)]
    shapes = [(m.out_features, m.in_features) for m in layers]
    return max(1, min(round(values / sum(map(sum, shapes))), *(m * n // (m + n) for m, n in shapes)))


def lora_config(model: nn.Module):
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, **peft_options(model))


# ---- the case ----


def step_case(
    name: str, device: str, folder: str, dtype: torch.dtype | None = None, density: float | None = None
) -> Case:
    shape = WORKS[name]
    if shape.family != "linears" and not has("transformers"):
        return Case(0, {}, lambda run: None, absent={OURS: "transformers is not installed"})
    dtype, density = dtype or usual_dtype(name, device), shape.density if density is None else density
    trainers = Trainers(name, device, folder, dtype, density)
    mask = CSRMask.load(trainers.mask_path, device=device)
    shira, lora = partial(trainers.peft, partial(shira_config, mask.nnz)), partial(trainers.peft, lora_config)
    makers: dict[str, Callable[[], Run]] = {
        OURS: trainers.ours,
        DENSE: trainers.dense,
        DENSE_MASK: trainers.dense_mask,
        SHIRA: shira,
        LORA: lora,
    }
    if trainers.autocast and trainers.dtype != trainers.autocast:
        # Not from the same weights, which are rounded: of the first step the loss is known, that of a dense model so
        # rounded.
        makers[f"{OURS}, bfloat16 weights"] = partial(trainers.ours, torch.bfloat16, kind="other")
        makers[f"{LORA}, bfloat16 weights"] = partial(lora, torch.bfloat16)
    graphs = (
        {f"{n}{GRAPH}": makers[n] for n in (OURS, DENSE, DENSE_MASK, SHIRA)}
        if device == "cuda" and not shape.apart
        else {}
    )
    absent = {} if has("peft") else {n: "peft is not installed" for n in [*makers, *graphs] if n.startswith("PEFT")}
    absent = too_large(trainers, makers, mask.nnz) | absent
    positions = shape.batch * shape.tokens
    attention = shape.layers * 4 * positions * shape.tokens * shape.width if shape.vocabulary else 0
    if shape.family == "llama":  # each token sees half of the others
        attention //= 2
    # Forward, and as many backward to the activations; of the gradients of weights, those of the mask's entries.
    flops = (2 + density) * 2 * trainers.linears * positions + 3 * attention
    # Values and moments are read and written, columns read, every weight of a linear layer read once.
    moved = trainers.dtype.itemsize * trainers.linears + mask.nnz * (24 + mask.col_indices.element_size())
    providers: dict[str, Callable] = {n: trainers.provider(n, make) for n, make in makers.items() if n not in absent}
    providers |= {n: trainers.captured(n, make) for n, make in graphs.items() if n not in absent}
    return Case(
        moved, providers, checker(trainers, mask), flops=flops, rounds=shape.rounds if device == "cpu" else 25,
        served_by="masked_linear_grad", absent=absent, parameters=trainers.numel, footprints=trainers.footprints, whole=True,
        apart=shape.apart,
    )  # fmt: skip


def too_large(trainers: Trainers, names: Iterable[str], nnz: int) -> dict[str, str]:
    """The providers for which the main memory that is free now is too small, each with what it needs."""
    if trainers.device != "cpu":
        return {}
    weights, free, found = trainers.numel * trainers.dtype.itemsize, available_bytes(), {}
    training = dict.fromkeys(names, weights) | {DENSE: 4 * weights, DENSE_MASK: 4 * weights + trainers.numel}
    # SHiRA keeps each layer's sum for the backward pass
    training |= {OURS: weights + 18 * nnz, SHIRA: 2 * weights + 24 * nnz}
    for name in names:
        needed = training[name] + 1.5 * weights  # of the check: the dense model, one gradient at a time
        if needed > free:
            found[name] = f"needs {needed / 1e9:.0f} GB of free memory"
    return found


# ---- the check ----


@dataclass
class Truth:
    """The dense model's first loss and gradients."""

    loss: float
    # float32: at the mask's entries [nnz of the tensor]; whole, of a trained tensor outside the mask
    gradients: dict[str, Tensor]
    elsewhere: dict[str, float]  # the largest gradient outside the mask


def truth(trainers: Trainers, mask: CSRMask) -> Truth:
    """One backward pass of the dense model, in which no more than one dense gradient lies in memory."""
    model = trainers.model()
    found = Truth(0.0, {}, {})

    def keep(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if name in mask:
            part = mask[name]
            found.gradients[name] = part.gather({name: gradient}).float()
            part.scatter_({name: gradient}, torch.zeros_like(found.gradients[name]))
        else:
            found.gradients[name] = gradient.float()
        found.elsewhere[name] = float(torch.linalg.vector_norm(gradient, torch.inf))

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(partial(keep, name))
    loss = trainers.loss(model)
    loss.backward()
    found.loss = float(loss.detach())
    return found


def moved_wrongly(run: Run, mask: CSRMask, found: Truth, tolerance: float) -> str | None:
    """What a first step has done to the weights that AdamW would not have done."""
    after = dict(run.model.named_parameters())
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
        stays = torch.equal(now, before)  # outside the mask
        if masked and run.kind == "masked" and not stays:
            return f"entries of {name} outside the mask have moved"
        if not (masked and run.kind == "masked") and stays and found.elsewhere[name] > SETTINGS["eps"]:
            return f"{name} has not moved outside the mask"
        if name in values:  # what is trained, in full precision
            if not torch.equal(values[name].to(now.dtype), trained):
                return f"the entries of {name} are not its compact values"
            trained = values[name]
        off = distance(trained, old, found.gradients[name])
        if not off <= tolerance:
            return f"{name} is {off:.1%} of a step away from AdamW's"
    return None


def distance(after: Tensor, before: Tensor, gradient: Tensor) -> float:
    """From where AdamW's first step leads, relative to that step; one of less than 1% of the learning rate counts as
    such.
    """
    lr = SETTINGS["lr"]
    step = gradient / (gradient.abs() + SETTINGS["eps"]) * -lr
    error = after.float() - (before.float() + step).to(after.dtype).float()
    length = float(torch.linalg.vector_norm(step)), 0.01 * lr * max(1, step.numel()) ** 0.5
    return float(torch.linalg.vector_norm(error)) / max(length)


def checker(trainers: Trainers, mask: CSRMask) -> Callable[[Run], str | None]:
    exact = trainers.dtype == torch.float32 and not trainers.autocast
    loss_tolerance, tolerance = (1e-5, 0.01) if exact else (5e-3, 0.1)
    start = cache(partial(truth, trainers, mask))

    @cache
    def loss_of(dtype: torch.dtype) -> float:
        with torch.no_grad():
            return float(trainers.loss(trainers.model(dtype)))

    def check(run: Run | Captured) -> str | None:
        if isinstance(run, Captured):
            return run.fault(start().loss, loss_tolerance)
        loss, expected = float(run.loss), loss_of(run.dtype) if run.dtype else start().loss
        if not abs(loss - expected) <= loss_tolerance * expected:
            return f"first loss {loss}, of the dense model {expected}"
        if run.kind != "other":
            return moved_wrongly(run, mask, start(), tolerance)
        for _ in range(1 if exact else 4):  # bfloat16 hides a small step
            later = float(run().loss)
            if later < (1 - loss_tolerance) * loss:
                break
        return None if later < loss else f"first loss {loss}, some steps later {later}"

    return check
