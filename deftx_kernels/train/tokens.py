"""From text to tensors: tokenized data sets and the collator for masked language modelling."""

import hashlib
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, PreTrainedTokenizerBase

IGNORED = -100  # label of positions that do not enter the loss


def tokenize_task(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, labels: list[str], max_length: int) -> Dataset:
    """Task rows as input_ids, attention_mask, labels and, where they have it, language.

    A word's first token has its tag, the others IGNORED. Words that max_length cuts off are not scored.
    """
    ids = {label: i for i, label in enumerate(labels)}

    def texts(batch):
        pair = batch.get("text_pair")
        out = tokenizer(batch["text"], pair, truncation=True, max_length=max_length)
        return {**out, "labels": [ids[label] for label in batch["label"]]}

    def words(batch):
        out = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
        aligned = []
        for i, tags in enumerate(batch["tags"]):
            words = out.word_ids(i)
            first = [word is not None and word != before for word, before in zip(words, [None, *words])]
            aligned.append([ids[tags[word]] if is_first else IGNORED for word, is_first in zip(words, first)])
        return {**out, "labels": aligned}

    function = words if "tokens" in dataset.column_names else texts
    unused = [name for name in dataset.column_names if name != "language"]
    return dataset.map(function, batched=True, remove_columns=unused)


def task_collator(tokenizer: PreTrainedTokenizerBase, task: str):
    """Pads a batch of task rows."""
    if task == "token-classification":
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorWithPadding(tokenizer)


def check_known(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raises ValueError where no text of unlabelled rows has a token of the vocabulary. Ends at the first that has."""
    special = set(tokenizer.all_special_ids)
    for batch in dataset.iter(1000):
        rows = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        if not all(special.issuperset(row) for row in rows):
            return
    raise ValueError(f"{where}: the tokenizer finds no token of its vocabulary in it")


def tokenize_text(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, pack: bool) -> Dataset:
    """Unlabelled rows as input_ids, for `MaskedLanguageCollator`.

    With `pack`, all texts are joined and cut into blocks of max_length tokens (the last, shorter one included). Rows of
    special tokens alone (texts without a token of the vocabulary) are left out: none of their tokens can be masked.

    Raises:
        ValueError: nothing is left.
    """
    texts = list(dataset["text"])
    if pack:
        word, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(word)] == word)
        before, after = whole[:start], whole[start + len(word) :]  # such as [CLS] and [SEP]
        joined = [token for text in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in text]
        size = max_length - len(before) - len(after)
        rows = [before + joined[start : start + size] + after for start in range(0, len(joined), size)]
    else:
        rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    special = set(tokenizer.all_special_ids)
    rows = [row for row in rows if not special.issuperset(row)]
    if not rows:
        raise ValueError("text: the tokenizer finds no token of its vocabulary in it")
    return Dataset.from_dict({"input_ids": rows})


@dataclass
class MaskedLanguageCollator:
    """Pads a batch and masks tokens for masked language modelling: 80 % <mask>, 10 % a random token, 10 % unchanged.

    Every text has at least one masked token, also a short one. The masks of a text depend on its tokens, `seed` and
    `epoch` alone: they change from epoch to epoch, and are the same in a resumed run. Rows that already have labels
    (`mask_once`) are only padded.

    Raises:
        ValueError: the tokenizer has no mask token.
    """

    tokenizer: PreTrainedTokenizerBase
    probability: float = 0.15
    seed: int = 0
    epoch: int = 0

    def __post_init__(self):
        if self.tokenizer.mask_token_id is None:
            raise ValueError(f"{type(self.tokenizer).__name__} has no mask token: masked language modelling needs one")
        self._special = torch.tensor(self.tokenizer.all_special_ids)

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        pairs = [(row["input_ids"], row["labels"]) if "labels" in row else self.mask(row["input_ids"]) for row in rows]
        batch = self.tokenizer.pad([{"input_ids": ids} for ids, _ in pairs], return_tensors="pt")
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([list(labels) + [IGNORED] * (width - len(labels)) for _, labels in pairs])
        return dict(batch)

    def mask(self, input_ids: list[int]) -> tuple[list[int], list[int]]:
        """(masked ids, labels) of one text; IGNORED where no token is masked."""
        ids = torch.tensor(input_ids)  # [length]
        content = hashlib.blake2b(repr((self.seed, self.epoch, list(input_ids))).encode(), digest_size=7).digest()
        random = torch.Generator().manual_seed(int.from_bytes(content))
        special = torch.isin(ids, self._special)
        draw, kind = torch.rand(2, len(ids), generator=random)
        draw = draw.masked_fill(special, 2.0)
        chosen = ((draw < self.probability) | (torch.arange(len(ids)) == draw.argmin())) & ~special
        others = torch.randint(len(self.tokenizer), ids.shape, generator=random)
        masked = ids.masked_fill(chosen & (kind < 0.8), self.tokenizer.mask_token_id)
        masked = torch.where(chosen & (kind >= 0.9), others, masked)
        return masked.tolist(), ids.masked_fill(~chosen, IGNORED).tolist()


def mask_once(dataset: Dataset, collator: MaskedLanguageCollator) -> Dataset:
    """Tokenized text with masks that stay the same, so that validation losses can be compared between steps."""
    pairs = [collator.mask(ids) for ids in dataset["input_ids"]]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]})
