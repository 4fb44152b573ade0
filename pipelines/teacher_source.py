"""Where a teacher comes from, and how each machine makes one local pipeline folder of it.

A folder, an s3:// URL, a hub's id at a commit, or a single-file checkpoint. One string says which
(`TeacherSource.url`); workers resolve it themselves, each machine once. What a teacher *is* does
not depend on that: its revision is the digest of its files, wherever they came from.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from dmd_core.families import CLASSES, TeacherError
from dmd_core.gallery import GALLERY_FILES
from pipelines.config import StorageSection, TeacherSection
from pipelines.hub import (
    COMMIT,
    TEXTS,
    WEIGHTS,
    how_to_pin,
    hub_file,
    hub_folder,
    is_hub_id,
    pinned,
)
from pipelines.local_folders import made_once, nearby
from pipelines.single_file import converted
from pipelines.storage import open_store

_INDEX = "model_index.json"
# What lies in a teacher's folder beside its parts: the index, names of labels, real pictures.
_BESIDE = (_INDEX, CLASSES, *GALLERY_FILES)
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
        checkpoint = Path(_existing(source.path, storage))
        return converted(checkpoint, _configuration(source, storage))
    if source.revision:
        folder = _downloaded(source)
    else:
        folder = Path(_existing(source.path, storage))
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
    index = hub_file(source.path, source.revision, _INDEX)
    parts = _parts(index)
    texts = [*_BESIDE, *_of_parts(parts, TEXTS)]
    folder = _fetch(source, texts, parts, source.variant)
    plain = [part for part in parts if not any((folder / part).glob(f"*{WEIGHTS}"))]
    return _fetch(source, texts, plain, "") if source.variant and plain else folder


def _fetch(source: TeacherSource, texts: list[str], parts: list[str], variant: str) -> Path:
    """`texts`, and the weights of `parts`: those of the variant, or those of none."""
    weights = _of_parts(parts, [f"*{end}" for end in _ends(variant)])
    unwanted = [] if variant else _of_parts(parts, [f"*.*{WEIGHTS}"])
    return hub_folder(source.path, source.revision, [*texts, *weights], unwanted)


def _ends(variant: str) -> list[str]:
    """How names of weight files end, whole and in shards."""
    return [f".{variant}{WEIGHTS}", f".{variant}-*{WEIGHTS}"] if variant else [WEIGHTS]


def _of_parts(parts: Iterable[str], patterns: Iterable[str]) -> list[str]:
    return [f"{part}/{pattern}" for part in parts for pattern in patterns]


def _parts(index: Path) -> list[str]:
    """The parts of a pipeline that are folders of their own."""
    try:
        content = json.loads(index.read_text())
        return [
            name
            for name, value in content.items()
            if isinstance(value, list) and value[0] is not None and name not in _NOT_NEEDED
        ]
    except (ValueError, AttributeError, IndexError) as error:
        raise TeacherError(f"{index} is not the index of a diffusers pipeline: {error}") from error


# ---------------------------------------------------------------------- folders


def _existing(path: str, storage: StorageSection | None) -> str:
    try:
        return nearby(open_store(path, storage))
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
    links = _variant_links(folder, variant)

    def make(target: Path) -> None:
        for name, file in links.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(file)

    return made_once("variants", links, make)


def _variant_links(folder: Path, variant: str) -> dict[str, str]:
    """New relative name → absolute path. A part without the variant keeps its plain weights."""
    links = {name: str((folder / name).resolve()) for name in _BESIDE if (folder / name).is_file()}
    found = False
    for part in _parts(folder / _INDEX):
        files = [file for file in sorted((folder / part).glob("*")) if file.is_file()]
        chosen = [file for end in _ends(variant) for file in (folder / part).glob(f"*{end}")]
        found = found or bool(chosen)
        for file in files:
            if chosen and file.suffix == WEIGHTS and file not in chosen:
                continue
            # A shard keeps its name: the index, renamed, lists it.
            name = file.name.replace(f".{variant}{WEIGHTS}", WEIGHTS)
            name = name.replace(f".index.{variant}.json", ".index.json")
            if chosen and file.name == name and file.name.endswith(".index.json"):
                continue
            links[(Path(part) / name).as_posix()] = str(file.resolve())
    if not found:
        raise TeacherError(
            f"teacher.variant is {variant}, but {folder} has no *.{variant}{WEIGHTS}; leave the "
            "key out to read the weights it has"
        )
    return links


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
            f"it was tuned from ({_INDEX}, each part's configuration, tokenizers; no weights "
            "needed), or its id in a hub as org/name@<commit>"
        )
    if is_hub_id(config.partition("@")[0]):
        pinned(config)
    else:
        config = open_store(config, storage).url
    return TeacherSource(open_store(section.path, storage).url, config=config)


def _configuration(source: TeacherSource, storage: StorageSection | None) -> Path:
    if not is_hub_id(source.config.partition("@")[0]):
        return Path(_existing(source.config, storage))
    hub_id, commit = pinned(source.config)
    parts = _parts(hub_file(hub_id, commit, _INDEX))
    return hub_folder(hub_id, commit, [_INDEX, *_of_parts(parts, TEXTS)])
