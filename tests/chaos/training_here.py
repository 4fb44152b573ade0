"""`dmd train` of a tiny teacher on the Ray of the test session, and what it leaves on a store."""

import time
from pathlib import Path

import torch

from dmd_core.checkpoint import Checkpoint, committed_steps, load_checkpoint
from jobs.cli import main
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store
from tests.chaos.training_run import metric_lines

STEPS, EVERY = 40, 4  # of a training, of its checkpoints


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(f"prompt {index}" for index in range(12)))
    return path


def train_here(root: Store, teacher: str, prompts: Path, endpoint: str = "") -> int:
    """The exit code of `dmd train`, in this process."""
    settings = {
        "run.dir": root.url, "teacher.path": teacher, "pairs.prompts": prompts,
        "train.lambda_reg": 0, "train.train_batch_size": 16,
        "train.max_train_steps": STEPS, "train.checkpointing_steps": EVERY,
        "train.checkpoints_total_limit": 20, "train.validation_steps": 1000,
        "train.report_to": "none",
    }  # fmt: skip
    if endpoint:
        settings["storage.endpoint_url"] = endpoint
    arguments = ["train", "--config", "tiny", "--json"]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    started = time.monotonic()
    code = main(arguments)
    print(f"exit code {code} after {time.monotonic() - started:.0f} s")
    return code


def final(root: Store) -> Checkpoint:
    """Every checkpoint is loaded and verified, and nothing else is there; each step has a line."""
    folder = root.path(CHECKPOINTS)
    steps = committed_steps(root.fs, folder)
    found = [load_checkpoint(root.fs, folder, step) for step in steps]
    assert steps[-1] == STEPS
    there = {path.split("/checkpoint-")[1][:8] for path in root.fs.find(folder)}
    torn = there - {f"{step:08d}" for step in steps}
    print(f"checkpoints {steps}, without a marker {sorted(torn)}")
    lines = metric_lines(root.fs.cat_file(root.path("metrics.jsonl")))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    last = found[-1]
    assert last is not None
    return last


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    """One worker in both: bit for bit, whatever was done again."""
    assert found.state["progress"] == expected.state["progress"]
    for part, tensors in expected.parts.items():
        for name, value in tensors.items():
            assert torch.equal(value, found.parts[part][name]), f"{part}/{name}"
