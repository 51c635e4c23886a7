"""The mask of a weight of experts, [experts, m, n], as one mask for each expert."""

import warnings

import torch

from deftx_kernels.mask import CSRMask


def masks_of_experts(mask: CSRMask) -> tuple[CSRMask, ...]:
    """The masks of the matrices [m, n] of a tensor [experts, m, n], each of whose rows in the mask is such a matrix."""
    (name,), ((experts, m, n),) = mask.names, mask.shapes
    starts = mask.crow_indices.tolist()
    row_starts = torch.arange(0, (m + 1) * max(n, 1), max(n, 1), device=mask.device)
    masks = []
    for e in range(experts):
        columns = mask.col_indices[starts[e] : starts[e + 1]].to(torch.int64)
        crow_indices = torch.searchsorted(columns, row_starts)
        masks.append(CSRMask.unchecked((f"{name}[{e}]",), ((m, n),), crow_indices, columns % max(n, 1)))
    return tuple(masks)


class ExpertMasks:
    """The masks of the experts of one entry, made when they are first needed."""

    def __init__(self) -> None:
        self.mask: CSRMask | None = None
        self.masks: tuple[CSRMask, ...] = ()
        self.has_warned = False

    def __reduce__(self):  # copies of the model make their own
        return ExpertMasks, ()

    def of(self, mask: CSRMask) -> tuple[CSRMask, ...]:
        if self.mask is not mask:
            self.mask, self.masks = mask, masks_of_experts(mask)
        return self.masks

    def warn(self, name: str) -> None:
        """That a dense gradient is computed, once."""
        if not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"the gradient of {name!r}, weights of experts, is computed as a dense tensor and gathered: in a "
                "captured step, and where their module's forward uses them for anything but matrix products with one "
                "expert, torch.bmm and grouped_mm, or other code reads them",
                stacklevel=2,
            )
