"""`dmd report`: everything a run made → one self-contained `report.html` (station 10)."""

import hashlib
from importlib import resources
from typing import Any

from dmd_core.files import is_local, write_atomic
from jobs.errors import JobError
from jobs.export import EXPORTED
from jobs.pins import PINNED
from jobs.session import Session
from pipelines.evaluation import METRICS
from pipelines.report import collect_inputs, render_report

REPORT, STATE = "report.html", "report.json"


def run(session: Session) -> dict[str, Any]:
    """Render the report from the run's files; nothing to do when they have not changed."""
    store = session.store
    if not store.fs.exists(store.path(METRICS)):
        raise JobError(f"{store.url} has no {METRICS}; run `dmd evaluate` with this recipe first")
    session.check_settings()
    path = store.path(REPORT) if is_local(store.fs) else f"{store.url}/{REPORT}"
    # The metrics name everything they were made from, so their digest stands for the run.
    metrics: Any = store.fs.cat_file(store.path(METRICS))
    made_from = hashlib.sha256(metrics).hexdigest()
    done = session.read_json(STATE)
    if (
        done is not None
        and done["metrics_sha256"] == made_from
        and store.fs.exists(store.path(REPORT))
    ):
        session.display.done(f"report: nothing to do, {path}")
        return done
    inputs = collect_inputs(
        store,
        title=getattr(session.arguments, "title", store.root.rsplit("/", 1)[-1]),
        images=session.recipe.evaluate.report_images,
        json_files=("versions.json", EXPORTED, PINNED),
    )
    template = (resources.files("jobs") / "templates" / "report.html.j2").read_text("utf-8")
    write_atomic(store.fs, store.path(REPORT), render_report(inputs, template).encode())
    result = {"report": path, "metrics_sha256": made_from}
    session.write_json(STATE, result)
    session.display.done(f"report: {path}")
    return result


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    return {"writes_to": f"{session.store.url}/{REPORT}"}


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("report"))
