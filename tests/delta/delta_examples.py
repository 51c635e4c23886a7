"""Models, deltas and comparisons that the tests of deltas share."""

import json

import torch
from safetensors.torch import save_file
from torch import nn

from deftx_kernels import SparseDelta, topk_mask
from deftx_kernels.delta import CONFIG_NAME, WEIGHTS_NAME
from deftx_kernels.delta.storage import checksum

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.detach().contiguous().view(BITS[tensor.element_size()])


def state(model):
    return model.state_dict() if isinstance(model, nn.Module) else model


def same(one, other):
    """Whether two models (or mappings) have the same tensors, bit for bit."""
    one, other = state(one), state(other)
    return one.keys() == other.keys() and all(torch.equal(bits(one[n]), bits(other[n])) for n in one)


def clones(model):
    return {n: t.clone() for n, t in state(model).items()}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"enc.weight": (6, 5), "enc.bias": (6,), "emb.weight": (9, 4), "cube": (2, 3, 2)}
    return {n: torch.randn(s, generator=generator) for n, s in shapes.items()}


def tune(base, seed=1):
    """A tuned model that differs in 30 % of the entries, and the mask of these."""
    generator = torch.Generator().manual_seed(seed)
    mask = topk_mask({n: torch.randn(t.shape, generator=generator) for n, t in base.items()}, density=0.3)
    tuned = clones(base)
    return mask.scatter_(tuned, mask.gather(tuned) + 0.1 * torch.randn(mask.nnz, generator=generator)), mask


def deltas_of(base, *seeds):
    return [SparseDelta.from_models(tune(base, seed)[0], base) for seed in seeds]


def shifted(model, by):
    """The delta that adds `by` to every parameter."""
    return SparseDelta.from_models({n: p + by for n, p in model.named_parameters()}, model)


def exact_pair():
    """A base and a tuned tensor of which some entries need a low term, and a tensor before them that needs none."""
    base = {"a": torch.ones(3), "b": torch.tensor([1.0, 1.0, 0.0, -3e38, 2.0])}
    tuned = {"a": torch.full((3,), 1.5), "b": torch.tensor([1e-9, 1.5, -0.0, 3e38, 2.0])}
    return tuned, base


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.emb.weight


def save_version_2(delta, folder):
    """As the library wrote deltas with crow_indices."""
    stored = {"crow_indices": delta.mask.crow_indices, "col_indices": delta.mask.col_indices, "values": delta.values}
    if delta.low is not None:
        stored |= {"low_indices": delta.low[0].to(torch.int32), "low_values": delta.low[1]}
    stored |= {f"dense.{n}": t for n, t in delta.dense.items()}
    config = {"names": delta.mask.names, "shapes": [list(s) for s in delta.mask.shapes], "dense": sorted(delta.dense)}
    config["metadata"] = delta.metadata
    config = json.loads(json.dumps({"format": "deftx_sparse_delta", "format_version": 2, **config}))
    config["content"] = checksum(config, stored)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_NAME).write_text(text)
    save_file(stored, folder / WEIGHTS_NAME, {"format": "deftx_sparse_delta", "config": text})
