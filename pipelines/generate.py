"""Stations 2–4 as a Ray Data job: landed prompts → teacher workers → Parquet pairs → a version.

Ray Data shards the rows, runs the teachers, writes the files and keeps a ledger of the ids it has
written; a run that was killed goes on where the ledger ends. The ledger only saves work: what the
data set holds is decided when it is sealed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, SaveMode
from ray.data.checkpoint import CheckpointConfig

from dmd_core.files import is_local
from pipelines.landed import table_ids
from pipelines.lease import Lease
from pipelines.ledger import finished_ids, forget_unstored
from pipelines.manifest_model import Manifest
from pipelines.pair_names import FencedNames
from pipelines.pairs import PARQUET_OPTIONS
from pipelines.prompts import LandedFile, LandedPrompts
from pipelines.seal import (
    FileFacts,
    MissingRowsError,
    SealError,
    inspect_all,
    seal_generation,
)
from pipelines.teacher_actor import TeacherActor, TeacherTask
from pipelines.workers import workers_per_machine

# Ray asks for 1 GiB of logical memory per id filter by default, which a small machine may not
# have; a filter's process used 107 MiB, and each of its ids takes 8 bytes.
_FILTER_MEMORY_BYTES = 192 << 20
_FILES_PER_TASK = 32
_PASSES = 3
# Beside what Ray retries by itself: how S3-like stores say "slow down" through s3fs.
_RETRIED = (
    "SlowDown",
    "reduce your request rate",
    "ServiceUnavailable",
    "Service Unavailable",
    "Connection reset",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "Read timeout",
)


def generate_pairs(
    task: TeacherTask,
    prompts: LandedPrompts,
    lease: Lease,
    *,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Manifest:
    """Make the pairs that are not there yet and seal a version. Ray must be running.

    `on_phase` is told "generating" and "sealing". A ledger entry whose data vanished under the run
    (left over by a writer that was thought dead), or that lists a row which its data lacks, is
    found when sealing, and its rows are made.
    """
    root, fingerprint = task.root, task.fingerprint
    for last in (False,) * (_PASSES - 1) + (True,):
        on_phase("generating")
        stored = finished_ids(root, fingerprint.folder)
        for file in prompts.files:
            lease.check()
            if len(np.setdiff1d(table_ids(root, file.path), stored)):  # else no teacher is needed
                _write_missing_rows(task, file, lease)
        on_phase("sealing")
        try:
            return seal_generation(
                root, fingerprint, prompts, lease=lease, map_files=_map_on_cluster
            )
        except MissingRowsError as error:
            if last or not forget_unstored(root, fingerprint.folder, error.ids, lease):
                raise
    raise AssertionError("the last pass returns or raises")


def _write_missing_rows(task: TeacherTask, file: LandedFile, lease: Lease) -> None:
    """The Ray Data job of one landed file. Rows whose id is in the ledger reach no teacher."""
    section, root = task.section, task.root
    workers = workers_per_machine(section.most_actors)
    task = replace(task, height=file.height, width=file.width, workers=workers)
    # A copy: checkpointing set on the shared context would also filter a later training job.
    with DataContext.current(_context(task)):
        # Only a read from files is filtered by the ledger; rows handed over in memory would all
        # be made again.
        rows = ray.data.read_parquet([file.path], filesystem=root.arrow, partitioning=None)
        # One small file is one block, and one block goes to one worker: cut it.
        pairs = rows.repartition(target_num_rows_per_block=section.rows_per_block).map_batches(
            TeacherActor,
            fn_constructor_args=(task,),
            batch_size=section.batch_size,
            batch_format="pyarrow",
            compute=_pool(section.actors),
            num_cpus=section.cpus_per_actor,
            num_gpus=section.gpus_per_actor,
            **section.placement.options(),
        )
        data = root.path(task.fingerprint.folder, "data")
        if is_local(root.fs):
            root.fs.makedirs(data, exist_ok=True)
        # Any other mode than append empties the folder, or refuses to go on. A folder that Ray has
        # made it also removes when it has written nothing, whatever another writer put there since.
        pairs.write_parquet(
            data,
            filesystem=root.arrow,
            try_create_dir=False,
            mode=SaveMode.APPEND,
            filename_provider=FencedNames(lease.fence),
            row_group_size=section.row_group_rows,
            **PARQUET_OPTIONS,
        )


def _pool(actors) -> ActorPoolStrategy:
    """Teachers, each with its next block already fetched while it works."""
    if isinstance(actors, int):
        return ActorPoolStrategy(size=actors)
    return ActorPoolStrategy(min_size=actors.min, max_size=actors.max)


def _context(task: TeacherTask) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    # One block may take an hour, and so may the nodes that teachers wait for.
    context.execution_no_progress_timeout_s = -1
    context.retried_io_errors = [*context.retried_io_errors, *_RETRIED]
    checkpoint = CheckpointConfig(
        id_column="pair_id",
        checkpoint_path=task.root.path(task.fingerprint.folder, "ledger"),
        override_filesystem=task.root.arrow,
        delete_checkpoint_on_success=False,
    )
    checkpoint.checkpoint_actor_memory_bytes = _FILTER_MEMORY_BYTES
    checkpoint.checkpoint_actor_pool_max_size = 1
    context.checkpoint_config = checkpoint
    return context


def _map_on_cluster(
    inspect: Callable[[str], FileFacts], keys: Sequence[str]
) -> Iterable[FileFacts]:
    """Files are read where the workers are: their bytes do not pass through the driver."""
    parts = [keys[i : i + _FILES_PER_TASK] for i in range(0, len(keys), _FILES_PER_TASK)]
    work = ray.remote(num_cpus=1)(inspect_all)  # of a module that imports no teacher
    try:
        found = ray.get([work.remote(inspect, part) for part in parts])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SealError):
            raise error.cause from None  # a message for people, without the worker's traceback
        raise
    return [facts for part in found for facts in part]
