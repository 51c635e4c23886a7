"""Several source languages: batches of one language, and its vector in the weights while they are trained on."""

import copy
import dataclasses
from itertools import chain

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from train_vectors import LABELS, RUNTIME, Crash, builder, labelled, phase, task_settings
from transformers import TrainerCallback

from deftx_kernels import CSRMask, SparseDelta
from deftx_kernels.nn import masked_parameters, sparsify
from deftx_kernels.optim import SparseAdamW
from deftx_kernels.train import models
from deftx_kernels.train.recipes import dense_phase, learn
from deftx_kernels.train.sources import LanguageBatches, SourceVectors

WORDS = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
BIAS = "bert.encoder.layer.1.output.dense.bias"


# ---- batches ----

LANGUAGES = [0, 1, 0, 2, 1, 0, 0, 1, 0, 2, 0]


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("size", [1, 3, 20])
def test_batches_have_every_index_once_and_one_language(seed, size):
    batches = LanguageBatches(LANGUAGES, size, seed)
    for epoch in range(3):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches) == sum(-(-LANGUAGES.count(language) // size) for language in range(3))
        assert sorted(chain(*found)) == list(range(len(LANGUAGES)))
        assert all(len({LANGUAGES[i] for i in batch}) == 1 and len(batch) <= size for batch in found)


def test_the_order_of_batches():
    def order(seed, epoch, size=3):
        batches = LanguageBatches(LANGUAGES, size, seed)
        batches.set_epoch(epoch)
        assert list(batches) == list(batches)
        return list(batches)

    assert order(None, 0) == order(None, 5) == [[0, 2, 5], [6, 8, 10], [1, 4, 7], [3, 9]]
    assert order(1, 0) == order(1, 0)
    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    # both the examples of a batch and the sequence of batches are shuffled
    assert {frozenset(batch) for batch in orders[0]} != {frozenset(batch) for batch in orders[1]}
    assert len({tuple(LANGUAGES[batch[0]] for batch in found) for found in orders}) > 1


# ---- vectors ----


def random_mask(tensors: dict, density: float, seed: int) -> CSRMask:
    random = torch.Generator().manual_seed(seed)
    return CSRMask.from_dense({n: torch.rand(p.shape, generator=random) < density for n, p in tensors.items()})


def random_delta(model: nn.Module, seed: int) -> SparseDelta:
    base = {name: model.get_parameter(name).detach() for name in (WORDS, QUERY, BIAS)}
    random, mask = torch.Generator().manual_seed(seed), random_mask(base, 0.3, seed)
    tuned = {name: p.clone() for name, p in base.items()}
    mask.add_(tuned, 0.3 * torch.randn(mask.nnz, generator=random))
    return SparseDelta.from_models(tuned, base, mask=mask)


def whole(delta: SparseDelta) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros(shape) for name, shape in zip(delta.mask.names, delta.mask.shapes)}
    delta.mask.scatter_(tensors, delta.values)
    return tensors


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}


def same_bits(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load(tiny_bert: str, kind: str) -> tuple[nn.Module, dict]:
    """A model without dropout and a batch for it."""
    if kind == "classifier":
        model, labels = models.load_classifier(tiny_bert, LABELS), torch.tensor([0, 1, 1])
    else:
        model = models.load_masked_lm(tiny_bert, tie_decoder=kind == "tied")[0]
        labels = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(3))
    ids = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(2))
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def plain_sum(model: nn.Module, delta: SparseDelta) -> nn.Module:
    """A plain copy of the model with theta + phi, computed densely."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in whole(delta).items():
            model.get_parameter(name).add_(change)
    return model


@pytest.mark.parametrize("kind", ["classifier", "tied", "untied"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_applied_vector_is_in_weights_outputs_and_gradients(tiny_bert, kind, masked):
    model, batch = load(tiny_bert, kind)
    deltas = [random_delta(model, seed) for seed in (1, 2)]
    references = [plain_sum(model, delta) for delta in deltas]
    mask = random_mask({name: model.get_parameter(name) for name in (WORDS, QUERY)}, 0.4, 9)
    if masked:
        sparsify(model, mask)
    before, vectors = bits(model), SourceVectors(deltas)
    for language in (1, 0, 1):
        expected = references[language]
        expected.zero_grad()
        model.zero_grad()
        loss = expected(**batch).loss
        loss.backward()
        with vectors.applied(model, language):
            tensors = dict(model.named_parameters())
            assert all(torch.equal(tensors[name], expected.get_parameter(name)) for name in (WORDS, QUERY, BIAS))
            found = model(**batch).loss
            found.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        assert same_bits(bits(model), before)
        gradients = {name: p.grad for name, p in expected.named_parameters()}
        if masked:
            assert masked_parameters(model).keys() == {WORDS, QUERY}
            for name, parameter in masked_parameters(model).items():
                wanted = parameter.mask.gather({name: gradients[name]})
                assert torch.allclose(parameter.values.grad, wanted, rtol=1e-4, atol=1e-6), name
                assert parameter.dense.grad is None
        else:
            assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(KeyError, match="stopped"), vectors.applied(model, 0):
        raise KeyError("stopped")
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("kind", ["classifier", "tied"])
@pytest.mark.parametrize("optimizer_kind", ["sparse", "torch"])
def test_optimizer_steps_between_two_uses(tiny_bert, kind, optimizer_kind):
    """The steps equal those of a model whose gradients come from a plain copy with the vector added."""

    def training(model):
        sparsify(model, mask)
        if optimizer_kind == "sparse":
            return SparseAdamW(model.named_parameters(), mask, lr=0.03)
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0)

    plain, batch = load(tiny_bert, kind)
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    deltas = [random_delta(model, seed) for seed in (1, 2)]
    mask = random_mask({name: model.get_parameter(name) for name in (WORDS, QUERY)}, 0.4, 9)
    for each in (model, other, plain):
        for name, p in each.named_parameters():
            p.requires_grad_(name in (WORDS, QUERY))
    optimizer, wanted = training(model), training(other)
    start, vectors = bits(other), SourceVectors(deltas)
    for language in (0, 1, 1, 0):
        with vectors.applied(model, language):
            optimizer.zero_grad()
            model(**batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in masked_parameters(other).items():
                plain.get_parameter(name).copy_(parameter.dense)
        copied = plain_sum(plain, deltas[language])
        copied(**batch).loss.backward()
        for name, parameter in masked_parameters(other).items():
            parameter.values.grad = parameter.mask.gather({name: copied.get_parameter(name).grad})
        wanted.step()
    moved = 0
    for name, parameter in masked_parameters(model).items():
        reference = masked_parameters(other)[name]
        close = (parameter.values - reference.values).abs() < 2e-4  # AdamW's steps depend on the sign of tiny gradients
        assert close.double().mean() > 0.99, name
        assert torch.equal(parameter.mask.gather({name: parameter.dense}), parameter.values), name
        outside = ~parameter.mask.to_dense()[name]
        assert torch.equal(parameter.dense.view(torch.int32)[outside], start[name][outside]), name
        moved += int((parameter.values != reference.mask.gather({name: plain.get_parameter(name)})).sum())
    assert moved > 0.3 * mask.nnz  # not the rows of words that do not occur


# ---- training ----


def two_sources(tiny_bert: str, folder, settings=None):
    """A task vector on two source languages, whose texts differ, and their vectors."""
    make, rows = builder(tiny_bert, folder), []
    for number, start in ((0, 0), (1, 400)):
        part = labelled(start, 40 - 12 * number)
        text = [f"{'x y'[2 * number]} {i % 7 * 'z '}{line}" for i, line in enumerate(part["text"])]
        rows.append(Dataset.from_dict({**part.to_dict(), "text": text, "language": [number] * len(part)}))
    parts = [[part.select(range(at, end)) for part in rows] for at, end in ((8, 28), (0, 8))]
    make.corpus.train, make.corpus.validation = map(concatenate_datasets, parts)
    make.corpus.sources = ["a", "b"]
    deltas = [random_delta(models.load_classifier(tiny_bert, LABELS), seed) for seed in (1, 2)]
    return make.task(settings or task_settings(phase(max_steps=4)), by_source=deltas), deltas


class Weights(TrainerCallback):
    """Compares the weights of every batch with theta + the vector of the batch's language."""

    def __init__(self, vector, deltas):
        self.language = {
            tuple(row["input_ids"]): row["language"]
            for rows in (vector.examples.train, vector.examples.validation)
            for row in rows
        }
        self.changes = [whole(delta) for delta in deltas]
        self.seen: dict[tuple[str, bool], list[int]] = {}  # by phase and whether it is training

    def tensors(self, model) -> dict[str, torch.Tensor]:
        found = {name: p for name, p in model.named_parameters() if name in (WORDS, QUERY, BIAS)}
        return {name: p.detach().clone() for name, p in found.items()}

    def on_train_begin(self, args, state, control, model=None, **_):
        self.hook = model.register_forward_hook(self.check, with_kwargs=True)  # afterwards: what it has used
        self.phase = "sparse" if masked_parameters(model) else "dense"
        self.theta = self.tensors(model)

    def on_step_end(self, args, state, control, model=None, **_):
        self.theta = self.tensors(model)

    def on_train_end(self, args, state, control, model=None, **_):
        self.hook.remove()

    def check(self, model, arguments, options, _):
        ids, attention = options["input_ids"], options["attention_mask"].bool()
        (language,) = {self.language[tuple(row[keep].tolist())] for row, keep in zip(ids, attention)}
        for name, found in self.tensors(model).items():
            assert torch.equal(found, self.theta[name] + self.changes[language][name]), name
        self.seen.setdefault((self.phase, model.training), []).append(language)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_batch_sees_the_vector_of_its_language(tiny_bert, tmp_path, accumulation):
    settings = task_settings(phase(max_steps=8, eval_every=3, keep_best=True))
    settings.batch_size, settings.accumulation = 6, accumulation
    vector, deltas = two_sources(tiny_bert, tmp_path, settings)
    spy = Weights(vector, deltas)
    delta, metrics = learn(vector, "lt-sft", dataclasses.replace(RUNTIME, callbacks=(spy,)))
    for name in ("dense", "sparse"):
        training = spy.seen[name, True]
        assert len(training) >= 8
        assert set(training) == set(spy.seen[name, False]) == {0, 1}
        first, second = training[:8], training[8:16]  # 4 batches of each language in an epoch
        assert sorted(first) == [0] * 4 + [1] * 4
        if accumulation == 2:
            assert sorted(second) == sorted(first)
            assert second != first
        assert spy.seen[name, False][:2] == [0, 1]  # validation is not shuffled
    assert delta.metadata["source_vectors"] == ["a", "b"]
    assert [step for step, _ in metrics["validation_macro_f1"]] == [3, 6, 8]


def test_training_twice_gives_equal_bits(tiny_bert, tmp_path):
    settings = task_settings(phase(max_steps=12))
    found = [learn(two_sources(tiny_bert, tmp_path / str(i), settings)[0], "lt-sft", RUNTIME)[0] for i in range(2)]
    assert found[0].mask == found[1].mask
    assert torch.equal(found[0].values.view(torch.int32), found[1].values.view(torch.int32))
    other, _ = two_sources(tiny_bert, tmp_path / "none", settings)
    other.examples.source_vectors = SourceVectors([random_delta(other.load(other.start), 3)] * 2)
    assert not torch.equal(learn(other, "lt-sft", RUNTIME)[0].values, found[0].values)


@pytest.mark.parametrize("step", [5, 9, 11])  # in the first epoch (of 6 steps), and in the second
def test_a_resumed_phase_equals_an_undisturbed_one(tiny_bert, tmp_path, step):
    settings = task_settings(phase(max_steps=12, eval_every=2))
    undisturbed, _ = two_sources(tiny_bert, tmp_path / "whole", settings)
    resumed, _ = two_sources(tiny_bert, tmp_path / "resumed", settings)
    expected = dense_phase(undisturbed, RUNTIME)
    with pytest.raises(RuntimeError, match="power"):
        dense_phase(resumed, dataclasses.replace(RUNTIME, callbacks=(Crash(step),)))
    metrics = dense_phase(resumed, RUNTIME)
    assert metrics["resumed_from"] == f"checkpoint-{step - 1}"
    assert metrics["loss"] == expected["loss"]
    one, other = (bits(vector.load(vector.folder / "dense/model")) for vector in (undisturbed, resumed))
    assert same_bits(one, other)
