"""A driver of its own, to be killed: `generate_driver.py ROOT TEACHER PROMPTS SECTION_JSON`."""

import sys
from contextlib import contextmanager

import ray

from dmd_core.teacher import teacher_revision
from pipelines.config import PairsSection, StorageSection
from pipelines.factory import PairOrder, fill_order
from pipelines.pairs import fingerprint_of
from pipelines.progress import ProgressBoard
from pipelines.prompts import PromptSource
from pipelines.storage import open_store


@contextmanager
def watch(rows: int):
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=128 << 20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield ProgressBoard.remote()


def main(root_path: str, teacher: str, prompts: str, section_json: str) -> None:
    section = PairsSection.model_validate_json(section_json)
    order = PairOrder(
        section=section,
        source=PromptSource((prompts,)),
        teacher_url=teacher,
        fingerprint=fingerprint_of(section, teacher_revision(teacher)),
        storage=StorageSection(),
        root=open_store(root_path),
    )
    fill_order(order, watch, purpose="driver")


if __name__ == "__main__":
    main(*sys.argv[1:])
