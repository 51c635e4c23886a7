"""The docstring of each public name has an example, and it runs as it stands."""

import doctest

import pytest
import torch
import torch.distributed as dist

import deftx_kernels
from deftx_kernels import distributed

NAMES = [name for name in deftx_kernels.__all__ if name != "interop"]
EXAMPLES = [(deftx_kernels, name) for name in NAMES]
EXAMPLES += [(distributed, name) for name in ("init_mask", "select_mask", "svd_denoise", "topk_mask")]
IMPORTED = {"torch": torch, "nn": torch.nn, **{name: getattr(deftx_kernels, name) for name in deftx_kernels.__all__}}


@pytest.mark.parametrize(("module", "name"), EXAMPLES)
def test_example(module, name, tmp_path, monkeypatch):
    if module is distributed and not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    monkeypatch.chdir(tmp_path)
    public = getattr(module, name)
    [found] = doctest.DocTestFinder(recurse=False).find(public, name, globs=dict(IMPORTED))
    assert found.examples, f"{name} has no Example section"
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(found)
    assert not failed
