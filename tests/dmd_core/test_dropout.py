"""A teacher that was trained with dropout is distilled without it."""

import json
import shutil

import pytest
import torch

from dmd_core.lora import LoraSettings
from dmd_core.networks import DmdNetworks, TrainerSettings
from dmd_core.parallel import Parallel, World
from dmd_core.teacher import load_teacher
from tests.dmd_core.family_calls import PROMPTS, noise

CASES = {
    "whole": ("edm", TrainerSettings()),
    "sharded": ("edm", TrainerSettings(parallel=Parallel(generator="fsdp", fake="fsdp"))),
    "judged": ("edm", TrainerSettings(discriminator=True)),
    "adapters": ("sd", TrainerSettings(lora=LoraSettings(rank=2, alpha=2))),
    "checkpointed": ("sd", TrainerSettings(parallel=Parallel(gradient_checkpointing=True))),
}


def _with_dropout(families, name, target):
    folder = shutil.copytree(families.folder(name), target)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dropout": 0.5}))
    return load_teacher(str(folder))


@pytest.mark.parametrize("case", list(CASES))
def test_student_and_fake_score_are_the_teacher_s_network_without_dropout(families, tmp_path, case):
    name, settings = CASES[case]
    teacher = _with_dropout(families, name, tmp_path / "teacher")
    # The teacher's folder is what it says: in training mode its network would be noisy.
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in teacher.model.modules())
    z, cond, t = noise(teacher), teacher.encode_prompts(PROMPTS), torch.tensor([300, 700])
    expected = teacher.denoiser()(z, t, cond)
    networks = DmdNetworks(teacher, settings, World(), teacher.latent_shape())
    # With gradients, as in an update.
    pictures = [networks.student_trained(z, cond).detach() for _ in range(2)]
    scores = [networks.fake_trained(z, t, cond).detach() for _ in range(2)]
    assert torch.equal(*pictures) and torch.equal(*scores)
    torch.testing.assert_close(scores[0], expected, rtol=1e-5, atol=1e-5)


def test_checkpointing_runs_blocks_again_without_training_mode(families):
    teacher = families.teacher("sd")
    settings = TrainerSettings(parallel=Parallel(gradient_checkpointing=True))
    networks = DmdNetworks(teacher, settings, World(), teacher.latent_shape())
    ran = []
    networks.generator.mid_block.resnets[-1].register_forward_pre_hook(lambda *_: ran.append(1))
    networks.student_trained(noise(teacher), teacher.encode_prompts(PROMPTS)).sum().backward()
    assert len(ran) == 2
