"""Hand a verb to a Ray cluster through its job server; the same submission id twice is one job."""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from cluster.job_server import ACTIVE, ClusterJob, JobServer, SubmitError, TokenError
from cluster.secrets import SecretError, refuse_secrets

__all__ = [
    "ACTIVE",
    "EXCLUDES",
    "ClusterJob",
    "JobServer",
    "SecretError",
    "SubmitError",
    "Submitted",
    "TokenError",
    "entrypoint",
    "job_environment",
    "job_status",
    "refuse_secrets",
    "submit_job",
]

# What never travels with a working directory: outputs, environments, history, caches, foreign
# weights. The teacher that ships with the package is kept. Last, so that nothing brings them back:
# files in which credentials are kept. cluster/runtime_env.yaml says the same to `ray job submit`.
EXCLUDES = (
    "runs/",
    "wandb/",
    ".venv/",
    "venv/",
    "node_modules/",
    ".git/",
    "__pycache__/",
    "*.egg-info/",
    ".*_cache/",
    "*.safetensors",
    "*.ckpt",
    "*.pt",
    "*.pth",
    "*.bin",
    "*.parquet",
    "!jobs/assets/**",
    ".env*",
    ".aws",
    "credentials*",
    "*.pem",
    "*.key",
    "*.env",
    "*.p12",
    "*.pfx",
    ".netrc",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    ".ssh/",
    ".kube/",
    "id_rsa*",
    "id_ed25519*",
)


@dataclass(frozen=True)
class Submitted:
    """`already`: the cluster had a job of this id before; nothing new was started."""

    id: str
    already: bool


def submit_job(
    address: str | JobServer,
    verb_arguments: Sequence[str],
    *,
    submission_id: str,
    working_dir: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Submitted:
    """Start `python -m jobs.<verb> <arguments>` on the cluster, once per `submission_id`.

    `working_dir`: a local folder to send, or a URI that the cluster can read; None: the package is
    installed there. Raises `SubmitError`, and `SecretError` before anything is sent.
    """
    command = entrypoint(verb_arguments)
    environment = job_environment(working_dir, runtime_env)
    refuse_secrets({"arguments": list(verb_arguments), "metadata": metadata or {}})
    server = _server(address)
    try:
        identity = server.submit(
            entrypoint=command,
            submission_id=submission_id,
            runtime_env=environment,
            metadata=dict(metadata or {}),
        )
    except SubmitError:
        # Refused because the id is taken, or the reply was lost: then the job is there.
        if server.job(submission_id) is None:
            raise
        return Submitted(submission_id, already=True)
    return Submitted(identity, already=False)


def job_status(address: str | JobServer, submission_id: str) -> str | None:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; None: the cluster knows no such job."""
    job = _server(address).job(submission_id)
    return None if job is None else job.status


def _server(address: str | JobServer) -> JobServer:
    return JobServer(address) if isinstance(address, str) else address


def entrypoint(verb_arguments: Sequence[str]) -> str:
    verb, *arguments = verb_arguments
    return shlex.join(["python", "-m", f"jobs.{verb.replace('-', '_')}", *arguments])


def is_sent(working_dir: str | None) -> TypeGuard[str]:
    """Is it a folder of this machine, which travels with the job? Else the cluster reads it by its
    URI, or has the package installed (None)."""
    return working_dir is not None and "://" not in working_dir


def job_environment(
    working_dir: str | None, runtime_env: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Ray's runtime environment, with our excludes for a local folder; refuses credentials."""
    environment = dict(runtime_env or {})
    refuse_secrets({"runtime_env": environment})
    if working_dir is None:
        return environment
    refuse_secrets({"working_dir": working_dir})
    environment["working_dir"] = working_dir
    if is_sent(working_dir):
        if not os.path.isdir(working_dir):
            raise SubmitError(f"working directory {working_dir} does not exist", transient=False)
        own = [each for each in environment.get("excludes", ()) if each not in EXCLUDES]
        environment["excludes"] = [*EXCLUDES, *own]
    return environment
