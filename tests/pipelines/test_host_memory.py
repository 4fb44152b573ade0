"""What a training on GPUs needs of the machines' own memory."""

from typing import Any

import pytest
import torch

from pipelines.host_memory import HostMemory, converted_bytes, host_memory
from pipelines.network_sizes import NetworkSizes
from pipelines.train_config import TrainSection
from pipelines.weights import Weights

SIZES = NetworkSizes(denoiser=1000, others=500, adapters=10, block=100, head=50, matrices=800)


def section(**parallel: Any) -> TrainSection:
    return TrainSection(num_workers=2, mixed_precision="bf16", parallel=parallel)


@pytest.mark.parametrize(
    ("parallel", "copies"),
    [
        ({}, 0),  # loaded onto the GPU, and copied there
        ({"teacher": "sharded"}, 2),  # on the host, with student and fake score
        ({"generator": "fsdp"}, 1),  # the fake score
        ({"generator": "fsdp", "fake": "fsdp"}, 0),  # built as shards
    ],
)
@pytest.mark.parametrize("mapped", [True, False])
def test_a_worker_starts_with_what_is_copied_on_the_host(parallel, copies, mapped):
    """Files in half precision are converted there, too; float32 files are but mapped."""
    found = host_memory(SIZES, section(**parallel), mapped=mapped)
    assert found.start == 4 * 1000 * (copies + (not mapped))


@pytest.mark.parametrize(
    ("stored", "compute", "expected"),
    [
        (torch.float32, torch.bfloat16, 2 * 600),  # the matrices
        (torch.float32, torch.float32, 0),  # the file's own pages
        (torch.bfloat16, torch.bfloat16, 4 * 64),  # tables and biases, to float32
        (torch.float16, torch.bfloat16, 2 * 600 + 4 * 64),
        (torch.float16, torch.float32, 4 * 664),
    ],
)
def test_a_text_encoder_takes_what_is_not_used_in_the_dtype_of_its_files(stored, compute, expected):
    shapes = {"a.weight": (20, 30), "a.bias": (4,), "shared.weight": (6, 10)}
    assert converted_bytes(Weights("text_encoder_2", shapes), stored, compute) == expected


def test_parts_are_loaded_one_after_another_beside_a_network_that_stays():
    """In the same files, the network's alone; larger text encoders, theirs; sharded, both."""
    assert host_memory(SIZES, section(), mapped=False, converted=3000).start == 4000
    assert host_memory(SIZES, section(), mapped=False, converted=9000).start == 9000
    shards = section(generator="fsdp", fake="fsdp")
    assert host_memory(SIZES, shards, mapped=False, converted=9000).start == 13_000


def test_an_offloaded_teacher_stays_there_in_the_dtype_that_it_is_used_in():
    offloaded, sharded = (
        host_memory(SIZES, section(teacher=placement), mapped=True)
        for placement in ("offload", "sharded")
    )
    assert offloaded.offloaded == 2 * 800 + 4 * 200
    assert sharded.offloaded == 0


def test_the_copy_that_is_saved_has_weights_and_moments_of_all_that_is_trained():
    assert host_memory(SIZES, section(), mapped=True).saved == 12 * (1000 + 1000 + 50)


def test_starting_and_training_do_not_meet():
    assert HostMemory(start=5, offloaded=3, saved=8).largest(workers=2) == 11
    assert HostMemory(start=5, offloaded=3, saved=8).largest(workers=3) == 15
