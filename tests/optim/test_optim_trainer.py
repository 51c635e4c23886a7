"""SparseAdamW as the optimizer of transformers.Trainer."""

import pytest
import torch

from deftx_kernels import SparseAdamW, densify, sparsify, topk_mask

pytest.importorskip("transformers")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

STEPS, HALF, LR = 40, 20, 1e-2


class Examples(torch.utils.data.Dataset):
    """Random tokens; the first one tells the label."""

    def __init__(self):
        self.ids = torch.randint(0, 6, (40, 4), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i, 0] % 2}


class Watch(TrainerCallback):
    """What each step saw; ends the process, as it were, after `stop` steps."""

    def __init__(self, stop=None):
        self.stop, self.lr, self.norms, self.losses = stop, [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, model=None, **_):
        self.lr.append(optimizer.param_groups[0]["lr"])
        self.norms.append(float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))

    def on_log(self, args, state, control, logs=None, **_):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.stop


def make_model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=6,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)  # with dropout: resuming restores random numbers, too


def make_mask(model):
    scores = {
        n: p.detach()
        for n, p in model.named_parameters()
        if p.dim() == 2 and "classifier" not in n and "pooler" not in n
    }
    return topk_mask(scores, density=0.1)


def run(folder, sparsified, stop=None, resume=None, **options):
    model = make_model()
    mask = make_mask(model)
    if sparsified:
        sparsify(model, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=LR, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=3, max_steps=STEPS, save_steps=HALF,
        per_device_train_batch_size=5, gradient_accumulation_steps=2, max_grad_norm=0.5, logging_steps=1,
        dataloader_pin_memory=False,
    )  # fmt: skip
    watch = Watch(stop)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Examples(), optimizers=(optimizer, scheduler), callbacks=[watch]
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == (stop or STEPS)
    return dict((densify(model) if sparsified else model).named_parameters()), watch


@pytest.mark.parametrize(
    ("sparsified", "options"),
    [
        (False, {}),
        (True, {}),
        (True, {"state_dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 1}),
    ],
    ids=["plain", "sparsified", "sparsified, bfloat16 state"],
)
def test_trainer(tmp_path, sparsified, options):
    """Learns, by the schedule and with clipped gradients; only the mask's entries move; an interrupted run ends the
    same.
    """
    start = dict(make_model().named_parameters())
    whole, watch = run(tmp_path / "whole", sparsified, **options)
    assert sum(watch.losses[-8:]) < 0.7 * sum(watch.losses[:8])
    assert watch.lr == pytest.approx([LR * (1 - i / STEPS) for i in range(STEPS)])
    assert max(watch.norms) < 0.501
    assert sum(norm > 0.499 for norm in watch.norms) > 2  # clipping was at work
    for name, chosen in make_mask(make_model()).to_dense().items():
        assert torch.equal(whole[name][~chosen].view(torch.int32), start[name][~chosen].view(torch.int32)), name
    moved = [n for n in whole if not torch.equal(whole[n], start[n])]
    assert len(moved) > 0.8 * len(whole)

    run(tmp_path / "broken", sparsified, stop=HALF, **options)
    resumed, rest = run(tmp_path / "broken", sparsified, resume=str(tmp_path / f"broken/checkpoint-{HALF}"), **options)
    assert rest.lr == watch.lr[HALF:]
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.int32), resumed[name].view(torch.int32)), name
