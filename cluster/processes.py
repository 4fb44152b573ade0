"""Processes that were started and are to be ended later: known by pid and birth, never by name."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_PATIENCE_S = 10.0  # a node that is asked to end gets this long before it is killed
_ORPHANED_S = 3.0  # and what it has started this much more
_KILLED_S = 10.0

# Runs a program that the kernel kills with its parent; the request outlives exec (Linux).
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Birth:
    """A process for good: the system gives a pid again, but not with the same start time.

    `created`: seconds since the epoch, which move when the machine's clock is set. `ticks` since
    the start `boot` of the machine do not; "": they are not known, as outside Linux.
    """

    pid: int
    created: float
    ticks: str = ""
    boot: str = ""

    @staticmethod
    def of(pid: int) -> "Birth":
        """Raises `psutil.NoSuchProcess`."""
        return Birth(pid, psutil.Process(pid).create_time(), *_ticks(pid))


def spawn(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: str,
    output: str,
    tied: bool = False,
) -> Birth:
    """Start a program in a session of its own, so that it outlives this one.

    `output`: the file that gets what it says. `tied` (Linux): it is killed with the thread that
    called this instead.
    """
    if tied and sys.platform == "linux":
        command = [sys.executable, "-c", _TIED, str(os.getpid()), *command]
    with open(output, "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
    return Birth.of(process.pid)


def find(birth: Birth) -> psutil.Process | None:
    """The process, if it is alive and still the same."""
    try:
        process = psutil.Process(birth.pid)
        if process.status() == psutil.STATUS_ZOMBIE or not _is_same(process, birth):
            return None
    except psutil.Error:
        return None
    return process


def _is_same(process: psutil.Process, birth: Birth) -> bool:
    if birth.ticks:
        return _ticks(process.pid) == (birth.ticks, birth.boot)
    return process.create_time() == birth.created


def _ticks(pid: int) -> tuple[str, str]:
    """When the process started, in ticks since the machine did, and which start of it that was."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # not Linux, or gone
        return "", ""
    return stat.rsplit(")", 1)[1].split()[19], boot


def family(birth: Birth) -> list[psutil.Process]:
    """The process and all that descend from it; nothing if it is gone."""
    process = find(birth)
    if process is None:
        return []
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def marked(variable: str, value: str) -> list[psutil.Process]:
    """The processes of this user whose environment has `variable` set to `value`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value:
                found.append(process)
        except (psutil.Error, OSError):  # of another user, or gone
            continue
    return found


def end(processes: Sequence[psutil.Process], *, ask: Sequence[psutil.Process] = ()) -> None:
    """Ask `ask` to end, then kill whatever is left of `processes` and of them.

    psutil compares start times before it signals: a pid that was given again is left alone.
    """
    for process in ask:
        try:
            process.terminate()
        except psutil.Error:
            continue
    psutil.wait_procs(ask, timeout=_PATIENCE_S)
    everything = {process.pid: process for process in (*processes, *ask)}.values()
    _, alive = psutil.wait_procs(everything, timeout=_ORPHANED_S if ask else 0)
    for process in alive:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(alive, timeout=_KILLED_S)
