"""Which settings make a run what it is."""

from collections.abc import Collection, Mapping
from typing import Any

# Settings that may change when a run goes on; any other change is another run.
MAY_CHANGE = {
    "run.dir",
    "storage",  # the same objects by another address
    "ray",
    "cost",
    "evaluate",
    "train_teacher",  # `dmd train-teacher` keeps its own record: TEACHER_MAY_CHANGE
    "train.max_train_steps",
    "train.num_workers",
    "train.use_gpu",
    "train.cpus_per_worker",
    "train.placement",
    "train.threads_per_worker",
    "train.max_failures",
    "train.max_nonfinite_updates",
    "train.checkpointing_steps",
    "train.checkpoints_total_limit",
    "train.validation_steps",
    "train.num_validation_images",
    "train.report_to",
    "train.follow_pairs",
    "train.micro_batch_size",
    "train.parallel",
    "train.health",
    "train.evaluation",
    # What a training reads of the pairs is guarded by their manifest and the run's pins, so a list
    # that grows, or other files and batches of the same rows, lock no run out.
    "pairs.prompts",
    "pairs.prompt_column",
    "pairs.samples_per_prompt",
    "pairs.batch_size",
    "pairs.compile",
    "pairs.rows_per_block",
    "pairs.row_group_rows",
    "pairs.max_rejected_share",
    "pairs.attempts",
    "pairs.lease_seconds",
    "pairs.keep_versions",
    "pairs.actors",
    "pairs.cpus_per_actor",
    "pairs.gpus_per_actor",
    "pairs.threads_per_actor",
    "pairs.placement",
}

# Where a run's inputs lie: what is found there is held against digests that the run kept.
PLACES = {"teacher", "pairs.root"}

# Settings that may change when the training of a teacher goes on.
TEACHER_MAY_CHANGE = {
    "train_teacher.output",
    "train_teacher.unet_steps",
    "train_teacher.num_workers",
    "train_teacher.use_gpu",
    "train_teacher.placement",
    "train_teacher.threads_per_worker",
    "train_teacher.max_failures",
    "train_teacher.checkpointing_steps",
    "train_teacher.logging_steps",
}


def changed_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """What differs between two sets of flat settings and may not, as "key: old → new"."""
    return [
        f"{key}: {then.get(key)!r} → {now.get(key)!r}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not is_one_of(key, may_change)
    ]


def is_one_of(key: str, prefixes: Collection[str]) -> bool:
    """Is it one of these keys, or below one?"""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def flat_settings(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"a.b.c": value}."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flat_settings(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
