"""An embedded Ray for a laptop, or the cluster that the job already runs on."""

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
from ray._raylet import AuthenticationTokenLoader

_TOKEN = "RAY_AUTH_TOKEN"


def cluster_address(given: str | None) -> str | None:
    """The cluster to connect to: the given one, or that of RAY_ADDRESS, which Ray sets for its
    jobs; None: there is none. A job server's URL in RAY_ADDRESS is for `dmd submit` alone."""
    if given:
        return given
    named = os.environ.get("RAY_ADDRESS") or None
    return None if named is not None and named.startswith(("http://", "https://")) else named


@contextmanager
def ray_cluster(
    *, address: str | None, num_cpus: int, object_store_bytes: int
) -> Iterator[str | None]:
    """Connect to `address`; else to the cluster of this Ray job; else start an embedded Ray.

    Yields the folder of Ray's logs, where worker output goes instead of the terminal; None when a
    Ray that this process had already started is used, which is left running. An embedded Ray never
    joins another Ray of the machine, has a token of its own and ends with the block.
    """
    if ray.is_initialized():
        yield None
        return
    options: dict = {"log_to_driver": False, "configure_logging": False}
    address = cluster_address(address)
    with ExitStack() as stack:
        if address is not None:
            options["address"] = address
        else:
            options |= {
                "address": "local",
                "num_cpus": num_cpus,
                "object_store_memory": object_store_bytes,
                "include_dashboard": False,
            }
            stack.enter_context(_own_token())
        context = ray.init(**options)
        stack.callback(ray.shutdown)
        yield os.path.join(context.address_info["session_dir"], "logs")


@contextmanager
def _own_token() -> Iterator[None]:
    """A fresh secret in the environment, which Ray's processes inherit.

    Without it Ray takes the token that the environment names, which may be another cluster's and
    gone with it, or writes one to ~/.ray/auth_token that every user of the machine can read.
    """
    before = os.environ.get(_TOKEN)
    os.environ[_TOKEN] = secrets.token_hex(32)
    AuthenticationTokenLoader.instance().reset_cache()  # of what this process has used before
    try:
        yield
    finally:
        # The cache stays: Ray ends the process where a thread of it asks for a token in vain.
        if before is None:
            del os.environ[_TOKEN]
        else:
            os.environ[_TOKEN] = before
