"""The verbs of a chain without Ray and without networks: each leaves files as the real one does,
and does nothing where its own marker says that all is there."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmd_core.checkpoint import Checkpoint, committed_steps, read_state, save_checkpoint
from dmd_core.teacher import teacher_revision
from jobs import evaluate, export, regenerate, report, train
from jobs.pins import run_pins, save_pins
from jobs.session import Session
from pipelines.evaluation import METRICS
from pipelines.manifest import latest_manifest, load_versions
from pipelines.pairs import fingerprint_of
from pipelines.run_folder import CHECKPOINTS
from pipelines.seal import seal_generation
from pipelines.student_export import checkpoint_digest
from tests.pipelines.dmd_runs import seal_pairs
from tests.pipelines.made_pairs import land_ids

SHAPE = (4, 4, 4)


class FakeVerbs:
    """`ran`: the verbs that were called. `refuse`, `fail`: verb → what it raises, once, before it
    has left anything, and in the middle of its work."""

    def __init__(self, patch: Callable[[Any, str, Any], None]) -> None:
        self.ran: list[str] = []
        self.refuse: dict[str, Exception] = {}
        self.fail: dict[str, Exception] = {}
        for module, verb in (
            (regenerate, self.regenerate), (train, self.train), (export, self.export),
            (evaluate, self.evaluate), (report, self.report),
        ):  # fmt: skip
            patch(module, "run", verb)

    def take(self) -> list[str]:
        """What ran since the last time."""
        ran, self.ran = self.ran, []
        return ran

    def _begins(self, verb: str) -> None:
        self.ran.append(verb)
        if verb in self.refuse:
            raise self.refuse.pop(verb)

    def _breaks(self, verb: str) -> None:
        if verb in self.fail:
            raise self.fail.pop(verb)

    def regenerate(self, session: Session) -> None:
        self._begins("regenerate")
        rows = len(set(Path(str(session.recipe.pairs.prompts)).read_text().split("\n")))
        root, section = session.pairs_root, session.recipe.pairs
        revision = teacher_revision(session.teacher_dir)
        fingerprint = fingerprint_of(section, revision)
        made = max(
            (m.rows for m in load_versions(root) if m.fingerprint_digest == fingerprint.digest),
            default=0,
        )
        if rows > made:
            seal_pairs(
                root, section, revision, SHAPE, range(made + 1, rows + 1), base=f"rows-{rows}"
            )
        else:  # whose version says what the newest one says is not sealed again
            seal_generation(root, fingerprint, land_ids(root, range(1, rows + 1)))
        self._breaks("regenerate")

    def train(self, session: Session) -> None:
        self._begins("train")
        session.open_run()
        fs, root, section = session.store.fs, session.store.path(CHECKPOINTS), session.recipe.train
        steps, teacher = committed_steps(fs, root), teacher_revision(session.teacher_dir)
        pins = run_pins(session, started=bool(steps))
        if not steps:
            train._check_begins_from(session, pins)
        save_pins(session, pins)
        segments = [{"version": pins.default, "digest": pins.digest}] if pins.default else []
        if steps:
            segments = read_state(fs, root, steps[-1])["pairs_segments"]
        for step in (1, section.max_train_steps or 6):
            if step > (steps or [0])[-1]:
                newest = latest_manifest(session.pairs_root)
                if newest is not None and section.follow_pairs != "no":
                    segments = [{"version": newest.version, "digest": newest.digest}]
                state = {
                    "step": step, "finished": step > 1, "total_steps": section.total_steps,
                    "rate": section.learning_rate, "pairs_digest": pins.digest,
                    "pairs_segments": segments, "teacher_revision": teacher,
                }  # fmt: skip
                save_checkpoint(fs, root, Checkpoint(step, {}, state), alone=True)
            if step == 1:
                self._breaks("train")

    def export(self, session: Session) -> None:
        self._begins("export")
        store = session.store
        step = committed_steps(store.fs, store.path(CHECKPOINTS))[-1]
        done, digest = session.read_json(export.EXPORTED) or {}, checkpoint_digest(store, step)
        if done.get("checkpoint_digest") == digest and "student_revision" in done:
            return
        state = read_state(store.fs, store.path(CHECKPOINTS), step)
        weights = json.dumps(state).encode()
        store.fs.pipe_file(store.path("student", "model_index.json"), b"{}")
        self._breaks("export")
        store.fs.pipe_file(store.path("student", "unet.safetensors"), weights)
        exported = {
            "step": step, "checkpoint_digest": digest, "num_inference_steps": 1,
            "student_revision": hashlib.sha256(weights).hexdigest(),
            "teacher_revision": teacher_revision(session.teacher_dir),
            "pairs_digest": state["pairs_digest"],
        }  # fmt: skip
        session.write_json(export.EXPORTED, exported)

    def evaluate(self, session: Session) -> None:
        self._begins("evaluate")
        exported, store = session.read_json(export.EXPORTED), session.store
        assert exported is not None
        of = [exported["student_revision"], session.recipe.evaluate.seed]
        if (session.read_json(METRICS) or {}).get("of") == of:
            return
        store.fs.pipe_file(store.path("evaluation", "noise"), b"noise")
        self._breaks("evaluate")
        metrics = {"noise": "evaluation/noise", "pictures": {}, "of": of}
        session.write_json(METRICS, metrics)

    def report(self, session: Session) -> None:
        self._begins("report")
        metrics: Any = session.store.fs.cat_file(session.store.path(METRICS))
        made_from = report.made_from(session)
        if (session.read_json(report.STATE) or {}).get("made_from") == made_from:
            return
        session.store.fs.pipe_file(session.store.path(report.REPORT), metrics)
        self._breaks("report")
        session.write_json(report.STATE, {"made_from": made_from})
