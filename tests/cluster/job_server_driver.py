"""Run by test_submit.py: a real Ray with a job server, a schedule, and one tiny job."""

import json
import os
import socket
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import ray
from ray.job_submission import JobSubmissionClient

from cluster.schedule import Entry
from cluster.submit import ACTIVE, job_status
from jobs.schedule_table import ScheduleTable
from jobs.schedule_tick import RayJobs, tick
from pipelines.storage import open_store

ROOT = str(Path(__file__).parent.parent.parent)
DUE = datetime(2026, 3, 1, 1, tzinfo=UTC)


def main() -> None:
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 << 20,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        log_to_driver=False,
    )
    try:
        print(json.dumps(_schedule_once(f"http://{context.dashboard_url}")))
    finally:
        ray.shutdown()


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
        "jobs": sum(1 for job in client.list_jobs() if job.submission_id is not None),
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
