"""Bare training loops without Ray: what `dmd train` does on one worker, for tests of its parts."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dmd_core.health import Tally
from dmd_core.losses import regression_distance
from dmd_core.networks import DmdNetworks, World
from dmd_core.teacher import Teacher
from dmd_core.trainer import DmdTrainer
from pipelines.batches import PairReader
from pipelines.step_data import Progress, StepSource
from pipelines.storage import open_store
from pipelines.streams import PictureStream, PromptStream, list_pictures
from pipelines.train_config import TrainSection
from pipelines.train_settings import lr_factor, stage_settings, trainer_settings

PROMPTS = ("a red fox", "a blue whale", "woman astronaut", "green apple", "flag of nowhere")
SIZES = {"train_batch_size": 5, "regression_batch_size": 3, "lr_warmup_steps": 2}


@dataclass
class BareRun:
    """Networks, data and progress of one worker; `train(n)` does n steps."""

    teacher: Teacher
    section: TrainSection
    pairs: PairReader | None
    pictures: str = ""
    rank: int = 0
    world: int = 1

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
            timesteps=len(self.networks.timesteps), prompts=PromptStream(PROMPTS, 1),
            pictures=stream,
        )  # fmt: skip
        self.progress = Progress()

    def train(self, steps: int) -> list[Tally]:
        factor, tallies = lr_factor(self.section), []
        for _ in range(steps):
            stage, keys = self.section.plan()[self.progress.stage]
            distance = regression_distance(keys.regression_loss)
            self.trainer.enter_stage(stage_settings(self.section, keys, distance))
            data = self.source.draw(self.progress, keys, self.pairs)
            tallies.append(self.trainer.step(data, factor(self.progress.step)))
            self.progress = self.progress.after_step(keys)
            last = self.progress.stage == len(self.section.plan()) - 1
            if self.progress.stage_is_over(stage, keys, tallies[-1].means()) and not last:
                self.progress = self.progress.next_stage()
        return tallies

    def state(self) -> tuple[dict, str]:
        """Copies of all tensors, and the rest as JSON."""
        parts = {
            part: {name: value.detach().clone() for name, value in tensors.items()}
            for part, tensors in self.networks.parts().items()
        }
        return parts, json.dumps(asdict(self.progress))

    def load(self, state: tuple[dict, str]) -> None:
        self.networks.load(state[0])
        self.progress = Progress(**json.loads(state[1]))


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
