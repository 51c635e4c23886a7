"""Training on several source languages: batches of one language, each with that language's vector applied."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.data import Sampler

from deftx_kernels.delta import SparseDelta
from deftx_kernels.nn import entries_of
from deftx_kernels.validation import plain_name


class LanguageBatches(Sampler[list[int]]):
    """Batches (lists of indices) of examples of one language. A batch sampler for `torch.utils.data.DataLoader`.

    Args:
        languages: the language of each example, as an index.
        batch_size: examples in a batch; the last batch of a language may have fewer.
        seed: of the order of examples and batches, which is another one in each epoch; None keeps the data's order.
    """

    def __init__(self, languages: Sequence[int], batch_size: int, seed: int | None = None):
        self.by_language = [
            [i for i, x in enumerate(languages) if x == language] for language in sorted(set(languages))
        ]
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer at the beginning of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(-(-len(indices) // self.batch_size) for indices in self.by_language)

    def __iter__(self) -> Iterator[list[int]]:
        random = None if self.seed is None else torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = []
        for indices in self.by_language:
            order = range(len(indices)) if random is None else torch.randperm(len(indices), generator=random).tolist()
            batches += [
                [indices[i] for i in order[start : start + self.batch_size]]
                for start in range(0, len(indices), self.batch_size)
            ]
        order = range(len(batches)) if random is None else torch.randperm(len(batches), generator=random).tolist()
        return iter([batches[i] for i in order])


class SourceVectors:
    """The vectors of the source languages, one of which is in the weights during a forward and its backward.

    Args:
        deltas: by the index of the language. They have no whole tensors.
    """

    def __init__(self, deltas: Sequence[SparseDelta]):
        self.deltas = list(deltas)

    @contextmanager
    def applied(self, model: nn.Module, language: int) -> Iterator[None]:
        """`with vectors.applied(model, 0):` the vector is added. Afterwards the model has its former bits.

        Works on plain and sparsified models; O(entries of the vector and of the model's mask).
        """
        delta = self.deltas[language]
        device = next(model.parameters()).device
        if delta.mask.device != device:
            delta = self.deltas[language] = delta.to(device)
        tensors = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        weights = {name: tensors[name] for name in delta.mask.names}
        masked = entries_of(model.parameters()).values()
        with torch.no_grad():
            for entry in masked:
                entry.synchronise()
            before = delta.mask.gather(weights)
            values = [entry.values.clone() for entry in masked]
            delta.mask.add_(weights, delta.values)  # the values of a masked module follow its weight
        try:
            yield
        finally:
            with torch.no_grad():
                delta.mask.scatter_(weights, before)
                for entry, kept in zip(masked, values):  # an optimizer step may come before their next use
                    entry.values.copy_(kept)
                    entry.write_values()  # marks both as equal: the next vector changes the weights alone
