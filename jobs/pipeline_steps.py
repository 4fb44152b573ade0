"""The steps of a chain: what goes into each, what it leaves, and how it is done.

What was left is looked at cheaply: a manifest or marker with the digests of what it stands for, and
for the student the names and sizes of its files. Gigabytes are not read again; whoever damages a
file under its marker hears of it from the step that reads it.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from dmd_core.checkpoint import committed_steps, read_state
from jobs import evaluate, export, regenerate, report, train
from jobs.config import resolve_shipped
from jobs.pipeline_base import Chain, Step
from jobs.pipeline_trainings import another_attempt, begin, given_settings, newest_begun
from jobs.session import Session
from jobs.teacher_here import pair_source
from pipelines.beside_results import BEST
from pipelines.chain import StepRecord, changes_between, in_words
from pipelines.evaluation import FOLDER as EVALUATION
from pipelines.evaluation import METRICS, TIMED_WHERE
from pipelines.images import NUMERICS_VERSION as PICTURES_NUMERICS
from pipelines.manifest import latest_manifest
from pipelines.pairs import numerics_version
from pipelines.prompt_files import hash_file, list_files
from pipelines.prompts import PromptSource
from pipelines.run_folder import CHECKPOINTS
from pipelines.storage import Store
from pipelines.stored_images import stored_whole
from pipelines.student_export import checkpoint_digest

# Who does the work, and how patiently: no row and no weight follows from it.
_PAIRS_WORK = ("actors", "attempts", "lease_seconds", "cpus_per_actor", "gpus_per_actor")
_PAIRS_WORK += ("threads_per_actor", "compile", "placement")
_TRAIN_WORK = ("num_workers", "use_gpu", "cpus_per_worker", "threads_per_worker", "max_failures")
_TRAIN_WORK += ("micro_batch_size", "parallel", "report_to", "checkpoints_total_limit", "placement")
# Where the timing of an evaluation is measured.
_TIMING = ("pairs.threads_per_actor", *(f"evaluate.{name}" for name in TIMED_WHERE))


class Regenerate(Step):
    """Prompts and teacher → a sealed version. Its rows are never made twice, whoever asks."""

    module = regenerate

    def session(self, chain: Chain) -> Session:
        return chain.session

    def left_out(self, chain: Chain) -> str:
        return "" if chain.session.recipe.train.needs_pairs else "no stage of train needs pairs"

    def inputs(self, chain: Chain) -> dict[str, Any]:
        section, storage = chain.session.recipe.pairs, chain.session.recipe.storage
        settings = given_settings(section)
        return _without(settings, ("prompts", "root", *_PAIRS_WORK), "pairs") | {
            "teacher": chain.teacher_revision,
            "prompts": _prompts_digest(pair_source(section), storage),
            "pairs": chain.session.pairs_root.url,
            "numerics": numerics_version(section.compute_dtype),
        }

    def is_done(self, chain: Chain) -> bool:
        return self.output(chain) is not None  # whoever sealed it

    def run(self, chain: Chain) -> None:
        super().run(chain)
        chain.forget_training()  # it is another one if the pairs are others

    def output(self, chain: Chain) -> dict[str, Any] | None:
        newest = latest_manifest(chain.session.pairs_root)
        return None if newest is None else {"version": newest.version, "digest": newest.digest}


class Train(Step):
    """Pairs, teacher and settings → the last checkpoint."""

    module = train

    def inputs(self, chain: Chain) -> dict[str, Any]:
        settings = given_settings(chain.session.recipe.train)
        return _without(settings, _TRAIN_WORK, "train") | dict(chain.training.inputs)

    def output(self, chain: Chain) -> dict[str, Any] | None:
        store = chain.run.store
        steps = committed_steps(store.fs, store.path(CHECKPOINTS))
        if not steps:
            return None
        state = read_state(store.fs, store.path(CHECKPOINTS), steps[-1])
        segments = state["pairs_segments"]
        return {
            "step": steps[-1],
            "checkpoint": checkpoint_digest(store, steps[-1]),
            "best_step": (chain.run.read_json(BEST) or {}).get("step"),
            "pairs_digest": segments[-1]["digest"] if segments else "",
        }

    def why_new(self, chain: Chain) -> str:
        """What makes it another training than the newest one that was begun."""
        if self.output(chain) is not None:
            return "begun, not finished"
        newest = newest_begun(chain.session)
        if newest is None or newest.name == chain.training.name:
            return ""
        changes = changes_between(newest.inputs, chain.training.inputs)
        what = in_words(changes) if changes else "asked for once more"
        return f"a new training: {what} (the one before stays in {newest.folder})"

    def run(self, chain: Chain) -> None:
        begin(chain.session, chain.training)
        super().run(chain)

    def redo(self, chain: Chain) -> None:
        """In a folder of its own: what is finished stays as it was, and can be compared."""
        if self.output(chain) is not None:
            begin(chain.session, another_attempt(chain.session, chain.training_inputs))
            chain.forget_training()


class Export(Step):
    """A checkpoint → the student's folder."""

    module = export
    marker = export.EXPORTED

    def inputs(self, chain: Chain) -> dict[str, Any]:
        step = export.plan(chain.run)["checkpoint_step"]
        return {
            "step": step,
            "checkpoint": checkpoint_digest(chain.run.store, step),
            "teacher": chain.teacher_revision,
        }

    def output(self, chain: Chain) -> dict[str, Any] | None:
        exported, files = chain.run.read_json(export.EXPORTED), _sizes(chain.run.store)
        if exported is None or "model_index.json" not in files:
            return None
        if "student_revision" not in exported:  # by a release that did not take it
            return None
        return {
            "step": exported["step"],
            "student": exported["student_revision"],
            "files": _digest(sorted(files.items())),
        }


class Evaluate(Step):
    """Student, teacher and held-out prompts → metrics.json and pictures."""

    module = evaluate
    marker = METRICS

    def inputs(self, chain: Chain) -> dict[str, Any]:
        recipe, exported = chain.session.recipe, chain.kept(export.EXPORTED)
        section, storage = recipe.evaluate, recipe.storage
        return _without(given_settings(section), ("prompts", "actors"), "evaluate") | {
            "prompts": _prompts_digest(PromptSource((resolve_shipped(section.prompts),)), storage),
            "numerics": PICTURES_NUMERICS,
            "student": exported["student_revision"],
            "teacher": exported["teacher_revision"],
            "pairs_digest": exported["pairs_digest"],
            "pairs.threads_per_actor": recipe.pairs.threads_per_actor,
        }

    def record(self, chain: Chain) -> StepRecord | None:
        """One that an earlier release left does not name the numerics; what it measured does."""
        record = super().record(chain)
        if record is None or "numerics" in record.inputs:
            return record
        made = (chain.run.read_json(METRICS) or {}).get("provenance", {}).get("inputs") or {}
        return replace(record, inputs={**record.inputs, "numerics": made.get("numerics")})

    def drop(self, chain: Chain) -> None:
        """Where the timing alone is due, the verb goes on with the rest."""
        record = self.record(chain)
        changes = {} if record is None else changes_between(record.inputs, self.inputs(chain))
        timing_alone = bool(changes) and all(name.startswith(_TIMING) for name in changes)
        if record is None or not timing_alone or record.output != self.output(chain):
            super().drop(chain)

    def output(self, chain: Chain) -> dict[str, Any] | None:
        metrics, store = chain.run.read_json(METRICS), chain.run.store
        if metrics is None:
            return None
        whole = (stored_whole(store, folder) for folder in metrics["pictures"].values())
        if not store.fs.exists(store.path(metrics["noise"])) or not all(whole):
            return None
        return {"metrics": _digest(metrics)}

    def redo(self, chain: Chain) -> None:
        """The pictures, too, which stay otherwise: each is named for all that it follows from."""
        super().drop(chain)
        store = chain.run.store
        if store.fs.exists(store.path(EVALUATION)):
            store.fs.rm(store.path(EVALUATION), recursive=True)


class Report(Step):
    """Everything a training made → one page."""

    module = report
    marker = report.STATE

    def inputs(self, chain: Chain) -> dict[str, Any]:
        chain.kept(METRICS)  # or an error that says what to do
        return report.made_from(chain.run)

    def output(self, chain: Chain) -> dict[str, Any] | None:
        store = chain.run.store
        path = store.path(report.REPORT)
        if chain.run.read_json(report.STATE) is None or not store.fs.exists(path):
            return None
        page: Any = store.fs.cat_file(path)
        return {"report": hashlib.sha256(page).hexdigest()}


STEPS: tuple[Step, ...] = (Regenerate(), Train(), Export(), Evaluate(), Report())
NAMES = tuple(step.name for step in STEPS)


def _without(settings: Mapping[str, Any], names: Iterable[str], section: str) -> dict[str, Any]:
    """Settings of a section, but those of `names`, under their whole keys."""
    left_out = set(names)
    return {f"{section}.{k}": v for k, v in settings.items() if k.split(".")[0] not in left_out}


def _prompts_digest(source: PromptSource, storage: Any) -> str:
    """Of the bytes of the files, whatever their names."""
    files = list_files(source, storage)
    return _digest([source.column, [[file.kind, hash_file(file)] for file in files]])


def _sizes(store: Store) -> dict[str, int]:
    """The student's files: relative name → bytes."""
    folder = store.path(export.STUDENT)
    if not store.fs.exists(folder):
        return {}
    found: Any = store.fs.find(folder, detail=True)
    return {path[len(folder) + 1 :]: entry["size"] for path, entry in found.items()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
