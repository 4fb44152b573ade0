"""Where a teacher comes from, and how each machine makes one local pipeline folder of it.

A folder, an s3:// URL, a hub's id at a commit, or a single-file checkpoint. One string says which
(`TeacherSource.url`); workers resolve it themselves, each machine once. What a teacher *is* does
not depend on that: its revision is the digest of its files, wherever they came from.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from dmd_core.families import CLASSES
from dmd_core.gallery import GALLERY_FILES
from dmd_core.teacher_files import (
    INDEX,
    TEXTS,
    WEIGHTS,
    PartFiles,
    Read,
    TeacherError,
    plain_name,
)
from pipelines.config import StorageSection, TeacherSection
from pipelines.hub import COMMIT, how_to_pin, hub_file, hub_folder, is_hub_id, pinned
from pipelines.local_folders import made_once, nearby
from pipelines.single_file import converted
from pipelines.storage import Store, open_store

# What lies in a teacher's folder beside its parts: the index, names of labels, real pictures.
_BESIDE = (INDEX, CLASSES, *GALLERY_FILES)
_SCHEME = "teacher:?"
_PICKLED = (".ckpt", ".bin", ".pt", ".pth")
# Not a part of what is distilled, and gigabytes.
_NOT_NEEDED = ("safety_checker",)


@dataclass(frozen=True)
class TeacherSource:
    """`path`: a local path, s3:// URL, or with `revision` a hub's id. `config`: of a single-file
    checkpoint, the folder or pinned id that says how it is built."""

    path: str
    revision: str = ""
    variant: str = ""
    config: str = ""

    @property
    def url(self) -> str:
        """All of it in one string: the path alone where that says everything."""
        given = {name: value for name, value in asdict(self).items() if value}
        if list(given) == ["path"]:
            return self.path
        return _SCHEME + urlencode(given, safe="/:@")

    @staticmethod
    def from_url(url: str) -> "TeacherSource":
        if not url.startswith(_SCHEME):
            return TeacherSource(url)
        return TeacherSource(**dict(parse_qsl(url.removeprefix(_SCHEME))))


def teacher_source(section: TeacherSection, storage: StorageSection | None = None) -> TeacherSource:
    """What a recipe's `teacher` section means, paths made absolute. Nothing is contacted.

    Raises `TeacherError` for keys that do not fit together, and for a hub's id without a commit.
    """
    path, suffix = section.path, Path(section.path).suffix
    if suffix in _PICKLED:
        raise TeacherError(
            f"teacher.path {path} is a pickle, which runs code when it is loaded; expected a "
            "pipeline folder or a .safetensors checkpoint (diffusers and most tools write both)"
        )
    if suffix == WEIGHTS:
        return _single_file(section, storage)
    if section.single_file_config:
        raise TeacherError(
            f"teacher.single_file_config is given, but teacher.path {path} is not a single-file "
            f"checkpoint (*{WEIGHTS}); leave the key out"
        )
    if is_hub_id(path):
        return _on_hub(section)
    if section.revision:
        raise TeacherError(
            f"teacher.revision is given, but teacher.path {path} is not the id of a hub's model "
            "(org/name, with no such folder here). A folder's revision is the digest of its files: "
            "leave the key out, or clear a recipe's with --set teacher.revision="
        )
    return TeacherSource(open_store(path, storage).url, variant=section.variant or "")


def local_teacher(url: str, storage: StorageSection | None = None) -> str:
    """The teacher of `TeacherSource.url` as a local pipeline folder, fetched or converted if this
    machine has not done it yet. Raises `TeacherError` and `HubError`."""
    source = TeacherSource.from_url(url)
    if source.config:
        checkpoint = _existing(source.path, storage)
        return converted(checkpoint, _configuration(source, storage))
    if source.revision:
        folder = _downloaded(source)
    else:
        folder = _existing(source.path, storage, partial(_read_of, variant=source.variant))
    return _in_plain_names(folder, source.variant) if source.variant else str(folder)


# ---------------------------------------------------------------------- a hub's model


def _on_hub(section: TeacherSection) -> TeacherSource:
    path, revision = section.path, section.revision
    if not revision:
        raise TeacherError(
            f"teacher.path {path} does not exist as a folder here; expected a diffusers pipeline "
            "folder, an s3:// URL of one, a .safetensors checkpoint, or shipped:emoji. If it is "
            f"the id of a hub's model, give teacher.revision too: {how_to_pin(path)}"
        )
    if not COMMIT.fullmatch(revision):
        raise TeacherError(f"teacher.revision is {revision!r}; {how_to_pin(path)}")
    return TeacherSource(path, revision=revision, variant=section.variant or "")


def _downloaded(source: TeacherSource) -> Path:
    """The parts that `model_index.json` names, in the asked variant where a part has it."""
    index = hub_file(source.path, source.revision, INDEX)
    parts = _parts(index.read_bytes(), index)
    wanted = [*_BESIDE, *_of_parts(parts, TEXTS)]
    # First the indexes among them, which say what the shards are called.
    folder = hub_folder(source.path, source.revision, wanted)
    wanted += _possible_weights(folder, parts, source.variant)
    folder = hub_folder(source.path, source.revision, wanted)
    if source.variant:
        files = {part: PartFiles.in_folder(folder / part) for part in parts}
        others = [part for part in parts if not files[part].weights(source.variant)]
        wanted += _possible_weights(folder, others, "")
        folder = hub_folder(source.path, source.revision, wanted)
    return folder


def _possible_weights(folder: Path, parts: Iterable[str], variant: str) -> list[str]:
    return [
        f"{part}/{name}"
        for part in parts
        for name in PartFiles.in_folder(folder / part).possible_weights(variant)
    ]


def _of_parts(parts: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [f"{part}/{pattern}" for part in parts for pattern in patterns]


def _parts(index: str | bytes, where: object) -> list[str]:
    """The parts of a pipeline that are folders of their own. `where`: its name, for the error. A
    part is an argument of the pipeline, so its name cannot lead to another folder."""
    try:
        parts = [
            name
            for name, value in json.loads(index).items()
            if isinstance(value, list) and value[0] is not None and name not in _NOT_NEEDED
        ]
    except (ValueError, AttributeError, IndexError) as error:
        raise TeacherError(f"{where} is not the index of a diffusers pipeline: {error}") from error
    strange = [name for name in parts if not name.isidentifier()]
    if strange:
        raise TeacherError(f"{where} names a part {strange[0]!r}; expected names such as unet")
    return parts


# ---------------------------------------------------------------------- folders


@dataclass(frozen=True)
class _Files:
    """A pipeline folder, here or in a store: the relative `names` of its files."""

    where: str
    names: frozenset[str]
    read: Read

    @staticmethod
    def in_folder(folder: Path) -> "_Files":
        found = [file for depth in ("*", "*/*") for file in folder.glob(depth) if file.is_file()]
        names = frozenset(file.relative_to(folder).as_posix() for file in found)
        return _Files(str(folder), names, lambda name: (folder / name).read_bytes())

    @staticmethod
    def in_store(store: Store, names: Iterable[str]) -> "_Files":
        return _Files(store.url, frozenset(names), lambda name: store.fs.cat_file(store.path(name)))

    def parts(self) -> dict[str, PartFiles]:
        if INDEX not in self.names:
            raise TeacherError(
                f"teacher {self.where} has no {INDEX}; expected a diffusers pipeline folder (as "
                "written by save_pretrained)"
            )
        names = _parts(self.read(INDEX), f"{self.where}/{INDEX}")
        return {name: self._part(name) for name in names}

    def _part(self, part: str) -> PartFiles:
        inside = (
            name.removeprefix(f"{part}/") for name in self.names if name.startswith(f"{part}/")
        )
        return PartFiles(
            frozenset(name for name in inside if "/" not in name),
            lambda name: self.read(f"{part}/{name}"),
        )

    def loaded(self, variant: str) -> dict[str, str]:
        """What is read of it: name → what that is called in a folder without variants. A part
        without the variant keeps its plain weights; `TeacherError` where none has it."""
        files = {name: name for name in _BESIDE if name in self.names}
        found = not variant
        for part, inside in self.parts().items():
            chosen = inside.weights(variant)
            found = found or bool(chosen)
            for name in inside.loaded(variant if chosen else ""):
                # A shard keeps its name: the index, renamed, lists it.
                plain = plain_name(name, variant) if name in chosen[:1] else name
                files[f"{part}/{name}"] = f"{part}/{plain}"
        if not found:
            raise TeacherError(
                f"teacher.variant is {variant}, but {self.where} has no *.{variant}{WEIGHTS}; "
                "leave the key out to read the weights it has"
            )
        return files


def _read_of(store: Store, names: Sequence[str], *, variant: str) -> Iterable[str]:
    """Of the files of a teacher in a store those that are copied."""
    return _Files.in_store(store, names).loaded(variant)


def _texts_of(store: Store, names: Sequence[str]) -> Iterable[str]:
    """The same of a folder that says how a single-file checkpoint is built."""
    parts = _Files.in_store(store, names).parts()
    return [INDEX, *(f"{part}/{name}" for part in parts for name in parts[part].texts())]


def _existing(
    path: str,
    storage: StorageSection | None,
    choose: Callable[[Store, Sequence[str]], Iterable[str]] | None = None,
) -> Path:
    """`choose`: of the files of a remote folder; None: all of them."""
    store = open_store(path, storage)
    try:
        return Path(nearby(store, partial(choose, store) if choose else None))
    except FileNotFoundError as error:
        raise TeacherError(
            f"teacher {path} does not exist; expected a diffusers pipeline folder, an s3:// URL of "
            "one, org/name of a hub with teacher.revision, a .safetensors checkpoint, or "
            "shipped:emoji"
        ) from error


def _in_plain_names(folder: Path, variant: str) -> str:
    """A folder of links to those files of `folder` that the variant has, under the names of none:
    what loads a pipeline need not know of variants, and its revision is that of the same weights
    saved without."""
    loaded = _Files.in_folder(folder).loaded(variant)
    links = {plain: str((folder / name).resolve()) for name, plain in loaded.items()}

    def make(target: Path) -> None:
        for name, file in links.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(file)

    return made_once("variants", links, make)


# ---------------------------------------------------------------------- single-file checkpoints


def _single_file(section: TeacherSection, storage: StorageSection | None) -> TeacherSource:
    if section.revision or section.variant:
        raise TeacherError(
            f"teacher.path {section.path} is a single-file checkpoint; teacher.revision and "
            "teacher.variant are for pipelines"
        )
    config = section.single_file_config
    if not config:
        raise TeacherError(
            f"teacher.path {section.path} is a single-file checkpoint, which does not say how its "
            "networks are built; give teacher.single_file_config: a pipeline folder of the model "
            f"it was tuned from ({INDEX}, each part's configuration, tokenizers; no weights "
            "needed), or its id in a hub as org/name@<commit>"
        )
    if is_hub_id(config.partition("@")[0]):
        pinned(config)
    else:
        config = open_store(config, storage).url
    return TeacherSource(open_store(section.path, storage).url, config=config)


def _configuration(source: TeacherSource, storage: StorageSection | None) -> Path:
    if not is_hub_id(source.config.partition("@")[0]):
        return _existing(source.config, storage, _texts_of)
    hub_id, commit = pinned(source.config)
    index = hub_file(hub_id, commit, INDEX)
    parts = _parts(index.read_bytes(), index)
    return hub_folder(hub_id, commit, [INDEX, *_of_parts(parts, TEXTS)])
