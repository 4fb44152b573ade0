"""Do the published architectures run, how long does it take, and how much memory?

    python -m benchmarks.architectures sd15 sdxl --gpu       one GPU, the recipes' sizes
    python -m benchmarks.architectures sd15                  a CPU, 128 pixels, 48 GB with the swap
    python -m benchmarks.architectures sdxl --only pairs     a CPU, 256 pixels, 12 GB

Stable Diffusion 1.5 and XL as large as they are, with random weights (`benchmarks.published`): for
each of them `dmd pairs`, `dmd train` and `dmd export` of its recipe, one after another as a user
runs them, and then one picture of the student by plain diffusers. Seconds are those of whole
commands, with Ray's start, reading of weights and saving of checkpoints. Memory is the most that
one process of a command held, swap included, beside what `dmd doctor` had said of a worker; with
`--gpu` it is the most that the GPU had in use.

Prints what it found; `--out` keeps it as JSON. `--gpu` has not been run.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.machine import memory_gb, processor, versions
from benchmarks.pair_bench import say, write_prompts
from benchmarks.published import ARCHITECTURES, write_published
from jobs.config import load_recipe

VERBS = ("pairs", "train", "export")
_LIBRARIES = ("ray", "torch", "diffusers", "transformers", "numpy")
_PROMPTS, _STEPS = 4, 2  # steps of the teacher's solver, and of the training
_SIDE = {"sd15": 128, "sdxl": 256}  # pixels on a CPU
# What a machine with one worker needs; what makes the method stays the recipe's own.
_COMMON: dict[str, Any] = {
    "teacher.revision": "",
    "pairs.actors": 1,
    "train.num_workers": 1,
    "train.max_train_steps": _STEPS,
    "train.train_batch_size": 2,
    "train.lr_warmup_steps": 1,
    "train.checkpointing_steps": _STEPS,
    "train.validation_steps": _STEPS,
    "train.num_validation_images": 2,
    "train.logging_steps": 1,
}
_CPU: dict[str, Any] = {
    "pairs.steps": _STEPS,
    "pairs.batch_size": 2,
    "pairs.rows_per_block": 2,
    "pairs.gpus_per_actor": 0,
    "pairs.threads_per_actor": os.cpu_count(),
    "train.use_gpu": "false",
    "train.cpus_per_worker": 1,
    "train.threads_per_worker": os.cpu_count(),
    "train.micro_batch_size": 1,
    "evaluate.gpus_per_actor": 0,
}


@dataclass(frozen=True)
class Measured:
    """`peak_gb`: of the largest process, or of the GPU."""

    seconds: float
    peak_gb: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(ARCHITECTURES))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--only", choices=VERBS, action="append", help="all of them if not told")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--workdir", type=Path, help="where 60 GB are free; left as it was")
    options = parser.parse_args(arguments)
    if options.workdir:
        options.workdir.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in options.names:
        with tempfile.TemporaryDirectory(prefix="dmd-bench-", dir=options.workdir) as folder:
            results[name] = measure(name, Path(folder), options)
        say(json.dumps({name: results[name]}, indent=1))
        if options.out:  # after each: the next one may find no room
            _write(options.out, results)
    return 0


def _write(out: Path, results: dict[str, Any]) -> None:
    """Names that are in the file already and were not run stay in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(out.read_text())["results"] if out.exists() else {}
    content = {
        "results": earlier | results,
        "hardware": _hardware(),
        "versions": versions(_LIBRARIES),
    }
    out.write_text(json.dumps(content, indent=1) + "\n")
    say(f"written to {out}")


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every verb of one architecture; a verb that fails ends the benchmark with its output."""
    write_published(name, folder / "teacher")
    arguments = _arguments(name, folder, options)
    command = ["--config", name, *(f"--set={key}={value}" for key, value in arguments.items())]
    told = [argument for argument in command[2:] if str(folder) not in argument]
    found: dict[str, Any] = {"doctor": _said_by_doctor(command), "arguments": told}
    for verb in options.only or VERBS:
        found[verb] = asdict(_run(verb, command, folder, options.gpu))
        say(f"{name} {verb}: {found[verb]}")
    student = folder / "run" / "student"
    if student.is_dir():
        side = None if options.gpu else _SIDE[name]
        found["a picture of the student's"] = _draw(student, side, options.gpu)
    return found


def _arguments(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    write_prompts(folder / "prompts.txt", _PROMPTS)
    own: dict[str, Any] = {
        "run.dir": folder / "run",
        "teacher.path": folder / "teacher",
        "pairs.prompts": folder / "prompts.txt",
    }
    section = load_recipe(name, []).train
    if section.uses_gan:
        own["train.real_pictures"] = _write_pictures(folder / "pictures")
    if section.needs_pairs:  # the perceptual losses need files that are not shipped
        own |= {"train.regression_loss": "l2", "train.regression_batch_size": 2}
    if not options.gpu:
        own |= _CPU | {"pairs.height": _SIDE[name], "pairs.width": _SIDE[name]}
    return _COMMON | own | dict(setting.split("=", 1) for setting in options.set)


def _write_pictures(folder: Path) -> Path:
    """Of noise: what a GAN learns of them is not looked at."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for index, caption in enumerate(("red fox", "blue whale")):
        pixels = rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def _said_by_doctor(command: list[str]) -> dict[str, str]:
    """What it says of memory; other checks may fail here, and its exit code tells of all."""
    process = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "doctor", *command, "--json"], stdout=subprocess.PIPE
    )
    found = {check["name"]: check["found"] for check in json.loads(process.stdout)["checks"]}
    return {name: words for name, words in found.items() if name.startswith("memory: ")}


def _run(verb: str, command: list[str], folder: Path, gpu: bool) -> Measured:
    log = folder / f"{verb}.log"
    # A machine that lives on its swap is what is asked for here: Ray would end its workers.
    environment = os.environ | {"RAY_memory_monitor_refresh_ms": "0"}
    began = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", verb, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        with watched(process.pid, gpu) as peak:
            code = process.wait()
    if code:
        raise SystemExit(
            f"dmd {verb} ended with {code}:\n{log.read_text(errors='replace')[-4000:]}"
        )
    return Measured(round(time.monotonic() - began, 1), round(max(peak) / 1e9, 2))


@contextlib.contextmanager
def watched(process: int, gpu: bool) -> Iterator[list[int]]:
    """A list whose maximum is the peak in bytes, once the block has ended."""
    seen, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            seen.append(_gpu_bytes() if gpu else max(map(_held, _family(process)), default=0))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _family(process: int) -> list[int]:
    """A process and all that descend from it: Ray's workers are its children's children."""
    found = [process]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found += map(int, children.read_text().split())
    return found


def _held(process: int) -> int:
    """Bytes of its own, in memory and in the swap, without pages of files, which the kernel drops
    when it needs them; 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        sizes = [line.split()[1] for line in lines if line.startswith(("RssAnon", "VmSwap"))]
        return 1024 * sum(map(int, sizes))
    return 0


def _gpu_bytes() -> int:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    output = subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout
    return 2**20 * max(map(int, output.split()))


def _draw(student: Path, side: int | None, gpu: bool) -> dict[str, float]:
    """Called as its user would: the scheduler knows the student's times."""
    steps = json.loads((student.parent / "student.json").read_text())["num_inference_steps"]
    pipeline: Any = DiffusionPipeline.from_pretrained(student, dtype=torch.bfloat16)
    pipeline.to("cuda" if gpu else "cpu").set_progress_bar_config(disable=True)
    began = time.monotonic()
    pixels = pipeline(
        "a red fox", height=side, width=side, num_inference_steps=steps, guidance_scale=0.0,
        output_type="np",
    ).images  # fmt: skip
    if not np.isfinite(pixels).all() or pixels.std() < 1e-3:
        raise SystemExit(f"{student}: plain diffusers draws nothing with it")
    return {"evaluations": steps, "seconds": round(time.monotonic() - began, 1)}


def _hardware() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = {"processor": processor(), "cores": os.cpu_count(), "memory_gb": memory_gb()}
    return cores | {"gpu": gpu}


if __name__ == "__main__":
    raise SystemExit(main())
