"""A folder of language vectors that several runs share."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

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


@contextmanager
def open_store(
    config: RunConfig, builder: VectorBuilder, languages: Iterable[str], console: Console
) -> Iterator[VectorBuilder]:
    """`with open_store(...) as builder:` makes language vectors in config.language_vectors, or in the run's own folder.

    Those of a shared folder are learned with seed 0, one process at a time; others wait.

    Raises:
        ValueError: the folder's vectors were learned with other settings, from another model or from other text.
    """
    if config.language_vectors is None:
        yield builder
        return
    settings = LanguageStoreConfig(config.model, config.language, config.device)
    runtime = replace(builder.runtime, seed=0)
    shared = SharedVectors(builder.model, builder.corpus, builder.tokenizer, runtime, config.language_vectors)
    fingerprints = {"model": models.model_hash(config.model)}

    def waiting() -> None:
        console.print(f"waiting for another process, which learns language vectors in {config.language_vectors}")

    with open_run(settings, config.language_vectors, fingerprints, waiting=waiting, setting="language_vectors"):
        shared.check_texts(languages)
        yield shared


class SharedVectors(VectorBuilder):
    """Makes language vectors in a folder that runs with other data may use, too."""

    def check_texts(self, languages: Iterable[str]) -> None:
        """Raises ValueError where the folder's vector of one of the languages was learned from other text."""
        for language in languages:
            path = self._text_path(language)
            if path.is_file() and read_json(path) != {"text": self.corpus.text_hash(language)}:
                what = f"the vector of {language!r} was learned from other text"
                raise ValueError(f"language_vectors {self.folder}: {what}; choose another")

    def language(self, language, start, config):
        """As in `VectorBuilder`. Writes the hash of the text beside the vector."""
        path = self._text_path(language)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"text": self.corpus.text_hash(language)})
        return super().language(language, start, config)

    def _text_path(self, language: str) -> Path:
        return self.folder / f"phases/language-{language}/text.json"
