"""The embedded Ray: it takes no token of another one and leaves none behind."""

import os
from types import SimpleNamespace

import pytest

from cluster import local


@pytest.fixture
def ray(monkeypatch):
    """Ray as far as it is used here; `seen`: the token that was there when it was started."""
    seen: list[str | None] = []
    forgotten: list[bool] = []

    def init(**options: object) -> SimpleNamespace:
        seen.append(os.environ.get("RAY_AUTH_TOKEN"))
        return SimpleNamespace(address_info={"session_dir": "/tmp/session"})

    fake = SimpleNamespace(
        is_initialized=lambda: False, init=init, shutdown=lambda: seen.append("down"), seen=seen
    )
    loader = SimpleNamespace(reset_cache=lambda: forgotten.append(True))
    monkeypatch.setattr(local, "ray", fake)
    monkeypatch.setattr(
        local, "AuthenticationTokenLoader", SimpleNamespace(instance=lambda: loader)
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    fake.forgotten = forgotten
    return fake


@pytest.mark.parametrize("before", ["another cluster's", None])
def test_an_embedded_ray_has_a_token_of_its_own(ray, monkeypatch, before):
    """Before the file that RAY_AUTH_TOKEN_PATH names: that may be gone with its cluster."""
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    if before is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", before)
    for _ in range(2):
        with local.ray_cluster(address=None, num_cpus=1, object_store_bytes=1) as logs:
            assert logs == "/tmp/session/logs" and ray.forgotten
        assert os.environ.get("RAY_AUTH_TOKEN") == before
    first, _, second, _ = ray.seen
    assert first != second and len(bytes.fromhex(first)) == 32


def test_a_cluster_that_is_joined_is_asked_with_the_environments(ray, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "its own")
    with local.ray_cluster(address="head:6379", num_cpus=1, object_store_bytes=1):
        pass
    assert ray.seen == ["its own", "down"] and not ray.forgotten
