"""Teacher and student take turns on a GPU. Here "cuda" is a note of where each network would be."""

import json
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dmd_core.student_schedulers import student_scheduler
from pipelines import systems, timing
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.device_turns import DeviceTurns
from pipelines.systems import Networks, SamplingPlan, SystemSampler, load_plainly

PROMPTS = ("cat", "dog")


class Noted(DeviceTurns):
    """The turns of a GPU on a machine that has none: `there` has the networks that would be on it,
    and `most` is the most that were there at once."""

    made: "list[Noted]"

    def __init__(self, device, at_work, stays=None) -> None:
        super().__init__("cuda", at_work, stays)
        self.there: set[nn.Module] = set()
        self.most = self.moves = 0
        self._move(at_work, torch.device("cuda"))
        self.there |= {stays} if stays is not None else set()
        self.most, self.moves = len(self.there), 0
        type(self).made.append(self)

    def _move(self, pipeline, device) -> None:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module) and part is not self._stays:
                if device.type == "cuda":
                    part.register_forward_pre_hook(self._check)
                (self.there.add if device.type == "cuda" else self.there.discard)(part)
        self.most = max(self.most, len(self.there))
        self.moves += 1

    def _check(self, part: nn.Module, args: object) -> None:
        assert part in self.there


@pytest.fixture
def noted(monkeypatch) -> Iterator[list[Noted]]:
    Noted.made = []
    for module in (systems, timing):
        monkeypatch.setattr(module, "DeviceTurns", Noted)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Noted.made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def networks(families, tmp_path_factory) -> Networks:
    folder = tmp_path_factory.mktemp("turns") / "student"
    shutil.copytree(families.folder("sd"), folder)
    config = load_plainly(str(folder), "cpu").scheduler.config
    scheduler = student_scheduler(config, (999,))
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return Networks(families.folder("sd"), str(folder), StorageSection(), threads=1)


@pytest.fixture(scope="module")
def plan() -> SamplingPlan:
    pairs = {"steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    section = EvaluateSection(few_steps=(1,), batch_size=2)
    return SamplingPlan.from_sections(section, PairsSection.model_validate(pairs))


def test_one_pipeline_at_a_time_samples(networks, plan, noted):
    sampler = SystemSampler(plan, networks)
    for system in ("student", "teacher", "teacher_1", "student", "start"):
        images = sampler(system, PROMPTS, plan.seeds(system, PROMPTS))
        assert images.features.std() > 0
    (turns,) = noted
    # UNet and text encoder of one, its VAE or the teacher's, which stays for the features.
    assert turns.most == 4
    assert turns.moves == 2 * 4  # one away, one to it; teacher and teacher_1 are one pipeline


def test_networks_are_moved_outside_of_what_is_timed(networks, plan, noted, monkeypatch):
    reads: list[int] = []
    clock = timing.time.perf_counter

    def read() -> float:
        reads.append(noted[0].moves)
        return clock()

    monkeypatch.setattr(timing.time, "perf_counter", read)
    timing.measure_speed(plan, networks, PROMPTS, repeats=2)
    assert noted[0].most == 3
    assert reads[::2] == reads[1::2] and len(reads) == 2 * 2 * 3
    assert len(set(reads)) == 4  # teacher, student, teacher, student


def test_what_is_moved_is_all_but_what_stays():
    moved: list[tuple[str, str]] = []

    class Part(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def to(self, device):
            moved.append((self.name, str(device)))

    class Pipeline:
        def __init__(self, name: str) -> None:
            self.vae = Part(f"{name} vae")
            self.components = {"unet": Part(f"{name} unet"), "vae": self.vae, "tokenizer": 1}

    one, other = Pipeline("one"), Pipeline("other")
    turns = DeviceTurns("cuda:0", one, stays=one.vae)
    assert not turns.bring(one) and not moved
    assert turns.bring(other)
    assert moved == [("one unet", "cpu"), ("other unet", "cuda:0"), ("other vae", "cuda:0")]
    assert not turns.bring(other) and turns.bring(one)
    assert moved[3:] == [("other unet", "cpu"), ("other vae", "cpu"), ("one unet", "cuda:0")]
    del moved[:]
    assert not DeviceTurns("cpu", one).bring(other) and not moved
