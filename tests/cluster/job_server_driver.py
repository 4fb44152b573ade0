"""Run by test_jobs_on_cluster.py beside a real job server: a schedule, and one tiny job."""

import json
import os
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ray.job_submission import JobSubmissionClient

from cluster.schedule import Entry
from cluster.submit import ACTIVE, job_status
from jobs.schedule_table import ScheduleTable
from jobs.schedule_tick import RayJobs, tick
from pipelines.storage import open_store

ROOT = str(Path(__file__).parent.parent.parent)
DUE = datetime(2026, 3, 1, 1, tzinfo=UTC)


def main() -> None:
    print(json.dumps(_schedule_once(os.environ["RAY_API_SERVER_ADDRESS"])))


def _schedule_once(address: str) -> dict:
    table = ScheduleTable(open_store(tempfile.mkdtemp()))
    created = DUE - timedelta(minutes=30)
    job = ("pairs", ("--help",))
    table.add(Entry("tiny", 1, "0 * * * *", "UTC", *job, created, address, working_dir=ROOT))
    jobs = RayJobs(None)
    (first,), _ = tick(table, jobs, DUE)
    again, _ = tick(table, jobs, DUE)
    # As if the scheduler had died before it wrote the result down.
    (result,) = Path(table.store.path("slots", "tiny")).glob("*.result.json")
    result.unlink()
    (recovered,), _ = tick(table, jobs, DUE + timedelta(minutes=2))
    status = _finished(address, first.submission_id)
    client = JobSubmissionClient(address)
    return {
        "first": first.outcome,
        "again": len(again),
        "recovered": recovered.outcome,
        "recovered_detail": recovered.detail,
        "status": status,
        "jobs": [job.submission_id for job in client.list_jobs()].count(first.submission_id),
        "help_in_log": "usage: dmd pairs" in client.get_job_logs(first.submission_id),
    }


def _finished(address: str, submission_id: str) -> str | None:
    deadline = time.monotonic() + 180
    while (status := job_status(address, submission_id)) in ACTIVE:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return status


if __name__ == "__main__":
    main()
