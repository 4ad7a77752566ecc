"""Rates leave pauses out, and wall time counts every start of a run."""

from __future__ import annotations

import pytest
import torch

import fvlm.train.clock
from fvlm.train.clock import Clock


class Time:
    """Stands in for the module `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time(monkeypatch):
    stand_in = Time()
    monkeypatch.setattr(fvlm.train.clock, "time", stand_in)
    return stand_in


def test_rates_are_per_second_of_training_since_the_last_record(time):
    clock = Clock(before=0.0, device=torch.device("cpu"), num_devices=1)
    for _ in range(2):
        clock.count(samples=10, tokens=1000, flops=1e9)
    time.sleep(0.1)
    with clock.paused():
        time.sleep(0.3)
    rates = clock.rates()
    assert rates["throughput_samples_sec"] == pytest.approx(20 / 0.1)
    assert rates["tokens_sec"] == pytest.approx(100 * rates["throughput_samples_sec"])
    assert rates["tflops"] == pytest.approx(1e-4 * rates["throughput_samples_sec"])
    assert rates["step_sec"] == pytest.approx(0.05)
    assert rates["mfu"] is rates["gpu_mem_allocated_gb"] is None
    time.sleep(1)
    assert clock.rates()["throughput_samples_sec"] == 0


def test_wall_time_continues_from_earlier_starts(time):
    clock = Clock(before=100.0, device=torch.device("cpu"), num_devices=1)
    time.sleep(0.05)
    assert clock.wall_seconds() == pytest.approx(100.05)


def test_mfu_is_necessary_work_over_what_all_devices_could_do(monkeypatch, time):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**31)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**32)
    clock = Clock(before=0.0, device=torch.device("cuda"), num_devices=4)
    clock.count(samples=1, tokens=1, flops=4 * 989e12 * 0.05)
    time.sleep(0.1)
    rates = clock.rates()
    assert rates["mfu"] == pytest.approx(0.5)
    assert (rates["gpu_mem_allocated_gb"], rates["gpu_mem_reserved_gb"]) == (2, 4)
