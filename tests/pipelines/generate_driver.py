"""A driver of its own, to be killed: `generate_driver.py ROOT TEACHER PROMPTS SECTION_JSON`."""

import sys

import ray

from pipelines.config import PairsSection, StorageSection
from pipelines.generate import generate_pairs
from pipelines.prompts import land_prompts
from pipelines.storage import open_store


def main(root_path: str, teacher: str, prompts: str, section_json: str) -> None:
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=128 << 20,
        include_dashboard=False,
        log_to_driver=False,
    )
    section = PairsSection.model_validate_json(section_json)
    root = open_store(root_path)
    landed = land_prompts(
        prompts, None, root, seed=section.seed, samples_per_prompt=section.samples_per_prompt
    )
    generate_pairs(
        section, teacher_url=teacher, storage=StorageSection(), root=root, prompts=landed
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
