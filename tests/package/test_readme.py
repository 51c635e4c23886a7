"""The README's Python runs as it stands, in order, in one session and without network; its commands and files exist."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python(tmp_path, monkeypatch):
    assert len(BLOCKS) >= 2
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session: dict = {"__name__": "readme"}
    for i, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, python block {i + 1}", "exec"), session)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_links_and_paths(file):
    text = (ROOT / file).read_text()
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in t]
    paths = re.findall(r"`((?:deftx_kernels|csrc|bench|tests|docs)/[\w./-]+)`", text)
    assert not [t for t in {*targets, *paths} if not (ROOT / t).exists()]


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md"])
def test_make_targets(file):
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"`[^`]*`|^ {4}.*$", (ROOT / file).read_text(), re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join(code)))
    assert named
    assert named <= known


def test_make_help_lists_every_target():
    text = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert sorted(re.findall(r"^make (\S+)", text, re.MULTILINE)) == sorted(phony)
