import pytest
import torch

from litgpt.hardware import (
    device_peak_flops,
    get_default_supported_precision,
    parse_devices,
    peak_flops,
    peak_memory_gb,
)


@pytest.mark.parametrize("given, expected", [(1, 1), ("3", 3), ("auto", 4), (-1, 4), ("-1", 4)])
def test_devices_are_counted(monkeypatch, given, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert parse_devices(given) == expected


def test_auto_is_one_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert parse_devices("auto") == 1


@pytest.mark.parametrize("bad", [0, -2, "two", "1.5", ""])
def test_other_device_counts_are_refused(bad):
    with pytest.raises(ValueError, match="--devices"):
        parse_devices(bad)


@pytest.mark.parametrize(
    "has_cuda, has_bf16, training, expected",
    [
        (False, False, True, "bf16-mixed"),
        (False, False, False, "bf16-true"),
        (True, True, True, "bf16-mixed"),
        (True, False, True, "16-mixed"),
        (True, False, False, "16-true"),
    ],
)
def test_default_precision_is_bf16_where_there_is_one(monkeypatch, has_cuda, has_bf16, training, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert get_default_supported_precision(training) == expected


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
    ],
)
def test_peak_speed_of_known_chips(name, tflops):
    assert peak_flops(name, "bf16-mixed") == tflops * 1e12
    assert peak_flops(name, "32-true") is None


def test_unknown_chips_have_no_peak():
    assert peak_flops("Some GPU", "bf16-true") is None
    assert device_peak_flops(torch.device("cpu"), "bf16-true") is None
    assert peak_memory_gb(torch.device("cpu")) is None


@pytest.mark.gpu
def test_gpu_tells_its_memory():
    torch.zeros(10**6, device="cuda")
    assert peak_memory_gb(torch.device("cuda")) >= 0.004
