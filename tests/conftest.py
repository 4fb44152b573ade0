"""What the whole test session shares: one Ray, one tiny teacher, two S3 servers."""

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.s3_servers import ACCESS_KEY, SECRET_KEY, new_bucket, seaweedfs

# Copies of remote teachers; removed when the session ends.
_CACHE = tempfile.TemporaryDirectory(prefix="dmd-test-cache-")

# Before Ray is imported anywhere: its workers inherit this environment, and with it the
# credentials of the S3 servers below.
_ENVIRONMENT = {
    "HF_HOME": _CACHE.name,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
}


def pytest_configure() -> None:
    os.environ.update(_ENVIRONMENT)


CAPTIONS = ("a red fox", "a blue whale", "woman astronaut", "green apple", "flag of nowhere")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """An embedded Ray of 8 logical CPUs."""
    import ray

    ray.init(
        address="local",  # never another Ray of this machine
        num_cpus=8,
        object_store_memory=256 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_teacher_dir(tmp_path_factory) -> str:
    """A folder with a StableDiffusionPipeline of random weights: 16×16 pixels, 4×4 latents."""
    import torch

    from dmd_core.miniature import MiniatureSize, Vocabulary, build_miniature

    size = MiniatureSize(
        image_size=16,
        vae_channels=(8, 8, 16),
        unet_channels=(16, 32),
        heads=2,
        text_dim=16,
        text_layers=1,
        max_tokens=12,
        vocabulary=300,
        norm_groups=4,
    )
    # Learned from CAPTIONS once and kept: learning breaks ties differently in every process, and
    # with them the teacher of every test session would be another.
    kept = json.loads((Path(__file__).parent / "tiny_vocabulary.json").read_text())
    vocabulary = Vocabulary(kept["tokens"], tuple(map(tuple, kept["merges"])))
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("teacher") / "tiny")
    build_miniature(size, vocabulary).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """A tiny teacher of each family (`tests.dmd_core.family_calls.Families`), made when asked for:
    building and saving them is most of the work of their tests."""
    from tests.dmd_core.family_calls import Families

    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server in memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3_options(s3_endpoint):
    from pipelines.config import StorageSection

    return StorageSection(endpoint_url=s3_endpoint)


@pytest.fixture
def s3_store(s3_options):
    """An empty folder in a bucket of the S3 server in memory."""
    return new_bucket(s3_options, "set")


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory) -> Iterator[str]:
    """The URL of a SeaweedFS: real conditions, multipart uploads and signatures, data on disk."""
    with seaweedfs(tmp_path_factory.mktemp("seaweed")) as url:
        yield url


@pytest.fixture(scope="session")
def seaweed_options(seaweed):
    from pipelines.config import StorageSection

    return StorageSection(endpoint_url=seaweed)


@pytest.fixture
def seaweed_store(seaweed_options):
    """An empty folder in a bucket of SeaweedFS."""
    return new_bucket(seaweed_options, "set")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers as small as those of the tests wait for each other's threads, by seconds where cores
    are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
