"""What the machine has: devices, the precision they support, their peak speed, their memory."""

import re

import torch

PEAK_TFLOPS = {
    r"GB200|B200": 2250,
    r"H100.*(PCIE|PCI-E)": 756,
    r"H100.*NVL": 835,
    r"H100|H200|GH200|H800": 989,
    r"A100|A800": 312,
    r"L40S": 362,
    r"L40\b|RTX 6000 ADA": 181,
    r"L4\b": 121,
    r"A10G\b": 70,
    r"A10\b": 125,
    r"A40\b": 150,
    r"RTX A6000": 155,
    r"RTX 4090": 165,
    r"RTX 3090": 71,
    r"V100": 125,
    r"T4\b": 65,
}
"""Pattern of a device's name -> its published dense bf16 (older chips: fp16) TFLOP/s; the first match counts."""


def parse_devices(devices: str | int) -> int:
    """How many devices a flag asks for: "auto" and -1 take all CUDA devices, or one device where there are none.

    Raises:
        ValueError: Neither "auto" nor a number above 0.
    """
    if devices in (-1, "-1", "auto"):
        return torch.cuda.device_count() or 1
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ValueError(f"--devices is {devices!r}: it must be a number above 0, or auto.")


def calculate_number_of_devices(devices: int | list[int]) -> int:
    """How many devices a number or a list of them means."""
    return len(devices) if isinstance(devices, list) else int(devices)


def get_default_supported_precision(training: bool) -> str:
    """bf16 where the device has it (a CPU does), else 16: "-mixed" for training, "-true" for inference."""
    has_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    return f"{'bf16' if has_bf16 else '16'}-{'mixed' if training else 'true'}"


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a chip in 16-bit precision; None if the chip is not known or `precision` has 32 bits."""
    if "16" not in precision:
        return None
    found = (tflops for pattern, tflops in PEAK_TFLOPS.items() if re.search(pattern, device_name.upper()))
    return next((tflops * 1e12 for tflops in found), None)


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of a device at hand."""
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_memory_gb(device: torch.device) -> float | None:
    """Most memory that tensors took on a CUDA device so far, in units of 10^9 bytes."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
