"""Files in a folder or an object store, which get their names when they are complete."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from deftx_kernels.files import make_folder, remove_abandoned

_ENDING = ".partial"


class LocalFolder:
    """A folder of this machine. Readers get the files themselves."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root)

    def names(self, kind: str) -> list[str]:
        return os.listdir(self.root / kind) if (self.root / kind).is_dir() else []

    def write(self, name: str, save: Callable[[Path], None]) -> None:
        make_folder((self.root / name).parent)
        save(self.root / name)  # atomic

    @contextlib.contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        yield self.root / name

    def remove_abandoned(self, kind: str) -> None:
        """Delete what killed writers have left."""
        remove_abandoned(self.root / kind)

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)


class RemoteFolder:
    """A URL of fsspec: s3://, gs://, hf://, memory://, … Readers get copies of the files."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.files, self.root = fsspec.core.url_to_fs(url)

    def names(self, kind: str) -> list[str]:
        self.files.invalidate_cache()
        try:
            return [str(path).rpartition("/")[2] for path in self.files.ls(f"{self.root}/{kind}", detail=False)]
        except FileNotFoundError:
            return []

    def write(self, name: str, save: Callable[[Path], None]) -> None:
        with TemporaryDirectory() as folder:
            local, path = Path(folder) / "file", f"{self.root}/{name}"
            save(local)
            self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(local), path + _ENDING)
            self.files.mv(path + _ENDING, path)

    @contextlib.contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        with TemporaryDirectory() as folder:
            local = Path(folder) / name.rpartition("/")[2]
            self.files.get_file(f"{self.root}/{name}", str(local))
            yield local

    def remove_abandoned(self, kind: str) -> None:
        """Delete what killed writers have left."""
        for name in self.names(kind):
            if name.endswith(_ENDING):
                self.delete(f"{kind}/{name}")

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm_file(f"{self.root}/{name}")


Folder = LocalFolder | RemoteFolder


def folder_at(url: str | os.PathLike) -> Folder:
    """The folder at a path or at a URL."""
    return RemoteFolder(url) if isinstance(url, str) and "://" in url else LocalFolder(url)
