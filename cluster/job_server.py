"""Ray's job server: what it is asked for, and how its answers and refusals are read."""

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.secrets import without_user_info

ACTIVE = ("PENDING", "RUNNING")

_SEND_TIMEOUT_S = (10, 300)  # to connect, and between two bytes of a reply
_ASK_TIMEOUT_S = (10, 30)
_ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_ENVIRONMENT = threading.Lock()
# They tell every file that they leave out of a package.
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)


class SubmitError(RuntimeError):
    """The job server did not take the job or did not answer. `transient`: try again."""

    def __init__(self, message: str, *, transient: bool) -> None:
        super().__init__(message)
        self.transient = transient


class TokenError(SubmitError):
    """The job server wants another token: until somebody mends that, every try ends like this."""

    def __init__(self, message: str) -> None:
        super().__init__(message, transient=False)


@dataclass(frozen=True)
class ClusterJob:
    """A job as its cluster knows it. Times in seconds since 1970; `package`: its working directory;
    `exit_code`: the driver's, once it has ended by itself."""

    id: str
    status: str
    entrypoint: str
    started_s: float | None = None
    ended_s: float | None = None
    exit_code: int | None = None
    error_type: str | None = None
    message: str = ""
    package: str | None = None
    metadata: Mapping[str, str] | None = None

    @property
    def active(self) -> bool:
        return self.status in ACTIVE


class JobServer:
    """The job server at `address`. Every method raises `SubmitError`; a job that the cluster does
    not know is None. `token`: the secret that each request carries, "" for none; None: what Ray
    itself finds in the environment."""

    def __init__(self, address: str, token: str | None = None) -> None:
        self.address = address
        self.shown = without_user_info(address)
        self._client = _client(address, token)

    @property
    def ray_version(self) -> str | None:
        """The cluster's."""
        return self._client._server_ray_version  # asked for when the client was made

    def submit(self, **options: Any) -> str:
        with _server_errors(self.address):
            return self._client.submit_job(**options)

    def job(self, submission_id: str) -> ClusterJob | None:
        try:
            with _server_errors(self.address):
                return _job(self._client.get_job_info(submission_id))
        except SubmitError as error:
            if _http_code(error) != 404:
                raise
            if "does not exist" in str(error):
                return None
            raise SubmitError(str(error), transient=True) from error  # a proxy without its server

    def jobs(self) -> list[ClusterJob]:
        """Submitted jobs, the newest first."""
        with _server_errors(self.address):
            details = self._client.list_jobs()
        known = [_job(each) for each in details if each.submission_id]
        return sorted(known, key=lambda job: job.started_s or 0.0, reverse=True)

    def logs(self, submission_id: str) -> str:
        with _server_errors(self.address):
            return self._client.get_job_logs(submission_id)

    def stop(self, submission_id: str) -> bool:
        """Ask a job to end; False: it had ended before."""
        with _server_errors(self.address):
            return self._client.stop_job(submission_id)


def _job(details: Any) -> ClusterJob:
    return ClusterJob(
        id=details.submission_id,
        status=str(details.status.value),
        entrypoint=details.entrypoint,
        started_s=_seconds(details.start_time),
        ended_s=_seconds(details.end_time),
        exit_code=details.driver_exit_code,
        error_type=details.error_type,
        message=details.message or "",
        package=(details.runtime_env or {}).get("working_dir"),
        metadata=details.metadata or {},
    )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def quiet_packaging() -> None:
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _client(address: str, token: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """Ray's client waits for ever for a head node that went away without a word."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            options.setdefault("timeout", _ASK_TIMEOUT_S if method == "GET" else _SEND_TIMEOUT_S)
            return super()._do_request(method, endpoint, **options)

    quiet_packaging()
    try:
        with _server_errors(address), _address_wins(address):
            return Client(address, headers=_headers(token))
    except TokenError:
        raise
    except SubmitError as error:  # nothing was asked yet: a head node on its way up, a proxy
        raise SubmitError(str(error), transient=True) from error


def _headers(token: str | None) -> dict[str, str] | None:
    """Given by hand, the token needs no variable: Ray reads its mode when it is imported, and what
    is set afterwards changes nothing. A header, even an empty one, keeps Ray from looking."""
    if token is None:
        return None
    return {"Authorization": f"Bearer {token}" if token else ""}


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
    from ray.exceptions import AuthenticationError, RayError
    from requests.exceptions import RequestException

    server = f"the job server at {without_user_info(address)}"
    try:
        yield
    except AuthenticationError as error:
        message = (
            f"{server} wants another token; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's (`ray get-auth-token` there)"
        )
        raise TokenError(message) from error
    except (RequestException, ConnectionError, RayError) as error:
        message = f"{server} does not answer: {_one_line(error)}"
        raise SubmitError(message, transient=True) from error
    except (RuntimeError, ValueError) as error:
        code = _http_code(error)
        message = f"{server} refused: {_one_line(error)}"
        again = code is not None and (code >= 500 or code == 429)
        raise SubmitError(message, transient=again) from error


def _one_line(error: BaseException) -> str:
    return without_user_info(" ".join(str(error).split()))[:500]


def _http_code(error: BaseException) -> int | None:
    found = re.search(r"status code (\d{3})", str(error))
    return int(found.group(1)) if found else None
