"""Bare training loops without Ray: what `dmd train` does on one worker, for tests of its parts."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dmd_core.files import write_atomic
from dmd_core.health import Tally
from dmd_core.losses import regression_distance
from dmd_core.networks import DmdNetworks
from dmd_core.noise import sample_noise
from dmd_core.parallel import World
from dmd_core.teacher import Teacher
from dmd_core.trainer import DmdTrainer
from dmd_core.types import PairBatch
from pipelines.config import PairsSection
from pipelines.following import Follower, PairVersions
from pipelines.manifest_model import Manifest
from pipelines.pairs import encode_pairs, fingerprint_of
from pipelines.seal import seal_generation
from pipelines.step_data import PairSource, Progress, PromptSource, StepSource
from pipelines.storage import Store, open_store
from pipelines.streams import PictureStream, PromptStream, list_pictures
from pipelines.train_config import TrainSection
from pipelines.train_settings import lr_factor, stage_settings, trainer_settings
from tests.pipelines.made_pairs import land_ids

PROMPTS = ("a red fox", "a blue whale", "woman astronaut", "green apple", "flag of nowhere")
SIZES = {"train_batch_size": 5, "regression_batch_size": 3, "lr_warmup_steps": 2}


@dataclass
class BareRun:
    """Networks, data and progress of one worker; `train(n)` does n steps."""

    teacher: Teacher
    section: TrainSection
    pairs: PairSource | None
    pictures: str = ""
    rank: int = 0
    world: int = 1
    prompts: PromptSource | None = None
    versions: PairVersions | None = None  # in place of `pairs`
    follower: Follower | None = None

    def __post_init__(self) -> None:
        self.networks = DmdNetworks(self.teacher, trainer_settings(self.section, 7), World())
        self.trainer = DmdTrainer(self.networks, self.teacher.encode_prompts([""]))
        shape = self.teacher.latent_shape()
        stream = None
        if self.section.uses_gan:
            store = open_store(self.pictures)
            stream = PictureStream(
                store, list_pictures(store), self.teacher.encode, (16, 16), seed=3
            )
        self.source = StepSource(
            self.teacher, seed=7, rank=self.rank, world=self.world, shape=shape,
            timesteps=len(self.networks.timesteps),
            prompts=self.prompts or PromptStream(PROMPTS, 1), pictures=stream,
        )  # fmt: skip
        self.progress = Progress()

    def train(self, steps: int) -> list[Tally]:
        factor, tallies = lr_factor(self.section), []
        for _ in range(steps):
            stage, keys = self.section.plan()[self.progress.stage]
            distance = regression_distance(keys.regression_loss)
            self.trainer.enter_stage(stage_settings(self.section, keys, distance))
            pairs = self.versions.stream(keys) if self.versions else self.pairs
            data = self.source.draw(self.progress, keys, pairs)
            tallies.append(self.trainer.step(data, factor(self.progress.step)))
            before, self.progress = self.progress, self.progress.after_step(keys)
            last = self.progress.stage == len(self.section.plan()) - 1
            if self.progress.stage_is_over(stage, keys, tallies[-1].means()) and not last:
                self.progress = self.progress.next_stage()
            if self.follower is not None:
                self.follower.follow(before, self.progress)
        return tallies

    def state(self) -> tuple[dict, str]:
        """Copies of all tensors, and the rest as JSON."""
        parts = {
            part: {name: value.detach().clone() for name, value in tensors.items()}
            for part, tensors in self.networks.parts().items()
        }
        segments = self.versions.state() if self.versions else []
        return parts, json.dumps([asdict(self.progress), segments])

    def load(self, state: tuple[dict, str]) -> None:
        self.networks.load(state[0])
        progress, segments = json.loads(state[1])
        self.progress = Progress(**progress)
        if self.versions is not None:
            self.versions.restore(segments)


def seal_pairs(
    root: Store,
    section: PairsSection,
    revision: str,
    shape: tuple[int, ...],
    ids: Iterable[int],
    *,
    base: str = "a",
) -> Manifest:
    """Add a file of the pairs `ids` as the teacher `revision` might have made them, (C,h,w) =
    `shape`, and seal a version of all pairs from 1 to the last of them."""
    ids = list(ids)
    fingerprint = fingerprint_of(section, revision)
    noise = sample_noise(ids, shape).half()
    batch = PairBatch(tuple(ids), tuple(f"prompt {i}" for i in ids), noise, (noise * 0.5).half())
    folder = root.at(fingerprint.folder)
    _write_table(folder, "ledger", f"{base}.parquet", pa.table({"pair_id": ids}))
    pairs = encode_pairs(batch, ids, fingerprint=fingerprint, provenance={"file": base})
    _write_table(folder, "data", f"{base}-0.parquet", pairs)
    return seal_generation(root, fingerprint, land_ids(root, range(1, ids[-1] + 1)))


def _write_table(folder: Store, part: str, name: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=5, write_page_checksum=True)
    write_atomic(folder.fs, folder.path(part, name), buffer.getvalue())


def write_pictures(folder: Path, captions: Sequence[str]) -> str:
    """A folder of 20×16 noise pictures with metadata.jsonl, one per caption."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), []
    for index, caption in enumerate(captions):
        name = f"{index}.png"
        pixels = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)
