"""An embedded Ray for a laptop, or the cluster that the job already runs on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def ray_cluster(*, address: str | None, num_cpus: int, object_store_bytes: int) -> Iterator[dict]:
    """Connect to `address`; else to the cluster of this Ray job; else start an embedded Ray.

    Yields {"address", "logs"}. An embedded Ray never joins another Ray of the machine and ends
    with the block; worker output goes to its log folder, not to the terminal.
    """
    inside_job = "RAY_ADDRESS" in os.environ
    options: dict = {"log_to_driver": False, "configure_logging": False}
    if address is None and not inside_job:
        options |= {
            "address": "local",
            "num_cpus": num_cpus,
            "object_store_memory": object_store_bytes,
            "include_dashboard": False,
        }
    elif address is not None:
        options["address"] = address
    context = ray.init(**options)
    info = context.address_info
    try:
        yield {"address": info.get("address"), "logs": os.path.join(info["session_dir"], "logs")}
    finally:
        ray.shutdown()
