"""Batches of several processes: those of one process, each divided among the ranks.

So the order of the examples, the number of steps, losses and scores are those of one process, up to rounding and
dropout. (Trainer's own sharding gives each rank other batches, and repeats examples at the end of an epoch.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import set_seed

from deftx_kernels.train.processes import rank, world_size
from deftx_kernels.train.tokens import IGNORED


@dataclass
class RankPart:
    """A collate function that keeps this rank's part of a batch, of which every rank reads all rows.

    The parts have the same size: the last ones may have copies of the last row, with labels IGNORED. Two numbers are
    added to the batch: `rows`, of all ranks, and, where the rows have labels, `share`: this rank's labelled positions
    relative to their mean over ranks.
    """

    collator: Callable[[list[dict]], Mapping[str, Any]]

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        size = -(-len(rows) // world_size())
        mine = rows[rank() * size : (rank() + 1) * size]
        batch = dict(self.collator(mine + rows[-1:] * (size - len(mine))))
        batch["labels"][len(mine) :] = IGNORED
        batch["rows"] = len(rows)
        if "labels" in rows[0]:
            batch["share"] = _labelled(mine) * world_size() / max(1, _labelled(rows))
        return batch


def _labelled(rows: list[dict]) -> int:
    labels = (row["labels"] for row in rows)  # of a row: one, or one for each token
    return sum(label != IGNORED for found in labels for label in (found if isinstance(found, list) else [found]))


class LengthGroups(LengthGroupedSampler):
    """The order of `group_by_length`, by seed and epoch. Trainer's is by the state of the random generator, which
    a phase that is resumed within an epoch does not have.
    """

    def __init__(self, batch_size: int, dataset, seed: int):
        super().__init__(batch_size, dataset=dataset)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called at the beginning of each epoch."""
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)


class SeedOfRank(TrainerCallback):
    """Another seed on each rank, for dropout: Trainer has set that of rank 0."""

    def on_train_begin(self, args, state, control, **_):
        if rank() > 0:
            set_seed((args.seed + 1_000_003 * rank()) % 2**32)


class GlobalBatchTrainer(Trainer):
    """A Trainer whose batches of several processes are those of one process.

    Its batch sizes `per_device_...` are those of a rank. In one process nothing is changed, but that `group_by_length`
    has the same order after a resumption.
    """

    rows = 0  # of the evaluated batch

    # ---- data ----

    def get_train_dataloader(self):
        if world_size() == 1:
            return super().get_train_dataloader()
        size, data = self.args.train_batch_size * world_size(), self._remove_unused_columns(self.train_dataset)
        return self.divided(data, batch_size=size, sampler=self._get_train_sampler())

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)  # accelerate gives it a seed
        size = args.train_batch_size * world_size() * args.gradient_accumulation_steps
        return LengthGroups(size, self.train_dataset if train_dataset is None else train_dataset, args.data_seed)

    def get_eval_dataloader(self, eval_dataset=None):
        if world_size() == 1:
            return super().get_eval_dataloader(eval_dataset)
        args, size = self.args, self.args.eval_batch_size * world_size()
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        sampler = SequentialSampler(dataset)
        if args.train_sampling_strategy == "group_by_length":  # as Trainer does
            generator = torch.Generator().manual_seed(args.data_seed)
            sampler = LengthGroupedSampler(size, dataset=dataset, generator=generator)
        return self.divided(self._remove_unused_columns(dataset), batch_size=size, sampler=sampler)

    def get_test_dataloader(self, test_dataset):
        return self.get_eval_dataloader(test_dataset)

    def divided(self, dataset, **options) -> DataLoader:
        """A loader of batches that are divided among the ranks. `options` of DataLoader: which batches."""
        options |= {"collate_fn": RankPart(self.data_collator), "pin_memory": self.args.dataloader_pin_memory}
        return prepare_data_loader(
            DataLoader(dataset, **options),
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )

    # ---- losses and outputs ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        if world_size() > 1 and not isinstance(model, DistributedDataParallel):
            raise RuntimeError("Trainer did not wrap the model in DDP: each rank would train its own")
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over this rank's labelled positions, times its share: the ranks' mean is that over all of them."""
        inputs = dict(inputs)
        share = inputs.pop("share", None)
        inputs.pop("rows", None)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if share is not None:  # without labelled positions the loss is NaN, and so are its gradients
            loss = loss * share if share else outputs["logits"].float().sum() * 0
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if world_size() > 1:
            self.rows = inputs["rows"]
        loss, *outputs = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if world_size() > 1 and loss is not None:
            loss = self.accelerator.reduce(loss, "mean")
        return (loss, *outputs)

    def evaluation_loop(self, *arguments, **options):
        if world_size() > 1:  # Trainer's own expects that only the last batch is smaller
            self.gather_function = self._gathered
        try:
            return super().evaluation_loop(*arguments, **options)
        finally:
            if not self.is_in_train:  # with accelerate's mark of a model prepared for evaluation, DDP would be left out
                self.model.__dict__.pop("_is_accelerate_prepared", None)

    def _gathered(self, values: Tensor | tuple) -> Tensor | tuple:
        """The values of all ranks in the order of the rows, without padding."""
        if isinstance(values, tuple):
            return tuple(map(self._gathered, values))
        return self.accelerator.gather(values)[: self.rows]
