"""The tensors of sparsified models."""

from torch import Tensor, nn

from deftx_kernels.nn.entries import Entry, MaskedParameter
from deftx_kernels.nn.modules import Masked
from deftx_kernels.validation import plain_name, reshard


def masked_parameters(model: nn.Module) -> dict[str, MaskedParameter]:
    """Name in the plain model → masked parameter, tied ones once; empty for a model that is not sparsified."""
    reshard(model)
    entries: dict[str, Entry] = {}
    for module in model.modules():
        for entry in module._masked_entries.values() if isinstance(module, Masked) else ():
            entry.find_shards()
            if entries.setdefault(entry.name, entry) is not entry:
                raise ValueError(f"two masked tensors are named {entry.name!r}: sparsify the whole model in one call")
    return {name: MaskedParameter(e.dense, e.values, e.mask) for name, e in sorted(entries.items())}


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`named_parameters()` of the plain model: for a sparsified one the synchronised dense tensors, without values.
    Names as without torch.compile and activation checkpointing. Of a model sharded with FSDP2 they are DTensors, which
    hold the values as of the last step of an optimizer or `load_state_dict`.
    """
    reshard(model)
    values = set()
    for module in model.modules():
        if isinstance(module, Masked):
            for attr, entry in module._masked_entries.items():
                entry.find_shards()
                if not entry.is_sharded:
                    module._masked(attr)
                values.add(id(entry.values))
    return {plain_name(name): p for name, p in model.named_parameters() if id(p) not in values}
