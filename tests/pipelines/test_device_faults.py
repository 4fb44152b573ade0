"""Devices that are lost under teachers, on a real Ray: the process ends, and another goes on."""

from collections.abc import Sequence

import pytest
import torch

from jobs.errors import Exit
from jobs.worker_failures import ray_errors, worker_failure
from pipelines import generate
from pipelines.rejects import read_rejects
from pipelines.storage import open_store
from pipelines.teacher_actor import TeacherActor
from tests.pipelines.test_generate import SECTION, Job, all_pairs

ONE_ATTEMPT = SECTION.model_copy(
    update={"batch_size": 2, "rows_per_block": 4, "samples_per_prompt": 1, "attempts": 1}
)
PROMPTS = ["a red fox", "a cursed idol", "a blue whale", "green apple"]
LOST = "CUDA error: an illegal memory access was encountered"


class LosesTheDevice(TeacherActor):
    """Whenever `word` is in a prompt."""

    word = "cursed"

    def _solve(
        self, eps: torch.Tensor, prompts: Sequence[str], negatives: Sequence[str | None]
    ) -> torch.Tensor:
        if any(self.word in prompt for prompt in prompts):
            raise torch.AcceleratorError(LOST)
        return super()._solve(eps, prompts, negatives)


class HasNoDevice(LosesTheDevice):
    word = ""


@pytest.fixture
def job(ray_cluster, tmp_path, tiny_teacher_dir) -> Job:
    return Job(open_store(str(tmp_path / "set")), tiny_teacher_dir, tmp_path)


def test_a_row_that_takes_its_device_along_is_rejected_and_the_others_are_made(job, monkeypatch):
    monkeypatch.setattr(generate, "TeacherActor", LosesTheDevice)
    manifest = job.run(PROMPTS, ONE_ATTEMPT)[0].manifest
    assert (manifest.rows, manifest.rejected) == (3, 1)
    assert sorted(all_pairs(job.root, manifest).prompts) == sorted({*PROMPTS} - {"a cursed idol"})
    folder = f"generations/{manifest.fingerprint_digest[:16]}"
    reason = f"AcceleratorError: {LOST}"
    assert read_rejects(job.root, folder) == {manifest.rejected_ids[0]: reason}


@pytest.mark.slow
def test_a_device_that_is_lost_for_good_ends_the_run_in_words(job, monkeypatch):
    monkeypatch.setattr(generate, "TeacherActor", HasNoDevice)
    with pytest.raises(ray_errors()) as caught:
        job.run(PROMPTS, ONE_ATTEMPT)
    message, code = worker_failure(caught.value)
    assert code == Exit.REFUSED
    assert message.startswith(
        f"the device fails with the empty prompt, too: AcceleratorError: {LOST}"
    )
