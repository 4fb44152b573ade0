"""Stations 2–4 as a Ray Data job: landed prompts → teacher workers → Parquet pairs → a version.

Ray Data shards the rows, runs the teachers, writes the files and keeps a ledger of the ids it has
written; a run that was killed goes on where the ledger ends. The ledger only saves work: what the
data set holds is decided when it is sealed.
"""

from collections.abc import Callable, Iterable, Sequence

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, SaveMode
from ray.data.checkpoint import CheckpointConfig

from dmd_core.teacher import check_teacher, teacher_revision
from pipelines.config import PairsSection, StorageSection
from pipelines.manifest import Manifest, find_sealed
from pipelines.pairs import Fingerprint, fingerprint_of, library_versions
from pipelines.prompts import LandedPrompts
from pipelines.seal import FileFacts, SealError, list_names, seal_generation
from pipelines.storage import Store
from pipelines.teacher_actor import TeacherActor, TeacherTask, teacher_folder

# Ray asks for 1 GiB of logical memory per id filter by default, which a small machine may not
# have; a filter's process used 107 MiB, and each of its ids takes 8 bytes.
_FILTER_MEMORY_BYTES = 192 << 20
_FILES_PER_TASK = 32


def generate_pairs(
    section: PairsSection,
    *,
    teacher_url: str,
    storage: StorageSection,
    root: Store,
    prompts: LandedPrompts,
    fingerprint: Fingerprint | None = None,
    board=None,
) -> Manifest:
    """Make the pairs that are not there yet and seal a version. Ray must be running.

    `board`: a ProgressBoard handle, advanced by the rows handled. `fingerprint` saves reading the
    teacher's files once more where the caller has it already.
    """
    if fingerprint is None:
        with teacher_folder(teacher_url, storage) as path:
            check_teacher(path)
            fingerprint = fingerprint_of(section, teacher_revision(path))
    sealed = find_sealed(root, fingerprint.digest, prompts.digest)
    if sealed is not None:
        return sealed
    forget_lost_files(root, fingerprint)
    task = TeacherTask(section, teacher_url, storage, root, fingerprint, library_versions(), board)
    _write_missing_rows(task, prompts)
    return seal_generation(root, fingerprint, prompts, map_files=_map_on_cluster)


def forget_lost_files(root: Store, fingerprint: Fingerprint) -> list[str]:
    """Remove ledger entries whose data file is gone, so that their rows are made again.

    Ray names the data files of the ledger entry `x.parquet` `x-0.parquet`, `x-1.parquet`, ….
    Returns the names of the removed entries.
    """
    present = {name.rsplit("-", 1)[0] for name in list_names(root, fingerprint, "data")}
    lost = [
        name
        for name in list_names(root, fingerprint, "ledger")
        if not name.endswith(".pending.parquet") and name.removesuffix(".parquet") not in present
    ]
    for name in lost:
        root.fs.rm_file(root.path(fingerprint.folder, "ledger", name))
    return lost


def _write_missing_rows(task: TeacherTask, prompts: LandedPrompts) -> None:
    """The Ray Data job. Rows whose id is in the ledger do not reach a teacher."""
    section, root = task.section, task.root
    # A copy: checkpointing set on the shared context would also filter a later training job.
    with DataContext.current(_context(task)):
        rows = ray.data.read_parquet([prompts.path], filesystem=root.arrow, partitioning=None)
        # One small file is one block, and one block goes to one worker: cut it.
        pairs = rows.repartition(target_num_rows_per_block=section.rows_per_block).map_batches(
            TeacherActor,
            fn_constructor_args=(task,),
            batch_size=section.batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=section.actors),
            num_cpus=section.cpus_per_actor,
            num_gpus=section.gpus_per_actor,
        )
        pairs.write_parquet(
            root.path(task.fingerprint.folder, "data"),
            filesystem=root.arrow,
            mode=SaveMode.APPEND,
            row_group_size=section.row_group_rows,
        )


def _context(task: TeacherTask) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
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
    work = ray.remote(num_cpus=1)(_inspect_all)
    try:
        found = ray.get([work.remote(inspect, part) for part in parts])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SealError):
            raise error.cause from None  # a message for people, without the worker's traceback
        raise
    return [facts for part in found for facts in part]


def _inspect_all(inspect: Callable[[str], FileFacts], keys: Sequence[str]) -> list[FileFacts]:
    return [inspect(key) for key in keys]
