"""The pair factory as a process of its own, to be killed, and what is on disk after that."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from tests.chaos.whole import sealed_manifests

PATIENCE_S = 300
_TAG = "DMD_TEST_PROCESS"  # inherited by everything that a driver starts
_PENDING = ".pending.parquet"


@dataclass
class Driver:
    """`dmd <verb> --config tiny --set …` on a small Ray of its own; `root`: its data set.

    `log` collects the output of every start. All that was started ends with the `with` block.
    `module`: what stands in for `jobs.<verb>`.
    """

    settings: dict[str, object]
    root: Path
    log: Path
    verb: str = "pairs"
    module: str = ""
    process: subprocess.Popen | None = None
    _tag: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self) -> None:
        chosen = {"pairs.root": self.root, "ray.num_cpus": 4, "ray.object_store_mb": 128}
        module = self.module or f"jobs.{self.verb}"
        command = [sys.executable, "-m", module, "--config", "tiny", "--json"]
        for key, value in (chosen | self.settings).items():
            command += ["--set", f"{key}={value}"]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command,
                cwd=Path(__file__).parents[2],
                env=os.environ | {_TAG: self._tag},
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """True: reached; False: the driver ended well before. Its failure is an error."""
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            code = self.process.poll()
            if code is not None:
                assert code == 0, self.log.read_text()[-3000:]
                return False
            assert time.monotonic() < deadline, f"not reached: {self.log.read_text()[-3000:]}"
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        """SIGKILL for the driver alone; its Ray notices, and its last worker is awaited."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self.process = None
        _, alive = psutil.wait_procs(self.descendants(), timeout=60)
        for process in alive:
            process.kill()
        alive = [process for process in alive if not _is_agent(process)]
        assert not alive, f"outlived their driver by a minute: {alive}"

    def descendants(self) -> list[psutil.Process]:
        """All living processes that a start of this driver started."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_TAG) == self._tag:
                    found.append(process)
            except psutil.Error:  # of another user, or gone
                continue
        return found

    def signal_all(self, number: int) -> None:
        """To the driver and to all that it started; first the driver, which watches the others."""
        assert self.process is not None
        others = [p for p in self.descendants() if p.pid != self.process.pid]
        for process in (psutil.Process(self.process.pid), *others):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """(exit code, what it printed on stdout)."""
        assert self.process is not None
        out, _ = self.process.communicate(timeout=2 * PATIENCE_S)
        code, self.process = self.process.returncode, None
        return code, out

    def finish(self) -> dict:
        """Run to the end; the summary that it prints."""
        self.start()
        code, out = self.wait()
        assert code == 0, self.log.read_text()[-3000:]
        return json.loads(out)

    # ------------------------------------------------------------ what is on disk

    def committed_rows(self) -> int:
        """Rows that the ledgers say are written."""
        entries = self.root.glob("generations/*/ledger/*.parquet")
        names = [entry for entry in entries if not entry.name.endswith(_PENDING)]
        return sum(pq.read_metadata(name).num_rows for name in names)

    def beat_phase(self) -> str:
        """What the newest holder of the lease said that it was doing; "": nothing yet."""
        leases = sorted(self.root.glob("leases/*.json"))
        with contextlib.suppress(IndexError, ValueError, OSError):
            return str(json.loads(leases[-1].with_suffix(".beat").read_text())["phase"])
        return ""

    def versions(self) -> int:
        """Sealed ones: each take-over of the lease leaves a void number as well."""
        return len(sealed_manifests(self.root))

    def half_written(self) -> int:
        """Blocks whose writing has begun and was not finished."""
        return len(list(self.root.glob(f"generations/*/ledger/*{_PENDING}")))


def _is_agent(process: psutil.Process) -> bool:
    """Ray's own agents write no pairs, and under load they are slow to notice."""
    with contextlib.suppress(psutil.Error):
        return process.name().startswith(("ray::Dashboard", "ray::RuntimeEnv"))
    return True  # gone
