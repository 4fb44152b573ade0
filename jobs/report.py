"""`dmd report`: everything a run made → one self-contained `report.html` (station 10)."""

from importlib import resources
from typing import Any

from dmd_core.files import write_atomic
from jobs.errors import JobError
from jobs.export import EXPORTED
from jobs.pins import PINNED
from jobs.session import Session
from pipelines.evaluation import METRICS
from pipelines.report import collect_inputs, inputs_digests, render_report

REPORT, STATE = "report.html", "report.json"
_SHOWN = ("versions.json", EXPORTED, PINNED)  # value by value


def run(session: Session) -> dict[str, Any]:
    """Render the report from the run's files; nothing to do when they have not changed."""
    store = session.store
    if not store.fs.exists(store.path(METRICS)):
        raise JobError(f"{store.url} has no {METRICS}; run `dmd evaluate` with this recipe first")
    session.check_settings()
    _check_figures(session)
    path, sources = store.at(REPORT).url, made_from(session)
    done = session.read_json(STATE)
    there = store.fs.exists(store.path(REPORT))
    if done is not None and done.get("made_from") == sources and there:
        session.display.done(f"report: nothing to do, {path}")
        return {"report": path}
    inputs = collect_inputs(
        store,
        title=getattr(session.arguments, "title", store.root.rsplit("/", 1)[-1]),
        images=session.recipe.evaluate.report_images,
        json_files=_SHOWN,
    )
    template = (resources.files("jobs") / "templates" / "report.html.j2").read_text("utf-8")
    write_atomic(store.fs, store.path(REPORT), render_report(inputs, template).encode())
    session.write_json(STATE, {"made_from": sources})
    session.display.done(f"report: {path}")
    return {"report": path}


def _check_figures(session: Session) -> None:
    """Refuse figures of another student than the one that lies there: the page shows both."""
    exported, metrics = (session.read_json(name) or {} for name in (EXPORTED, METRICS))
    provenance = metrics.get("provenance", {})
    measured = provenance.get("inputs", {}) | provenance
    pairs = [(measured.get(key), exported.get(key)) for key in ("step", "student_revision")]
    # What an earlier release did not record cannot be compared.
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
        was, now = (found.get("step", "unknown") for found in (measured, exported))
        raise JobError(
            f"the figures in {session.store.url}/{METRICS} are of another student (step {was}) "
            f"than the one that lies there now (step {now}, {EXPORTED}); run `dmd evaluate` again "
            "(of a chain: `dmd pipeline --only evaluate`)"
        )


def made_from(session: Session) -> dict[str, Any]:
    """All that the page follows from: a digest of each file that it shows, and a setting. The run
    may go on under the same metrics, so these do not stand for it."""
    digests = inputs_digests(session.store, json_files=_SHOWN)
    return digests | {"evaluate.report_images": session.recipe.evaluate.report_images}


def plan(session: Session) -> dict[str, Any]:
    """What `run` would do; touches nothing."""
    return {"writes_to": f"{session.store.url}/{REPORT}"}


if __name__ == "__main__":
    from jobs.cli import verb_main

    raise SystemExit(verb_main("report"))
