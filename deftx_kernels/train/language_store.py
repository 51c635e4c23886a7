"""A folder of language vectors that several runs share, also at the same time."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import filelock
from rich.console import Console

from deftx_kernels.files import read_json, write_json
from deftx_kernels.train import models
from deftx_kernels.train.config import LanguageConfig, RunConfig
from deftx_kernels.train.processes import on_main
from deftx_kernels.train.runs import open_run
from deftx_kernels.train.vectors import VectorBuilder


@dataclass
class LanguageStoreConfig:
    """What all vectors of the folder are made with."""

    model: str
    settings: LanguageConfig
    overwrite: bool = False


def open_store(
    config: RunConfig, builder: VectorBuilder, languages: Iterable[str], console: Console
) -> "SharedVectors":
    """What makes the vectors of `languages` in config.language_vectors, with seed 0.

    Raises:
        ValueError: the folder's vectors were learned with other settings, from another model or from other text.
    """
    folder = config.language_vectors
    assert folder is not None
    settings = LanguageStoreConfig(config.model, config.language)
    runtime = replace(builder.runtime, seed=0)
    shared = SharedVectors(builder.model, builder.corpus, builder.tokenizer, runtime, folder, console)
    fingerprints = {"model": models.model_hash(config.model)}
    with open_run(settings, folder, fingerprints, waiting=lambda: None, setting="language_vectors"):
        shared.check_texts(languages)
    return shared


@dataclass
class SharedVectors(VectorBuilder):
    """Makes language vectors in a folder that other runs use, too: one run at a time makes one vector.

    Of several processes of a run, rank 0 has the locks, and the others follow it.
    """

    console: Console

    def mlm_start(self, config, languages):
        """As in `VectorBuilder`."""
        with self._lock("mlm-head"):
            return super().mlm_start(config, languages)

    def language(self, language, start, config):
        """As in `VectorBuilder`. Writes the hash of the text beside the vector."""
        self.check_texts([language])
        path = self._text_path(language)

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"text": self.corpus.text_hash(language)})

        on_main(write)
        return super().language(language, start, config)

    def check_texts(self, languages: Iterable[str]) -> None:
        """Raises ValueError where the folder's vector of one of the languages was learned from other text."""
        on_main(lambda: self._check_texts(languages))

    def _check_texts(self, languages: Iterable[str]) -> None:
        for language in languages:
            path = self._text_path(language)
            if path.is_file() and read_json(path) != {"text": self.corpus.text_hash(language)}:
                what = f"the vector of {language!r} was learned from other text"
                raise ValueError(f"language_vectors {self.folder}: {what}; choose another")

    def _text_path(self, language: str) -> Path:
        return self.folder / f"phases/language-{language}/text.json"

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
        path = self.folder / f".{name}.lock"
        lock = filelock.FileLock(path)  # released without being held, on the other ranks, it does nothing

        def acquire() -> bool:
            try:
                lock.acquire(blocking=False)
            except filelock.Timeout:
                if not blocking:
                    return False
                self.console.print(f"waiting for another process, which makes {name} in {self.folder}")
                lock.acquire()
            return True

        if not on_main(acquire):
            raise filelock.Timeout(str(path))
        try:
            yield
        finally:
            lock.release()
