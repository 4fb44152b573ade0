"""What a training on GPUs needs of the machines' own memory, added up beforehand."""

from dataclasses import dataclass

from pipelines.memory_plan import checkpoint_bytes, training_width
from pipelines.network_sizes import FLOAT, NetworkSizes
from pipelines.train_config import TrainSection


@dataclass(frozen=True)
class HostMemory:
    """Bytes. `start`: of each worker until its networks are on its GPU; `offloaded` and `saved`: of
    all workers together while they train, the teacher and the copy of what is being saved."""

    start: int
    offloaded: int
    saved: int

    def largest(self, workers: int) -> int:
        return max(workers * self.start, self.offloaded + self.saved)


def host_memory(sizes: NetworkSizes, section: TrainSection, *, mapped: bool) -> HostMemory:
    """`mapped`: the denoiser's files are in float32, and their pages serve all processes of a
    machine; from any other dtype each worker converts them for itself.

    Where something is sharded the teacher's network is loaded into host memory, and what is not to
    be sharded is copied there (`dmd_core.networks`); else the copies are made on the GPU.
    """
    parallel = section.parallel
    whole = (parallel.generator, parallel.fake).count("ddp") if parallel.shards else 0
    offloaded = parallel.teacher == "offload"
    return HostMemory(
        start=FLOAT * sizes.denoiser * (whole + (not mapped)),
        offloaded=sizes.frozen_denoiser(training_width(section)) if offloaded else 0,
        saved=checkpoint_bytes(sizes, section),
    )
