"""Which process is it, and does it still live? Told apart from later ones of the same number."""

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """This process, as another one may look for it with `is_gone`."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, **_machine(), "started": _started(pid)}


def _machine() -> dict[str, str]:
    """What tells this machine (and, in containers, this set of process numbers) from others."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not namespace.exists():
        return {}
    return {"boot": boot.read_text().strip(), "namespace": os.readlink(namespace)}


def _started(pid: int) -> str | None:
    """When the process started, in ticks since boot; "": there is no such process, or it ended;
    None: this user may not know (`hidepid`)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if _exists(pid) else ""
    except PermissionError:
        return None
    return "" if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    """Without a look into /proc, where psutil's `pid_exists` looks in the end."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def is_gone(process: dict[str, Any]) -> bool:
    """Is it known that this process lives no more? Only its own machine can tell."""
    here = _machine()
    if not here or any(process.get(key) != value for key, value in here.items()):
        return False
    then, now = process.get("started"), _started(int(process["pid"]))
    return None not in (then, now) and now != then
