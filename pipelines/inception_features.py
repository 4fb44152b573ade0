"""Station 9 for pictures that are compared as papers do: Inception features, real pictures.

The features are computed from the stored pictures and kept beside them, so nothing is sampled
again for them; those of the real pictures lie beside the data set. FID and KID to real pictures
say how good teacher and student are each; the reference is the same for both.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dmd_core.files import write_atomic
from dmd_core.inception import DIMENSION, load_inception, weights_file
from pipelines import cifar10
from pipelines.config import EvaluateSection, StorageSection
from pipelines.images import SamplerPool
from pipelines.storage import Store, open_store
from pipelines.stored_images import Pictures
from pipelines.systems import Images

REAL = "real"
_CHUNK = 500  # pictures of one task: a minute or two on a CPU core
_SUFFIX = ".inception.safetensors"

Progress = Callable[[int, int], None]


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
            sets[REAL] = (pictures, self.data(), _real_key(self.data(), pictures))
        found, total = {}, sum(len(entry.prompts) for entry, _, _ in sets.values())
        done = 0
        for system, (entry, store, key) in sets.items():
            found[system] = self._kept(store, key, entry, pool)
            done += len(found[system])
            if on_progress is not None:
                on_progress(done, total)
        return found

    def _kept(
        self, store: Store, key: str | None, pictures: Pictures, pool: SamplerPool
    ) -> np.ndarray:
        if key is not None and (found := _read(store, key, len(pictures.prompts))) is not None:
            return found
        features = inception_features(self.weights, pictures, pool)
        if key is not None:
            write_atomic(store.fs, store.path(key), save({"features": features}))
        return features


def inception_features(weights: str, images: Pictures, pool: SamplerPool) -> np.ndarray:
    """(N,2048) float32, on the pool's actors, or here with 0 of them. Each task reads the pictures
    it sees by itself."""
    groups = images.groups(_CHUNK)
    if not pool.actors:
        return np.concatenate([_compute(weights, group) for group in groups])
    task = ray.remote(_compute).options(num_cpus=pool.cpus, num_gpus=pool.gpus, **pool.where)
    return np.concatenate(ray.get([task.remote(weights, group) for group in groups]))


def real_images(store: Store, prompts: Sequence[str]) -> Images:
    """For each prompt the next training picture of its class, so that row i has one class in every
    set. A prompt is a class's name or number. Raises `Cifar10Error` when a class has too few."""
    data = cifar10.load_split(store, "train")
    of_class = [np.flatnonzero(data.labels == label) for label in range(len(cifar10.CLASSES))]
    used: Counter[int] = Counter()
    rows = []
    for prompt in prompts:
        label = _label(prompt)
        if used[label] == len(of_class[label]):
            raise cifar10.Cifar10Error(
                f"evaluate.samples_per_prompt asks for more real pictures of {prompt!r} than the "
                f"{len(of_class[label])} of {store.url}"
            )
        rows.append(int(of_class[label][used[label]]))
        used[label] += 1
    nothing = np.empty((len(rows), 0), np.float32)
    return Images(tuple(prompts), tuple(rows), nothing, data.pictures[rows], nothing)


def _label(prompt: str) -> int:
    names = {name: label for label, name in enumerate(cifar10.CLASSES)}
    names |= {str(label): label for label in names.values()}
    if prompt.strip().lower() not in names:
        raise cifar10.Cifar10Error(
            f"prompt {prompt!r} is no class of the real pictures (evaluate.real); expected one of "
            f"{', '.join(cifar10.CLASSES)}, or its number"
        )
    return names[prompt.strip().lower()]


def _compute(weights: str, images: Pictures) -> np.ndarray:
    """Equal pictures (the mean picture, N times) are seen once."""
    pictures = np.concatenate([part.pictures for part in images.parts()])
    distinct: dict[bytes, int] = {}
    index = [distinct.setdefault(picture.tobytes(), len(distinct)) for picture in pictures]
    once = pictures[np.unique(np.array(index), return_index=True)[1]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_inception(weights, device=device)(once)[index]


def _beside(folder: str | None) -> str | None:
    return None if folder is None else folder + _SUFFIX


def _real_key(store: Store, pictures: Images) -> str:
    """By the rows that were taken: the data set's folder may serve many evaluations."""
    inputs = json.dumps([cifar10.dataset_digest(store), pictures.seeds])
    return f"inception/{hashlib.sha256(inputs.encode()).hexdigest()[:16]}{_SUFFIX}"


def _read(store: Store, key: str, count: int) -> np.ndarray | None:
    """Kept features; None: there are none, or not those of so many pictures."""
    if not store.fs.exists(store.path(key)):
        return None
    raw: Any = store.fs.cat_file(store.path(key))
    try:
        found = load(raw)["features"]
    except (SafetensorError, KeyError):
        return None
    return found if found.shape == (count, DIMENSION) else None
