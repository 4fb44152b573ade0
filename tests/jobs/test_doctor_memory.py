"""The doctor's look at memory: what it says where there is nothing here to compare with."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from dmd_core.pass_memory import PassMemory, UnknownNetworkError
from jobs import doctor_teacher
from jobs.doctor_checks import Check
from jobs.doctor_teacher import TeacherChecks
from jobs.plans import size_in_words
from jobs.session import open_session
from pipelines.memory_plan import MemoryPlan
from tests.dmd_core.tiny_families import stable_diffusion

MIB = 2**20
ALL = "24 GB, 40 GB, 80 GB, 141 GB"


@pytest.fixture(autouse=True)
def passes(monkeypatch):
    """Passes of 1 and 8 samples, without playing a network through."""
    memory = PassMemory((MIB, 8 * MIB), (MIB, 8 * MIB), (MIB, 8 * MIB))
    monkeypatch.setattr(doctor_teacher, "pass_memory", lambda *_, **__: memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def memory(folder: str, *settings: str) -> dict[str, Check]:
    chosen = [f"teacher.path={folder}", "pairs.prompts=shipped:demo", *settings]
    with open_session("tiny", chosen, quiet=True) as session:
        return {check.name: check for check in TeacherChecks(session, session.teacher_dir).memory()}


def test_without_a_gpu_the_sum_is_held_against_usual_ones(tiny_teacher_dir):
    asked = ["pairs.gpus_per_actor=0.5", "train.use_gpu=true"]
    checks = memory(tiny_teacher_dir, *asked)
    teachers, training = (checks[f"memory: {name} here"] for name in ("teachers", "training"))
    assert teachers.status == training.status == "skip"
    assert teachers.found == f"2 × 1.02 GiB: fits a GPU of {ALL}; no GPU here to compare with"
    assert training.found.startswith("1 × ") and f"fits a GPU of {ALL}" in training.found

    # Guidance doubles the rows, of 1 MiB each.
    many = ["pairs.batch_size=8000", "pairs.rows_per_block=8000"]
    found = memory(tiny_teacher_dir, *asked, *many)["memory: teachers here"].found
    assert "fits a GPU of 40 GB, 80 GB, 141 GB;" in found
    many = ["pairs.batch_size=80000", "pairs.rows_per_block=80000"]
    teachers = memory(tiny_teacher_dir, *asked, *many)["memory: teachers here"]
    assert teachers.status == "warn" and teachers.advice and f"fits none of {ALL}" in teachers.found


@pytest.mark.parametrize(("name", "told"), [("flux", True), ("sd", False)])
def test_a_network_that_is_told_the_guidance_makes_no_second_pass(families, name, told):
    many = ["pairs.batch_size=1000", "pairs.rows_per_block=1000", "train.train_batch_size=1000"]
    once, guided = (
        memory(
            families.folder(name),
            *(f"{section}.guidance_scale={scale}" for section in ("pairs", "train")),
            *many,
        )
        for scale in (1, 3)
    )
    for what in ("memory: training", "memory: teachers here"):
        assert (once[what].found == guided[what].found) == told


def test_a_network_that_cannot_be_played_through_ends_no_other_check(tiny_teacher_dir, monkeypatch):
    def never(*_, **__):
        raise UnknownNetworkError("UNet2DConditionModel does not run: an operator asks for values")

    monkeypatch.setattr(doctor_teacher, "pass_memory", never)
    checks = memory(tiny_teacher_dir, "pairs.gpus_per_actor=1")
    for what in ("memory: training", "memory: teachers here"):
        assert "comes on top (UNet2DConditionModel does not run" in checks[what].found


def test_the_copy_that_is_saved_takes_memory_of_the_machine(tiny_teacher_dir, monkeypatch):
    """Weights and Adam's moments of both networks, in float32, and nothing of the frozen ones."""
    unet = teacher_parameters(tiny_teacher_dir)
    copy = 2 * 12 * unet
    room = SimpleNamespace(total=10 * copy)
    monkeypatch.setattr("jobs.doctor_teacher.psutil.virtual_memory", lambda: room)
    words = size_in_words(copy)
    without_gpu = memory(tiny_teacher_dir, "train.use_gpu=false")
    assert f" + {words} for the copy that is saved," in without_gpu["memory: training here"].found
    assert "memory: host" not in without_gpu
    elsewhere = memory(tiny_teacher_dir, "train.use_gpu=true")["memory: host"]
    assert elsewhere.status == "skip" and words in elsewhere.found

    with_a_gpu(monkeypatch)
    on_gpu = memory(tiny_teacher_dir, "train.use_gpu=true")
    assert on_gpu["memory: host"].status == "ok"
    assert on_gpu["memory: host"].found.startswith(f"{words} for the copy that is saved, of all")
    assert "copy" not in on_gpu["memory: training here"].found
    room.total = copy - 1
    small = memory(tiny_teacher_dir, "train.use_gpu=true")["memory: host"]
    assert small.status == "fail" and "lora" in small.advice
    cluster = ["train.use_gpu=true", "ray.address=head:6379"]
    assert memory(tiny_teacher_dir, *cluster)["memory: host"].status == "ok"


def test_what_is_saved_counts_where_a_training_has_no_gpu(tiny_teacher_dir, monkeypatch):
    """A machine that has room for the training, and not for the copy beside it, is refused."""
    copy = 2 * 12 * teacher_parameters(tiny_teacher_dir)
    monkeypatch.setattr(
        "jobs.doctor_teacher.training_memory", lambda *_, **__: MemoryPlan({"all": copy}, True)
    )
    room = SimpleNamespace(total=2 * copy)
    monkeypatch.setattr("jobs.doctor_teacher.psutil.virtual_memory", lambda: room)
    assert memory(tiny_teacher_dir)["memory: training here"].status == "ok"
    room.total -= 1
    assert memory(tiny_teacher_dir)["memory: training here"].status == "fail"


def test_workers_that_start_take_memory_of_the_machine(tmp_path, monkeypatch):
    """Each makes a float32 network of a float16 one; eight of them are more than the copy."""
    folder = str(tmp_path / "teacher")
    teacher = stable_diffusion()
    teacher.unet.half()
    teacher.save_pretrained(folder)
    start = 4 * teacher_parameters(folder)
    room = SimpleNamespace(total=8 * start)
    monkeypatch.setattr("jobs.doctor_teacher.psutil.virtual_memory", lambda: room)
    with_a_gpu(monkeypatch)
    sizes = [f"train.{batch}_batch_size=72" for batch in ("train", "regression")]
    for workers, status in ((8, "ok"), (9, "fail")):
        chosen = ["train.use_gpu=true", f"train.num_workers={workers}", *sizes]
        found = memory(folder, *chosen)["memory: host"]
        assert found.found.startswith(f"{size_in_words(start)} for each worker that starts, ")
        assert found.status == status and ("fewer workers" in found.advice) == (status == "fail")


def with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)


def teacher_parameters(folder: str) -> int:
    return sum(
        p.numel() for p in UNet2DConditionModel.from_pretrained(f"{folder}/unet").parameters()
    )
