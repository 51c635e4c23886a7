"""A folder of language vectors that several runs share."""

import json
import shutil
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch
from test_pipeline import quiet, settings
from train_tiny import sentence, write_csv

from deftx_kernels import SparseDelta
from deftx_kernels.train import pipeline, recipes
from deftx_kernels.train import vectors as vectors_module
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, SelectionConfig
from deftx_kernels.train.data_config import NusaxData


def shared(model: str, nusax: Path, folder: Path, **changes):
    defaults = {
        "language_vectors": folder.parent / "languages",
        "recipes": ["lt-sft"],
        "cost_steps": 0,
        "data": NusaxData(nusax, ["source"], ["first"]),
    }
    return settings(model, nusax, folder, **{**defaults, **changes})


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The folders of the phases that are trained, without those before phases/."""
    found: list[str] = []

    def spy(model, examples, config, phase, folder, *arguments, train=recipes.train_phase, **options):
        found.append(str(folder).partition("phases/")[2])
        return train(model, examples, config, phase, folder, *arguments, **options)

    monkeypatch.setattr(recipes, "train_phase", spy)
    monkeypatch.setattr(vectors_module, "train_phase", spy)
    return found


FIRST = ["mlm-head", "language-first/dense", "language-first/lt-sft"]
TASK = ["task/dense", "task/lt-sft"]


def test_a_second_run_trains_no_language_phase(tiny_bert, nusax_folder, tmp_path, trained):
    one = shared(tiny_bert, nusax_folder, tmp_path / "one", seeds=[3, 4])
    first = pipeline.run(one, quiet())
    assert trained == TASK + FIRST + TASK
    trained.clear()
    delta = SparseDelta.from_pretrained(tmp_path / "languages/deltas/lt-sft/language-first")
    assert delta.metadata["seed"] == 0
    assert not (tmp_path / "one/deltas/lt-sft/language-first").exists()
    assert not list((tmp_path / "one/phases").glob("language-*"))
    languages = [phase for phase in first["phases"] if phase["vector"] == "language-first"]
    assert [phase["method"] for phase in languages] == ["dense", "lt-sft"]  # once, not for each seed
    assert {phase["seed"] for phase in languages} == {0}
    assert "| language-first |" in (tmp_path / "one/report.md").read_text()

    second = pipeline.run(shared(tiny_bert, nusax_folder, tmp_path / "two", seeds=[4]), quiet())
    assert trained == TASK
    kept = [score for score in first["scores"] if score["seed"] == 4]
    assert second["scores"] == kept
    trained.clear()
    both = NusaxData(nusax_folder, ["source"], ["first", "second"])
    pipeline.run(shared(tiny_bert, nusax_folder, tmp_path / "three", data=both, recipes=["lt-sft:k=99"]), quiet())
    new = "language-second/dense", "language-first/lt-sft-k=99", "language-second/lt-sft-k=99"
    assert sorted(trained) == sorted([*new, "task/dense", "task/lt-sft-k=99"])
    again = SparseDelta.from_pretrained(tmp_path / "languages/deltas/lt-sft/language-first")
    assert torch.equal(again.values, delta.values)


@pytest.fixture
def used(tiny_bert, nusax_folder, tmp_path, trained):
    """A folder that has the vector of one language."""
    pipeline.run(shared(tiny_bert, nusax_folder, tmp_path / "one"), quiet())
    trained.clear()
    return tmp_path / "languages"


def test_what_does_not_fit_is_refused_before_any_training(tiny_bert, nusax_folder, tmp_path, used, trained):
    def refused(message: str, model=tiny_bert, **changes):
        before = {path: path.read_bytes() for path in used.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=f"language_vectors .*{message}"):
            pipeline.run(shared(model, nusax_folder, tmp_path / "two", **changes), quiet())
        assert not trained
        assert before == {path: path.read_bytes() for path in used.rglob("*") if path.is_file()}
        shutil.rmtree(tmp_path / "two", ignore_errors=True)

    phase = PhaseConfig(lr=1e-2, max_steps=2, keep_best=False)
    language = LanguageConfig(SelectionConfig(), phase, phase, max_length=24)
    refused(
        r"languages holds a run with other settings \(settings.dense.max_steps: 3 → 2; .*choose another$",
        language=language,
    )
    refused("holds a run with other settings", language=language, overwrite=True)
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.2}))
    refused(r"holds a run with other content of its inputs \(model\)", str(other))

    # a language without a vector yet comes first: it isn't trained either
    rows = [(i, *sentence(i + 500)) for i in range(48)]
    write_csv(nusax_folder / "first/train.csv", rows)
    both = NusaxData(nusax_folder, ["source"], ["second", "first"])
    refused("languages: the vector of 'first' was learned from other text", data=both)


def test_a_run_does_not_continue_with_other_vectors(tiny_bert, nusax_folder, tmp_path, used, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline.run(shared(tiny_bert, nusax_folder, tmp_path / "one", language_vectors=Path("languages")), quiet())
    for folder, shown in ((None, "None"), (tmp_path / "others", f"{tmp_path}/others")):
        message = rf"run_dir .*other settings \(language_vectors: {used} → {shown}\)"
        with pytest.raises(ValueError, match=message):
            pipeline.run(shared(tiny_bert, nusax_folder, tmp_path / "one", language_vectors=folder), quiet())


@pytest.mark.parametrize("place", ["file", "notes", "run"])
def test_folders_that_cannot_be_a_store(tiny_bert, nusax_folder, tmp_path, trained, place):
    folder = tmp_path / "languages"
    if place == "file":
        folder.touch()
    elif place == "notes":
        folder.mkdir()
        (folder / "notes.txt").touch()
    else:
        folder = tmp_path / "one/languages"
    message = {"file": "is a file", "notes": "is not empty", "run": "is in the folder of another run"}[place]
    with pytest.raises(ValueError, match=f"language_vectors .*{message}"):
        pipeline.run(shared(tiny_bert, nusax_folder, tmp_path / "one", language_vectors=folder), quiet())
    assert not trained


def test_a_second_run_waits(tiny_bert, nusax_folder, tmp_path, used, trained):
    console, locked, trained_before = quiet(), threading.Event(), []

    def use():
        with filelock.FileLock(used / ".first.lock"):
            locked.set()
            deadline = time.monotonic() + 60
            while "waiting for another process" not in console.file.getvalue() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
            trained_before.append(list(trained))

    other = threading.Thread(target=use)
    other.start()
    assert locked.wait(60)
    pipeline.run(shared(tiny_bert, nusax_folder, tmp_path / "two"), console)
    other.join()
    assert "waiting for another process" in console.file.getvalue()
    assert trained_before == [TASK]
    assert trained == TASK
