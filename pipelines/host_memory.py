"""What a training on GPUs needs of the machines' own memory, added up beforehand."""

from dataclasses import dataclass

import torch

from pipelines.memory_plan import checkpoint_bytes, training_width
from pipelines.network_sizes import FLOAT, NetworkSizes
from pipelines.train_config import TrainSection
from pipelines.weights import Weights


@dataclass(frozen=True)
class HostMemory:
    """Bytes. `start`: of each worker until its networks are on its GPU; `offloaded` and `saved`: of
    all workers together while they train, the teacher and the copy of what is being saved."""

    start: int
    offloaded: int
    saved: int

    def largest(self, workers: int) -> int:
        return max(workers * self.start, self.offloaded + self.saved)


def converted_bytes(part: Weights, stored: torch.dtype, compute: torch.dtype) -> int:
    """Of host memory that a VAE or a text encoder takes before it moves to the GPU: of what is not
    used in the dtype of its files, `stored`. `compute`: what text encoders are used in."""
    matrices = part.matrices if part.part.startswith("text_encoder") else 0
    used = ((matrices, compute), (part.parameters - matrices, torch.float32))
    return sum(count * dtype.itemsize for count, dtype in used if dtype != stored)


def host_memory(
    sizes: NetworkSizes, section: TrainSection, *, mapped: bool, converted: int = 0
) -> HostMemory:
    """`mapped`: the denoiser's files are in float32, and their pages serve all processes of a
    machine; from any other dtype each worker converts them for itself. `converted`: the largest
    `converted_bytes` of the teacher's other parts, which move to the GPU one after another.

    Where something is sharded the teacher's network is loaded into host memory, and what is not to
    be sharded is copied there (`dmd_core.networks`); else the copies are made on the GPU.
    """
    parallel = section.parallel
    whole = (parallel.generator, parallel.fake).count("ddp") if parallel.shards else 0
    offloaded = parallel.teacher == "offload"
    network = FLOAT * sizes.denoiser * (not mapped)
    waiting = network if parallel.shards else 0  # while other parts are loaded
    return HostMemory(
        start=max(network + FLOAT * sizes.denoiser * whole, waiting + converted),
        offloaded=sizes.frozen_denoiser(training_width(section)) if offloaded else 0,
        saved=checkpoint_bytes(sizes, section),
    )
