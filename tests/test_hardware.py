from __future__ import annotations

import pytest
import torch

from muse.config import HardwareConfig
from muse.errors import ConfigError
from muse.hardware import autocast_dtype, describe, synchronize, use_hardware


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_cuda(monkeypatch) -> list[float]:
    """A CUDA device of 80 GB that is never touched; receives the fractions that are asked for."""
    fractions: list[float] = []
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = type("Properties", (), {"total_memory": 80 * 10**9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction)
    )
    yield fractions
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_a_gpu_the_cpu_is_used(no_cuda, device):
    assert use_hardware(HardwareConfig(device=device)) == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused(no_cuda):
    with pytest.raises(ConfigError, match=r"hardware\.device=cuda .*hardware=cpu"):
        use_hardware(HardwareConfig(device="cuda"))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_is_used_where_there_is_one(fake_cuda, device):
    assert use_hardware(HardwareConfig(device=device)) == torch.device("cuda", 0)
    assert fake_cuda == []


def test_the_cpu_can_be_asked_for_beside_a_gpu(fake_cuda):
    assert use_hardware(HardwareConfig(device="cpu", memory_gb=8.0)) == torch.device("cpu")
    assert fake_cuda == []


@pytest.mark.parametrize(("memory", "fraction"), [(8.0, 0.1), (80.0, 1.0), (160.0, 1.0)])
def test_the_memory_cap_is_in_gb(fake_cuda, memory, fraction):
    use_hardware(HardwareConfig(device="cuda", memory_gb=memory))
    assert fake_cuda == [pytest.approx(fraction)]


def test_threads_are_set_and_told(no_cuda):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            device = use_hardware(HardwareConfig(threads=threads))
            assert torch.get_num_threads() == threads
            assert describe(device) == f"CPU, {threads} threads"
        use_hardware(HardwareConfig(threads=None))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    synchronize(device)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", None), ("bf16", None), ("bf16-mixed", torch.bfloat16), ("fp16-mixed", torch.float16)],
)
def test_only_mixed_precision_uses_autocast(precision, dtype):
    assert autocast_dtype(precision) is dtype


@pytest.mark.gpu
def test_the_cap_refuses_more():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = use_hardware(HardwareConfig(device="cuda", memory_gb=1.0))
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(1_100_000_000, dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert describe(device) == torch.cuda.get_device_name(0)
