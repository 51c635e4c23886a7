"""The docstring of each public name has an example, and it runs as it stands."""

import doctest

import pytest
import torch

import deftx_kernels

NAMES = [name for name in deftx_kernels.__all__ if name != "interop"]
IMPORTED = {"torch": torch, "nn": torch.nn, **{name: getattr(deftx_kernels, name) for name in deftx_kernels.__all__}}


@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public = getattr(deftx_kernels, name)
    [found] = doctest.DocTestFinder(recurse=False).find(public, name, globs=dict(IMPORTED))
    assert found.examples, f"{name} has no Example section"
    failed, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS).run(found)
    assert not failed
