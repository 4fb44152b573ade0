"""A worker that is to compute on a GPU says so when it cannot, and is not slow in silence."""

import pytest
import torch

from jobs.errors import Exit
from jobs.worker_failures import worker_failure
from pipelines import device
from pipelines.device import DeviceError, device_named, worker_device


@pytest.fixture
def with_driver(monkeypatch, tmp_path):
    """A machine with a GPU's driver, where torch finds no GPU."""
    node = tmp_path / "nvidiactl"
    node.touch()
    monkeypatch.setattr(device, "_DRIVER_NODES", (str(tmp_path / "none"), str(node)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_share_of_gpus_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [worker_device(gpus) for gpus in (0, 0.5, 1)] == ["cpu", "cuda", "cuda"]


def test_where_no_machine_has_a_gpu_shares_of_them_are_played(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_DRIVER_NODES", ("/nowhere/nvidiactl",))
    assert worker_device(1) == "cpu"


def test_a_gpu_that_torch_cannot_use_is_not_replaced_by_the_cpu(with_driver):
    assert worker_device(0) == "cpu"
    with pytest.raises(DeviceError, match=r"has a GPU \(.*nvidiactl\) that torch .* cannot use"):
        worker_device(0.5)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("No CUDA GPUs are available"),
        torch.AcceleratorError("CUDA error: device not ready"),
    ],
)
def test_a_device_that_fails_at_the_start_names_its_node_and_may_be_tried_again(error, monkeypatch):
    monkeypatch.setattr(device.socket, "gethostname", lambda: "node-7")
    with pytest.raises(
        DeviceError, match="the GPU of node-7 fails before any work is done"
    ) as found:
        with device_named():
            raise error
    message, code = worker_failure(found.value)
    assert code is Exit.TRANSIENT and str(error) in message


def test_other_errors_at_the_start_stay_what_they_are():
    with pytest.raises(RuntimeError, match=r"^size mismatch$"), device_named():
        raise RuntimeError("size mismatch")
