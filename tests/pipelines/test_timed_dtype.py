"""What is timed beside each other computes alike: the student as a teacher loaded for bfloat16."""

import torch
from torch import nn

from dmd_core.teacher import load_teacher
from pipelines.systems import load_plainly
from pipelines.timing import compute_in


def _dtypes(network: nn.Module) -> list[torch.dtype]:
    return [parameter.dtype for parameter in network.parameters()]


def test_a_timed_student_keeps_its_matrices_as_the_teacher_does(tiny_teacher_dir):
    teacher = load_teacher(tiny_teacher_dir, compute_dtype=torch.bfloat16).pipeline
    student = load_plainly(tiny_teacher_dir, "cpu")
    compute_in(student, torch.bfloat16, "cpu")
    for part in ("unet", "text_encoder", "vae"):
        assert _dtypes(getattr(student, part)) == _dtypes(getattr(teacher, part)), part
    assert torch.bfloat16 in _dtypes(student.unet)
