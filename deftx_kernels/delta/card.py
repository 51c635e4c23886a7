"""The model card of a delta: the README.md of its repository on the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

from deftx_kernels.mask import CSRMask

CARD_NAME = "README.md"
_TEXT = """
# {repo_id}

A sparse delta: the differences of {nnz:,} of {numel:,} weights ({density:.3%}) of {base}, made with
[deftx-kernels](https://pypi.org/project/deftx-kernels/) by the method `{method}`.{whole}{lossy}

```python
from transformers import AutoModel

from deftx_kernels import SparseDelta

model = AutoModel.from_pretrained({base_id!r})
delta = SparseDelta.from_pretrained({repo_id!r})
delta.apply_(model)  # or, for a while: with delta.applied(model):
```
"""


def model_card(repo_id: str, mask: CSRMask, dense: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    """The text of the card, with the data that the hub reads in its first lines (YAML)."""
    from huggingface_hub import ModelCard, ModelCardData

    base, method = metadata.get("base_model"), str(metadata.get("method", "unknown"))
    known = isinstance(base, str) and _is_repo_id(base)
    data = ModelCardData(
        base_model=base if known else None,
        base_model_relation="adapter" if known else None,
        library_name="deftx-kernels",
        tags=["sparse-fine-tuning", "sparse-delta", method],
        density=mask.density,
        method=method,
    )
    text = _TEXT.format(
        repo_id=repo_id,
        nnz=mask.nnz,
        numel=mask.numel,
        density=mask.density,
        base=f"`{base}`" if known else "its base model",
        method=method,
        whole=f" It replaces {', '.join(f'`{n}`' for n in sorted(dense))} as a whole." if dense else "",
        lossy=f" Its values were rounded to {metadata['lossy']}." if metadata.get("lossy") else "",
        base_id=base if known else "BASE_MODEL",
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def _is_repo_id(name: str) -> bool:
    """Whether the name can be that of a repository of the hub: a folder's path is not written into a card."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
