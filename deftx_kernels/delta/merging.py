"""merge: several sparse deltas as one, by the methods of model merging."""

from collections.abc import Sequence
from typing import Literal

from deftx_kernels.delta.arithmetic import Terms, largest, thinned, weighted_sum
from deftx_kernels.delta.sparse_delta import SparseDelta, checked_weights, combined
from deftx_kernels.ops.schemas import MAX_SUMMED_MASKS

METHODS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
MergeMethod = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


def merge(
    *deltas: SparseDelta,
    weights: Sequence[float] | None = None,
    method: MergeMethod = "linear",
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    scope: Literal["global", "tensor"] = "global",
    seed: int = 0,
) -> SparseDelta:
    """One delta from several of one base. Methods and their arithmetic are PEFT's, in float64 and rounded once.

    - "linear": the weighted sum.
    - "magnitude_prune": the weighted sum of each delta's largest entries.
    - "dare_linear": the weighted sum of entries kept at random and divided by `density` (Yu et al. 2024).
    - "ties", "dare_ties": each delta's largest entries, or entries kept at random; then the sign is elected for each
      entry, and the weighted values of that sign are averaged (Yadav et al. 2023).

    PEFT and mergekit trim each tensor by itself, as `scope="tensor"` does. mergekit's TIES elects the signs of weighted
    values and divides by the sum of the weights of that sign: the same where all weights are 1. Its DARE scales a
    tensor to its former sum of magnitudes rather than by 1 / density.

    Whole tensors (a head) are united, neither scaled nor pruned. Entries that no delta keeps leave the mask.

    Args:
        weights: factor of each delta, 1 by default. Signs are elected without them.
        density: of magnitude pruning, the largest share of the tensors' elements that a delta keeps, as in PEFT, where
            a delta that has fewer entries keeps all; of "dare", the probability with which an entry is kept. For every
            method but "linear", which has none.
        majority_sign_method: whether the sign is that of the sum ("total") or that of more deltas ("frequency").
        scope: of magnitude pruning, whether the largest entries are those of all tensors together or of each tensor.
        seed: of "dare", in [0, 2**63). The entries depend on it, the delta's place and its entries, not on the device.

    Raises:
        ValueError: bad options; no delta; deltas of different bases; a whole tensor with two values; for every method
            but "linear", NaN or infinite values; more than 64 deltas for the "ties" methods.
        TypeError: something else than a SparseDelta.

    Example:
        >>> import torch
        >>> base = {"w": torch.zeros(4)}
        >>> one = SparseDelta.from_models({"w": torch.tensor([3.0, 1.0, -2.0, 0.0])}, base)
        >>> two = SparseDelta.from_models({"w": torch.tensor([1.0, 2.0, 3.0, 0.5])}, base)
        >>> merge(one, two, method="ties", density=0.75).apply_(base)
        >>> base["w"]
        tensor([2.0000, 1.5000, 3.0000, 0.0000])
    """
    factors = checked_weights(deltas, weights, "merge")
    _check_options(method, density, majority_sign_method, scope, seed)
    terms = [delta.terms for delta in deltas]
    if method != "linear":
        _check_values(deltas, method)
    if density is not None:
        terms = [
            thinned(one, density, seed, number) if method.startswith("dare") else largest(one, density, scope)
            for number, one in enumerate(terms)
        ]
    total = weighted_sum(terms, factors, majority_sign_method if method.endswith("ties") else "none")
    details = {"method": f"merge, {method}", "weights": factors, "merge_density": density}
    return combined(deltas, Terms(*total), details)


def _check_values(deltas: Sequence[SparseDelta], method: str) -> None:
    if method.endswith("ties") and len(deltas) > MAX_SUMMED_MASKS:
        raise ValueError(f"method {method!r} merges at most {MAX_SUMMED_MASKS} deltas, got {len(deltas)}")
    for i, delta in enumerate(deltas):
        for name, values in delta.mask.split(delta.values).items():
            if not bool(values.isfinite().all()):
                raise ValueError(f"deltas[{i}] has NaN or infinite values in tensor {name!r}: only 'linear' takes them")


def _check_options(method: str, density: float | None, majority_sign_method: str, scope: str, seed: int) -> None:
    for name, value, choices in (
        ("method", method, METHODS),
        ("majority_sign_method", majority_sign_method, ("total", "frequency")),
        ("scope", scope, ("global", "tensor")),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if method == "linear":
        if density is not None:
            raise ValueError(f"density: method 'linear' prunes nothing, got {density}")
    elif isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1 for method {method!r}, got {density!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an integer in [0, 2**63), got {seed!r}")
