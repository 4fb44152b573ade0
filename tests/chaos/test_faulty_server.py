"""`dmd pairs` on Ray, on an S3 server behind a proxy that loses replies, refuses and resets."""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
import torch

from jobs.cli import main
from jobs.errors import Exit
from pipelines.batches import PairReader
from pipelines.manifest import latest_manifest, log_numbers
from pipelines.storage import Store, open_store
from tests.fault_proxy import Fault, FaultProxy, Request
from tests.s3_servers import new_bucket

PROMPTS, BLOCK = 12, 4
# Latents are computed in batches that may be put together differently, in float16.
TOLERANCE = 2e-3
SAMPLED = 5
FAULTS = (Fault.SLOW_DOWN, Fault.LOST_REQUEST, Fault.LOST_REPLY, Fault.TORN_UPLOAD)


@dataclass
class Run:
    """`dmd pairs` in this process, on the Ray of the test session."""

    proxy: FaultProxy
    teacher: str
    folder: Path
    options: object

    def __call__(self, root: Store) -> int:
        settings = {
            "run.dir": self.folder / "run", "teacher.path": self.teacher,
            "pairs.prompts": self.folder / "prompts.txt", "pairs.rows_per_block": BLOCK,
            "pairs.batch_size": BLOCK, "pairs.steps": 2, "pairs.root": root.url,
            "storage.endpoint_url": self.proxy.url,
        }  # fmt: skip
        arguments = ["pairs", "--config", "tiny", "--json"]
        for key, value in settings.items():
            arguments += ["--set", f"{key}={value}"]
        return main(arguments)


@pytest.fixture
def proxy(seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed) as found:
        yield found


@pytest.fixture
def run(ray_cluster, proxy, tiny_teacher_dir, tmp_path, seaweed_options) -> Run:
    prompts = [f"prompt {index}" for index in range(PROMPTS)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    return Run(proxy, tiny_teacher_dir, tmp_path, seaweed_options)


def pairs_of(root: Store):
    """id → (noise, latents) of the newest version, every file of which is read and checked."""
    manifest = latest_manifest(root)
    assert manifest is not None and manifest.rows == PROMPTS
    found = PairReader(root, manifest, seed=0, verify=True).rows(np.arange(manifest.rows))
    assert len(set(found.pair_ids)) == PROMPTS
    for path in root.fs.find(root.path("generations")):
        assert ".pending" not in path
        if path.endswith(".parquet"):
            pq.read_metadata(io.BytesIO(root.fs.cat_file(path)))
    pairs = zip(found.noise, found.latents, strict=True)
    return dict(zip(found.pair_ids, pairs, strict=True))


def assert_same_pairs(found, expected) -> None:
    assert found.keys() == expected.keys()
    for pair_id, (noise, latents) in found.items():
        assert torch.equal(noise, expected[pair_id][0])
        torch.testing.assert_close(
            latents.float(), expected[pair_id][1].float(), atol=TOLERANCE, rtol=0
        )


def conditional(request: Request) -> bool:
    return request.method == "PUT" and "if-none-match" in request.headers


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_commit_whose_reply_is_lost_is_known_to_have_succeeded(run, proxy, seaweed_options):
    """Each conditional PUT of `dmd pairs` in turn: the probes, the lease, the version."""
    expected, at = None, 0
    while True:
        root = new_bucket(seaweed_options, f"lost-{at}")
        proxy.clear()
        proxy.inject(Fault.LOST_REPLY, where=conditional, at=at)
        assert run(root) == 0
        found = pairs_of(root)
        assert log_numbers(root) == [1], "one version, and no number given up"
        if not proxy.hits:
            break
        (hit,) = proxy.hits
        print(f"lost the reply to conditional PUT {at}: {hit.path}")
        expected = expected or found
        assert_same_pairs(found, expected)
        at += 1
    assert at >= 4, f"only {at} conditional PUTs"


@pytest.fixture
def one_try(monkeypatch):
    """The driver's client gives up at the first failure; the workers' clients go on as ever."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


def made(run, root: Store, seaweed_options):
    """The pairs after the same command again, on a store that answers; whatever it left."""
    assert run(root) == Exit.OK
    return pairs_of(open_store(root.url, seaweed_options))


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_requests_that_fail_during_generation_change_no_pair(
    run, proxy, seaweed_options, one_try, capfd
):
    """One fault each: the driver ends with it, a worker tries again."""
    seed = random.SystemRandom().randrange(1 << 30)
    plain = new_bucket(seaweed_options, "plain")
    proxy.clear()
    assert run(plain) == Exit.OK
    count, codes = len(proxy.log), []
    first = next(i for i, seen in enumerate(proxy.log) if "/ledger/&" in seen.path)  # the driver's
    expected = pairs_of(plain)
    # How often the driver looks at its lease, and with it the number of requests, varies a little.
    for at in sorted({first, *random.Random(seed).sample(range(count * 9 // 10), SAMPLED)}):
        fault = Fault.SLOW_DOWN if at == first else FAULTS[at % len(FAULTS)]
        root = new_bucket(seaweed_options, f"fault-{at}")
        proxy.clear()
        proxy.inject(fault, at=at)
        codes.append(run(root))
        (hit,) = proxy.hits
        proxy.clear()
        said = capfd.readouterr().err.splitlines()[-1:]
        with capfd.disabled():
            print(f"seed {seed}, {fault.name} at {at} of {count}, {hit}: {codes[-1]!r} {said}")
        if codes[-1] != Exit.OK:
            assert said[0].startswith("error: ")
        assert_same_pairs(made(run, root, seaweed_options), expected)
        assert codes[-1] in (Exit.OK, Exit.TRANSIENT)
    assert Exit.TRANSIENT in codes


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_store_that_stays_away_from_a_worker_is_told_and_tried_again(
    run, proxy, seaweed_options, capfd
):
    """Workers read the finished files, to seal them: none of their tries is answered."""

    def reads_pairs(request: Request) -> bool:
        return "/data/" in request.path and request.path.endswith(".parquet")

    root = new_bucket(seaweed_options, "away")
    proxy.inject(Fault.SLOW_DOWN, method="GET", where=reads_pairs, times=1000)
    assert run(root) == Exit.TRANSIENT
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: a worker's store did not answer: ") and len(proxy.hits) > 1
    assert log_numbers(open_store(root.url, seaweed_options)) == []
    proxy.clear()
    made(run, root, seaweed_options)
