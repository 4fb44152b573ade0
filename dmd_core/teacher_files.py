"""Which files of a pipeline's part are read: the one place that says so, for what fetches a teacher
and for its revision.

Loading never asks for a variant of the weights here: where one is wanted, its files are seen under
the names of none.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

Read = Callable[[str], str | bytes]  # the content of the file of this name
INDEX = "model_index.json"  # of the whole pipeline
TEXTS = ("*.json", "*.txt", "*.model")  # configurations, vocabularies, tokenizers' models
WEIGHTS = ".safetensors"
# What the libraries call the weights of a part.
_OF_DIFFUSERS, _OF_TRANSFORMERS = "diffusion_pytorch_model", "model"
_INDEX_OF_WEIGHTS = re.compile(r"\.index(\.\w+)?\.json$")


class TeacherError(ValueError):
    """A teacher folder that cannot be used."""


@dataclass(frozen=True)
class PartFiles:
    """The files in a part's folder, wherever it lies: their `names`, and `read` for the content of
    one."""

    names: frozenset[str]
    read: Read

    @staticmethod
    def in_folder(folder: Path) -> "PartFiles":
        """Of a local folder; of one that is not there, none."""
        names = frozenset(file.name for file in folder.glob("*") if file.is_file())
        return PartFiles(names, lambda name: (folder / name).read_bytes())

    def loaded(self, variant: str = "") -> list[str]:
        """All that loading the part reads, sorted. Raises `TeacherError`, as `weights` does."""
        return sorted({*self.texts(), *self.weights(variant)})

    def texts(self) -> list[str]:
        """All but weights and what lists their shards."""
        return [
            name
            for name in self.names
            if any(fnmatchcase(name, pattern) for pattern in TEXTS)
            and not _INDEX_OF_WEIGHTS.search(name)
        ]

    def weights(self, variant: str = "") -> list[str]:
        """The whole file, or the index and its shards, of the variant (""; of none); empty where
        there is neither. Raises `TeacherError` for an index that is none, or lists what is not
        there."""
        for files in self._choices(variant):
            if files[0] in self.names:
                lost = [name for name in files if name not in self.names]
                if lost:
                    raise TeacherError(f"{files[0]} lists {lost[0]}, which is not beside it")
                return files
        return []

    def possible_weights(self, variant: str = "") -> list[str]:
        """What `weights` may choose, where only the texts and indexes are here yet."""
        return [name for files in self._choices(variant) for name in files]

    def _choices(self, variant: str) -> Iterator[list[str]]:
        """In the order of the libraries: diffusers looks for an index first, transformers last."""
        dot = f".{variant}" if variant else ""
        for stem in (_OF_DIFFUSERS, _OF_TRANSFORMERS):
            whole = [f"{stem}{dot}{WEIGHTS}"]
            # The second is how diffusers named it before.
            indexes = f"{stem}{WEIGHTS}.index{dot}.json", f"{stem}{dot}{WEIGHTS}.index.json"
            cut = [[name, *self._shards(name)] for name in indexes if name in self.names][:1]
            yield from [*cut, whole] if stem == _OF_DIFFUSERS else [whole, *cut]

    def _shards(self, index: str) -> list[str]:
        try:
            return sorted(set(json.loads(self.read(index))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TeacherError(f"{index} does not list shards of weights: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a local part that are loaded, whole or cut; none where it has none.
    Raises `TeacherError`, as `PartFiles.weights` does."""
    names = PartFiles.in_folder(folder).weights()
    return [folder / name for name in names if name.endswith(WEIGHTS)]


def file_states(files: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """Of those that can be looked at just now: which file it is on its disk, its bytes, and when it
    was written."""
    found = {}
    for file in files:
        with suppress(OSError):
            stat = file.stat()
            found[file] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return found


def overwritten(before: Mapping[Path, tuple[int, int, int]]) -> list[Path]:
    """Those of `file_states` that were written into since. Without a GPU, weights that are kept in
    the dtype of their file are the file's own pages, and such a network is another one now; which
    of them are is not asked here. A file in the place of the old one is no harm: the pages of the
    old one stay."""
    now = file_states(before)
    return [file for file in now if now[file][0] == before[file][0] and now[file] != before[file]]


def plain_name(name: str, variant: str) -> str:
    """What a whole file or an index of the variant is called without one."""
    return name.replace(f".{variant}{WEIGHTS}", WEIGHTS).replace(f".index.{variant}.", ".index.")
