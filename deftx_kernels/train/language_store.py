"""A folder of language vectors that several runs share, also at the same time."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

import filelock
import tyro
from rich.console import Console

from deftx_kernels.files import read_json, write_json
from deftx_kernels.train import models
from deftx_kernels.train.config import LanguageConfig, RunConfig
from deftx_kernels.train.runs import open_run
from deftx_kernels.train.vectors import VectorBuilder


@dataclass
class LanguageStoreConfig:
    """What all vectors of the folder are made with."""

    model: str
    settings: Annotated[LanguageConfig, tyro.conf.arg(name="")]
    device: str
    overwrite: bool = False


def open_store(config: RunConfig, builder: VectorBuilder, console: Console) -> "SharedVectors":
    """What makes language vectors in config.language_vectors, with seed 0.

    Raises:
        ValueError: the folder's vectors were learned with other settings or from another model.
    """
    folder = config.language_vectors
    assert folder is not None
    settings = LanguageStoreConfig(config.model, config.language, config.device)
    with open_run(settings, folder, {"model": models.model_hash(config.model)}, waiting=lambda: None):
        pass  # its marker fits
    runtime = replace(builder.runtime, seed=0)
    return SharedVectors(builder.model, builder.corpus, builder.tokenizer, runtime, folder, console)


@dataclass
class SharedVectors(VectorBuilder):
    """Makes language vectors in a folder that other runs use, too: one process at a time makes one vector."""

    console: Console

    def mlm_start(self, config, languages):
        """As in `VectorBuilder`."""
        with self._lock("mlm-head"):
            return super().mlm_start(config, languages)

    def language(self, language, start, config):
        """As in `VectorBuilder`. Raises ValueError where the folder's vector was learned from other text."""
        vector = super().language(language, start, config)
        content, path = self.corpus.text_hash(language), vector.folder / "text.json"
        if path.is_file():
            if read_json(path) != {"text": content}:
                raise ValueError(f"language_vectors {self.folder}: {vector.name} was learned from other text")
        else:
            vector.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"text": content})
        return vector

    def in_turn(self, languages: Sequence[str]) -> Iterator[str]:
        """Each language, while no other process makes its vector. Those that are being made come last."""
        waiting, busy = deque(languages), 0
        while waiting:
            language = waiting.popleft()
            try:
                with self._lock(language, blocking=busy > len(waiting)):
                    busy = 0
                    yield language
            except filelock.Timeout:
                waiting.append(language)
                busy += 1

    @contextmanager
    def _lock(self, name: str, blocking: bool = True) -> Iterator[None]:
        lock = filelock.FileLock(self.folder / f".{name}.lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            if not blocking:
                raise
            self.console.print(f"waiting for another process, which makes {name} in {self.folder}")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
