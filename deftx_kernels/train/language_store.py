"""A folder of language vectors that several runs share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
def open_store(config: RunConfig, builder: VectorBuilder, console: Console) -> Iterator[VectorBuilder]:
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

    with open_run(settings, config.language_vectors, fingerprints, waiting=waiting):
        yield shared


class SharedVectors(VectorBuilder):
    """Makes language vectors in a folder that runs with other data may use, too."""

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
