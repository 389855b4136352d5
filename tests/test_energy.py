"""The GPU's energy counter, with a stand-in for NVML: no GPU is needed."""

import sys
from types import SimpleNamespace

import pytest
import torch

from harness.train.energy import Energy

GPU = torch.device("cuda", 0)


class Counter:
    """Of one GPU, in millijoules; each reading finds 250 mJ more."""

    def __init__(self, uuid):
        self.uuid, self.millijoules = uuid, 10**9

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid != f"GPU-{self.uuid}":
            raise RuntimeError("NVML: Not Found")
        return self

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        assert handle is self
        self.millijoules += 250
        return self.millijoules


@pytest.fixture
def gpu(monkeypatch):
    counter = Counter("the-one")
    monkeypatch.setitem(sys.modules, "pynvml", counter)
    properties = SimpleNamespace(uuid="the-one")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda value, dtype, device: tensor(value, dtype=dtype))
    return counter


def test_what_is_used_while_measuring_is_added_up(gpu):
    energy = Energy(GPU, shared=False)
    with energy.measuring():
        pass
    gpu.millijoules += 5000  # testing, checkpoints: not measured
    with energy.measuring():
        gpu.millijoules += 1000
    assert energy.take() == pytest.approx(1.5)
    assert energy.take() == 0


def test_a_counter_that_fails_under_way_is_no_reason_to_stop(gpu, monkeypatch):
    energy = Energy(GPU, shared=False)

    def gone(handle):
        raise RuntimeError("NVML: Driver/library version mismatch")

    with energy.measuring():
        monkeypatch.setattr(gpu, "nvmlDeviceGetTotalEnergyConsumption", gone)
    assert energy.take() is None


def test_nothing_is_said_where_nothing_is_known(gpu, monkeypatch):
    for energy in (Energy(GPU, shared=True), Energy(torch.device("cpu"), shared=False)):
        with energy.measuring():
            pass
        assert energy.take() is None
    gpu.uuid = "another"  # as for a slice of a GPU
    assert Energy(GPU, shared=False).take() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert Energy(GPU, shared=False).take() is None
