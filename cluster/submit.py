"""Hand a verb to a Ray cluster through its job server; the same submission id twice is one job."""

import logging
import os
import re
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# What never travels with a working directory: outputs, environments, history, foreign weights.
# The teacher that ships with the package is kept. Last, so that nothing brings them back: files in
# which credentials are kept.
EXCLUDES = (
    "runs/",
    ".venv/",
    "venv/",
    ".git/",
    "__pycache__/",
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
)

ACTIVE = ("PENDING", "RUNNING")

_TIMEOUT_S = (10, 300)  # to connect, and between two bytes of a reply
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_ENVIRONMENT = threading.Lock()
# They tell every file that they leave out of a package.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)

_SECRET_WORDS = {"secret", "token", "password", "passwd", "credential", "credentials", "apikey"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("account", "key")}
_SECRET_VALUES = (
    re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    re.compile(r"\b(hf_|ghp_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{16,}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    re.compile(r"://[^/\s@]+@"),
)


class SubmitError(RuntimeError):
    """The job server did not take the job or did not answer. `transient`: try again."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class SecretError(ValueError):
    """Something that looks like a credential, on its way into a place that Ray shows to anyone."""


@dataclass(frozen=True)
class Submitted:
    """`already`: the cluster had a job of this id before; nothing new was started."""

    id: str
    already: bool


def submit_job(
    address: str,
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
    client = _client(address)
    try:
        with _server_errors(address):
            identity = client.submit_job(
                entrypoint=command,
                submission_id=submission_id,
                runtime_env=environment,
                metadata=dict(metadata or {}),
            )
    except SubmitError:
        # Refused because the id is taken, or the reply was lost: then the job is there.
        if _status(client, address, submission_id) is None:
            raise
        return Submitted(submission_id, already=True)
    return Submitted(identity, already=False)


def job_status(address: str, submission_id: str) -> str | None:
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; None: the cluster knows no such job."""
    return _status(_client(address), address, submission_id)


def entrypoint(verb_arguments: Sequence[str]) -> str:
    verb, *arguments = verb_arguments
    return shlex.join(["python", "-m", f"jobs.{verb.replace('-', '_')}", *arguments])


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
    if "://" not in working_dir:
        if not os.path.isdir(working_dir):
            raise SubmitError(f"working directory {working_dir} does not exist", transient=False)
        environment["excludes"] = [*EXCLUDES, *environment.get("excludes", ())]
    return environment


def refuse_secrets(content: Any, place: str = "") -> None:
    """Raise `SecretError` for a key that names a credential or a value that looks like one.

    The job server returns entrypoint, runtime environment and metadata to anyone who asks, and
    Ray logs them. Credentials belong to the cluster: a role, a profile, a mounted secret.
    """
    if isinstance(content, Mapping):
        for key, value in content.items():
            where = f"{place}.{key}" if place else str(key)
            if value not in ("", None) and _names_secret(str(key)):
                raise _secret(where)
            refuse_secrets(value, where)
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            refuse_secrets(value, f"{place}[{index}]")
    elif isinstance(content, str):
        *keys, value = content.split("=")  # also --set=a.b=c
        if content.startswith("--"):
            keys, value = [*keys, content], value or "given next"
        if (value and any(map(_names_secret, keys))) or any(
            pattern.search(content) for pattern in _SECRET_VALUES
        ):
            raise _secret(place)


def _names_secret(key: str) -> bool:
    words = [word for word in re.split(r"[^a-z0-9]+", key.lower()) if word]
    return bool(_SECRET_WORDS & set(words) or _SECRET_PAIRS & set(pairwise(words)))


def _secret(place: str) -> SecretError:
    return SecretError(
        f"{place} looks like a credential. What a job is submitted with can be read by everyone "
        "who reaches the cluster; give the cluster's machines a role, a profile or a mounted "
        "secret instead."
    )


# ------------------------------------------------------------------------ the job server


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client waits for ever for a head node that went away without a word."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            options.setdefault("timeout", _TIMEOUT_S)
            return super()._do_request(method, endpoint, **options)

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _server_errors(address), _address_wins(address):
            return Client(address)
    except SubmitError as error:  # nothing was asked yet: a head node on its way up, a proxy
        raise SubmitError(str(error), transient=True) from error


def _status(client: Any, address: str, submission_id: str) -> str | None:
    try:
        with _server_errors(address):
            return str(client.get_job_status(submission_id).value)
    except SubmitError as error:
        if _http_code(error) == 404:
            return None
        raise


@contextmanager
def _address_wins(address: str) -> Iterator[None]:
    """Ray prefers its environment variables to the address that it is called with."""
    with _ENVIRONMENT:
        before = os.environ.get(_ADDRESS_VARIABLE)
        os.environ[_ADDRESS_VARIABLE] = address
        try:
            yield
        finally:
            if before is None:
                del os.environ[_ADDRESS_VARIABLE]
            else:
                os.environ[_ADDRESS_VARIABLE] = before


@contextmanager
def _server_errors(address: str) -> Iterator[None]:
    """Ray's client raises plain errors; sort them into refused and worth another try."""
    from ray.exceptions import AuthenticationError
    from requests.exceptions import RequestException

    try:
        yield
    except AuthenticationError as error:
        message = (
            f"the job server at {address} wants another token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's (`ray get-auth-token` there)"
        )
        raise SubmitError(message, transient=True) from error
    except (RequestException, ConnectionError) as error:
        message = f"the job server at {address} does not answer: {_one_line(error)}"
        raise SubmitError(message, transient=True) from error
    except (RuntimeError, ValueError) as error:
        code = _http_code(error)
        message = f"the job server at {address} refused: {_one_line(error)}"
        again = code is not None and (code >= 500 or code == 429)
        raise SubmitError(message, transient=again) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _http_code(error: BaseException) -> int | None:
    found = re.search(r"status code (\d{3})", str(error))
    return int(found.group(1)) if found else None
