"""Station 9 for pictures that are compared as papers do: Inception features, real pictures.

The features are computed from the stored pictures and kept beside them, so nothing is sampled
again for them; those of the real pictures lie beside the data set, or with the pictures where that
folder takes no files. FID and KID to real pictures say how good teacher and student are each; the
reference is the same for both.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dmd_core.inception import weights_file
from pipelines import cifar10
from pipelines.config import EvaluateSection, StorageSection
from pipelines.feature_parts import Progress, counted, inception_features
from pipelines.images import SamplerPool
from pipelines.storage import Store, open_store
from pipelines.stored_images import Pictures
from pipelines.systems import Images

REAL = "real"
_SUFFIX = ".inception"


@dataclass(frozen=True)
class Judge:
    """Which pictures are measured with Inception: file of the weights, folder of real pictures
    ("": compared with the teacher). Plain values, for a worker."""

    weights: str
    real: str
    storage: StorageSection

    @staticmethod
    def of(section: EvaluateSection, storage: StorageSection) -> "Judge | None":
        """None: the features are the teacher's own. Fails at the door: weights, data set."""
        if section.features != "inception":
            return None
        judge = Judge(str(weights_file(section.inception)), section.real, storage)
        if section.real:
            cifar10.dataset_digest(judge.data())
        return judge

    def check(self, prompts: Sequence[str]) -> None:
        """Is there a real picture for each of `prompts`? Raises `Cifar10Error`."""
        if self.real:
            check_real(self.data(), prompts)

    def data(self) -> Store:
        return open_store(self.real, self.storage)

    def features(
        self,
        root: Store,
        folders: Mapping[str, str],
        images: Mapping[str, Pictures],
        pool: SamplerPool,
        on_progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:
        """System → Inception features (N,2048) of `images`, and of the real pictures where there
        are any.

        `folders`: system → its folder of pictures under `root`; the features are kept beside it.
        Those of a system without a folder are not kept.
        """
        sets: dict[str, tuple[Pictures, Store, str | None]] = {
            system: (entry, root, _beside(folders.get(system))) for system, entry in images.items()
        }
        if self.real:
            pictures = real_images(self.data(), images[next(iter(images))].prompts)
            sets[REAL] = (pictures, self.data(), _real_folder(self.data(), pictures))
        found: dict[str, np.ndarray] = {}
        on_rows = counted(sum(len(entry.prompts) for entry, _, _ in sets.values()), on_progress)
        for system, (pictures, store, folder) in sets.items():
            found[system] = inception_features(
                self.weights, pictures, pool,
                store=store, folder=folder, instead=root if system == REAL else None,
                on_rows=on_rows,
            )  # fmt: skip
        return found


def check_real(store: Store, prompts: Sequence[str]) -> None:
    """Are the prompts classes, with as many real pictures each as are asked for? Only counts are
    read. Raises `Cifar10Error`. A class may be given by its name and by its number; both count."""
    wanted = Counter(_label(prompt) for prompt in prompts)
    there = _pictures_per_class(store)
    for label, count in wanted.items():
        if count > there[label]:
            raise cifar10.Cifar10Error(
                f"evaluate.prompts and evaluate.samples_per_prompt ask for {count} real pictures "
                f"of {cifar10.CLASSES[label]!r}, and {store.url} has {there[label]}"
            )


def real_images(store: Store, prompts: Sequence[str]) -> Images:
    """For each prompt the next training picture of its class, so that row i has one class in every
    set. A prompt is a class's name or number. Raises what `check_real` does."""
    check_real(store, prompts)
    data = cifar10.load_split(store, "train")
    of_class = [np.flatnonzero(data.labels == label) for label in range(len(cifar10.CLASSES))]
    used: Counter[int] = Counter()
    rows = []
    for prompt in prompts:
        label = _label(prompt)
        rows.append(int(of_class[label][used[label]]))
        used[label] += 1
    nothing = np.empty((len(rows), 0), np.float32)
    return Images(tuple(prompts), tuple(rows), nothing, data.pictures[rows], nothing)


def _pictures_per_class(store: Store) -> list[int]:
    """Training pictures, by label."""
    cifar10.dataset_digest(store)  # or an error that says what is missing
    files = (cifar10.describe(store) or {})["files"]
    counts = [entry["per_class"] for key, entry in files.items() if key.startswith("train/")]
    return [sum(of_class) for of_class in zip(*counts, strict=True)]


def _label(prompt: str) -> int:
    names = {name: label for label, name in enumerate(cifar10.CLASSES)}
    names |= {str(label): label for label in names.values()}
    if prompt.strip().lower() not in names:
        raise cifar10.Cifar10Error(
            f"prompt {prompt!r} is no class of the real pictures (evaluate.real); expected one of "
            f"{', '.join(cifar10.CLASSES)}, or its number"
        )
    return names[prompt.strip().lower()]


def _beside(folder: str | None) -> str | None:
    return None if folder is None else folder + _SUFFIX


def _real_folder(store: Store, pictures: Images) -> str:
    """By the rows that were taken: the data set's folder may serve many evaluations."""
    inputs = json.dumps([cifar10.dataset_digest(store), pictures.seeds])
    return f"inception/{hashlib.sha256(inputs.encode()).hexdigest()[:16]}{_SUFFIX}"
