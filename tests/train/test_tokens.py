"""Tokenized examples: alignment of word labels, blocks of text, masks."""

import pytest
import torch
from datasets import Dataset

from deftx_kernels.train.models import load_tokenizer
from deftx_kernels.train.tokens import (
    IGNORED,
    MaskedLanguageCollator,
    mask_once,
    task_collator,
    tokenize_task,
    tokenize_text,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert):
    return load_tokenizer(tiny_bert)


def test_pairs_are_joined(tokenizer):
    rows = Dataset.from_dict({"text": ["good room"], "text_pair": ["bad food"], "label": ["b"]})
    row = tokenize_task(rows, tokenizer, ["a", "b"], 16)[0]
    assert row["labels"] == 1
    assert tokenizer.decode(row["input_ids"]) == "[CLS] good room [SEP] bad food [SEP]"


def test_a_word_s_tag_goes_to_its_first_token(tokenizer):
    rows = Dataset.from_dict({"tokens": [["the", "xyz", "room"]], "tags": [["D", "N", "N"]]})
    row = tokenize_task(rows, tokenizer, ["D", "N"], 16)[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "the", "x", "##y", "##z", "room", "[SEP]"]
    assert row["labels"] == [IGNORED, 0, 1, IGNORED, IGNORED, 1, IGNORED]
    short = {name: values[:3] for name, values in row.items()}
    batch = task_collator(tokenizer, "token-classification")([row, short])
    assert batch["labels"].shape == (2, 7)
    assert (batch["labels"][1, 3:] == IGNORED).all()


def test_packing_keeps_every_token_in_order(tokenizer):
    texts = [f"the room was {w}" for w in ("good", "bad", "lovely", "awful", "xyz")]
    rows = tokenize_text(Dataset.from_dict({"text": texts}), tokenizer, 10, pack=True)["input_ids"]
    assert all(
        row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id and len(row) <= 10 for row in rows
    )
    every = tokenizer(" ".join(texts), add_special_tokens=False)["input_ids"]
    assert [token for row in rows for token in row[1:-1]] == every
    alone = tokenize_text(Dataset.from_dict({"text": texts}), tokenizer, 5, pack=False)["input_ids"]
    assert len(alone) == len(texts)
    assert all(len(row) == 5 for row in alone)


def test_every_text_has_a_masked_token_and_specials_never(tokenizer):
    collator = MaskedLanguageCollator(tokenizer, probability=0.01)
    texts = [
        {"input_ids": tokenizer(text)["input_ids"]}
        for text in ("good", "the room", "a", "the food was very good and nice")
    ]
    for epoch in range(30):
        collator.epoch = epoch
        batch = collator(texts)
        labelled = batch["labels"] != IGNORED
        assert (labelled.sum(1) >= 1).all()
        special = torch.isin(batch["labels"][labelled], torch.tensor(tokenizer.all_special_ids))
        assert not special.any()
        assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()


def test_share_of_masked_random_and_unchanged_tokens(tokenizer):
    ids = tokenizer(" ".join(["room"] * 20000), add_special_tokens=False)["input_ids"]
    masked, labels = (torch.tensor(part) for part in MaskedLanguageCollator(tokenizer, 0.15).mask(ids))
    chosen = labels != IGNORED
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (masked[chosen] == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (masked[chosen] == ids[0]).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert (masked[~chosen] == ids[0]).all()


def test_masks_depend_on_text_seed_and_epoch_alone(tokenizer):
    ids = tokenizer("the food was very good and nice and lovely")["input_ids"]
    first = MaskedLanguageCollator(tokenizer, 0.4)
    torch.manual_seed(1)
    a = first.mask(ids)
    torch.manual_seed(2)
    assert a == first.mask(ids) == MaskedLanguageCollator(tokenizer, 0.4).mask(ids)
    later = [MaskedLanguageCollator(tokenizer, 0.4, epoch=epoch).mask(ids) for epoch in range(1, 6)]
    assert any(a != b for b in later)
    fixed = mask_once(Dataset.from_dict({"input_ids": [ids]}), first)
    assert first([fixed[0]])["labels"][0].tolist() == a[1]


def test_a_tokenizer_without_mask_token_is_refused(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        MaskedLanguageCollator(other)


def test_texts_without_a_known_token_are_left_out(tokenizer):
    texts = Dataset.from_dict({"text": ["\u200b", "the room", "语言"]})
    assert [len(tokenize_text(texts, tokenizer, 16, pack)) for pack in (False, True)] == [1, 1]
    for pack in (False, True):
        with pytest.raises(ValueError, match="no token of its vocabulary"):
            tokenize_text(texts.select([0, 2]), tokenizer, 16, pack)
