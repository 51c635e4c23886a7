"""The Python of README and guide runs as it stands, in order, in one session; their commands and files exist."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README, GUIDE = "README.md", "deftx_kernels/README.md"


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    session: dict = {"__name__": "readme"}  # the guide continues README's
    for file in (README, GUIDE):
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text(), re.MULTILINE | re.DOTALL)
        assert blocks
        for i, block in enumerate(blocks):
            exec(compile(block, f"{file}, python block {i + 1}", "exec"), session)


@pytest.mark.parametrize("file", [README, GUIDE, "CONTRIBUTING.md"])
def test_links_and_paths(file):
    text = (ROOT / file).read_text()
    links = [t for t in re.findall(r"\]\(([^)]+)\)", text) if "://" not in t]
    files = [t.partition("#")[0] for t in links]
    paths = re.findall(r"`((?:deftx_kernels|csrc|bench|tests|docs)/[\w./-]+)`", text)
    assert not [t for t in files if t and not ((ROOT / file).parent / t).exists()]
    assert not [t for t in paths if not (ROOT / t).exists()]
    heads = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert not [t for t in links if t.startswith("#") and t[1:] not in heads]


@pytest.mark.parametrize("file", [README, "CONTRIBUTING.md"])
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
