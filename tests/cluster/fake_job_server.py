"""Ray's job API as far as it is used here, in this process, with faults on demand."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cluster.nodes import NodeRecord, Place, Size
from cluster.processes import Birth
from cluster.record import ClusterRecord, default_folder, write_record


class JobServer(ThreadingHTTPServer):
    """`jobs`: what was submitted; `states` and `logs`: what is answered about it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.jobs: dict[str, dict] = {}
        self.states: dict[str, dict] = {}
        self.logs: dict[str, str] = {}
        self.packages: dict[str, int] = {}
        self.stopping: dict[str, int] = {}
        self.asked: list[str] = []
        self.given: list[str | None] = []  # Authorization of each request
        self.token: str | None = None  # what every request must carry
        # Faults.
        self.refuse_with: int | None = None
        self.drop_reply = False  # the job is taken, the answer is lost
        self.away = 0  # so many requests find nobody
        self.slow_stop = 0  # so many questions later a job that was stopped has ended
        self.broken_logs = 0  # so many requests for a log are answered with a 500
        self.before_submission = lambda server, job: None

    def start(self, identity: str, **details: object) -> None:
        """A job that runs, as if it had been submitted before."""
        command = str(details.pop("entrypoint", "python -m jobs.pairs --config tiny"))
        job = {"submission_id": identity, "entrypoint": command, "metadata": {}, "runtime_env": {}}
        self.jobs[identity] = job | details

    def end(self, identity: str, status: str = "SUCCEEDED", code: int | None = 0, **more) -> None:
        self.states[identity] = {"status": status, "driver_exit_code": code, **more}

    def details(self, identity: str) -> dict:
        job = self.jobs[identity]
        if identity in self.stopping:
            self.stopping[identity] -= 1
            if self.stopping[identity] < 0:
                self.end(identity, "STOPPED", None)
        started = 1_700_000_000_000 + 1000 * list(self.jobs).index(identity)
        found = {"type": "SUBMISSION", "status": "RUNNING", "start_time": started}
        return found | job | self.states.get(identity, {})


class _Handler(BaseHTTPRequestHandler):
    server: JobServer

    def do_GET(self) -> None:
        if self._is_away() or self._is_refused():
            return
        server, parts = self.server, self.path.strip("/").split("/")
        if self.path == "/api/version":
            self._answer(200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})
        elif parts[1] == "packages":
            self._answer(200 if parts[-1] in server.packages else 404, "")
        elif len(parts) == 2:
            self._answer(200, [server.details(identity) for identity in server.jobs])
        elif parts[2] not in server.jobs:
            self._answer(404, "job does not exist")
        elif parts[-1] != "logs":
            self._answer(200, server.details(parts[2]))
        elif server.broken_logs > 0:
            server.broken_logs -= 1
            self._answer(500, "UnicodeDecodeError")
        else:
            self._answer(200, {"logs": server.logs.get(parts[2], "")})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self._is_refused():
            return
        self.server.packages[self.path.rsplit("/", 1)[-1]] = len(content)
        self._answer(200, "")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._is_refused():
            return
        if self.path.endswith("/stop"):
            identity = self.path.split("/")[-2]
            self.server.stopping[identity] = self.server.slow_stop
            self._answer(200, {"stopped": True})
            return
        job = json.loads(body)
        self.server.before_submission(self.server, job)
        if self.server.refuse_with:
            self._answer(self.server.refuse_with, "no")
        elif job["submission_id"] in self.server.jobs:
            self._answer(400, "another id, please")
        else:
            self.server.jobs[job["submission_id"]] = job
            if not self.server.drop_reply:
                self._answer(200, {"job_id": None, "submission_id": job["submission_id"]})

    def _is_away(self) -> bool:
        """The connection is closed without an answer, as by a head node that restarts."""
        self.server.asked.append(self.path)
        if self.server.away > 0:
            self.server.away -= 1
            return True
        return False

    def _is_refused(self) -> bool:
        wanted, given = self.server.token, self.headers.get("Authorization")
        self.server.given.append(given)
        if wanted is None or given == f"Bearer {wanted}":
            return False
        self._answer(403 if given else 401, "Forbidden")
        return True

    def _answer(self, code: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def job_server() -> Iterator[JobServer]:
    server = JobServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def eventually(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def remember(
    server: JobServer, folder: Path, secret: str | None, *, head: Birth | None = None
) -> None:
    """Let `server` be the job server of the local cluster, whose token lies in `folder`. `head`:
    its process; None: one that lives."""
    default_folder().mkdir(parents=True)
    if secret is not None:
        (folder / "token").write_text(secret)
    place = Place("/tmp/nowhere", 1, None if secret is None else str(folder / "token"))
    nodes = (NodeRecord("head", None, head or Birth.of(os.getpid())),)
    size = Size(nodes=1, cpus=1)
    record = ClusterRecord(place, server.address, "127.0.0.1", size, nodes, ready=True)
    write_record(default_folder(), record)
    server.token = secret
