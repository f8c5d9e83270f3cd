"""A checkpoint folder as a model ready for inference on one device, in plain torch: Fabric's import costs seconds."""

import contextlib
from pathlib import Path

import torch
from torch import nn

from litgpt.checkpoint.loading import load_model_weights
from litgpt.checkpoint.meta import meta_device
from litgpt.config import Config
from litgpt.hardware import calculate_number_of_devices, get_default_supported_precision
from litgpt.quantize import load_quantized, quantize_model
from litgpt.registry import ModelSpec, build_model

_DTYPES = {"32": torch.float32, "64": torch.float64, "bf16": torch.bfloat16, "16": torch.float16}


def default_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_device(accelerator: str, devices: int | list[int] | str) -> torch.device:
    """The one device that `accelerator` (cpu, gpu, cuda, mps, auto) and `devices` (1, a list of one, auto) mean."""
    if accelerator not in ("cpu", "gpu", "cuda", "mps", "auto"):
        raise ValueError(f"accelerator is {accelerator!r}: choose cpu, gpu, cuda, mps or auto")
    found = default_device()
    kind = {"auto": found.type, "gpu": found.type if found.type != "cpu" else "cuda"}.get(accelerator, accelerator)
    has = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if not has:
        raise ValueError(f"accelerator {accelerator!r}: this machine has none; choose cpu or auto")
    n = 1 if devices == "auto" else calculate_number_of_devices(devices)
    if n < 1 or (n > has and kind != "cpu"):
        raise ValueError(f"devices is {devices!r}, but this machine has {has} of kind {kind}")
    if n > 1:
        raise NotImplementedError(f"devices={devices!r}: more than one device is not in this version yet; take 1")
    if isinstance(devices, list) and kind == "cuda":
        return torch.device(kind, devices[0])
    return found if kind == found.type else torch.device(kind)


def parse_precision(precision: str | None) -> tuple[torch.dtype, torch.dtype | None]:
    """Dtype of the weights, and the one to compute in where that differs (autocast).

    Args:
        precision: `32-true`, `bf16-true`, `bf16-mixed` and so on. None: bf16-true, or 16-true on CUDA without bf16.
    """
    precision = get_default_supported_precision(training=False) if precision is None else precision
    bits, _, kind = precision.partition("-")
    if bits not in _DTYPES or kind not in ("true", "mixed") or (kind == "mixed" and "16" not in bits):
        raise ValueError(
            f"precision {precision!r} is not known: choose 32-true, bf16-true, 16-true, bf16-mixed, 16-mixed or 64-true"
        )
    return (torch.float32, _DTYPES[bits]) if kind == "mixed" else (_DTYPES[bits], None)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Compute in `dtype` where that is safe; None changes nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def load_model(
    spec: ModelSpec, config: Config, checkpoint_dir: Path | str, device: torch.device, dtype: torch.dtype,
    quantize: str | None = None
) -> nn.Module:  # fmt: skip
    """The model of a checkpoint in evaluation mode; the weights are read once, straight from the mapped file.

    Args:
        checkpoint_dir: The folder, or the weights file in it.
        dtype: Of all weights that are not quantised, and of the computation.
        quantize: How the blocks are quantised, see `quantize.MODES`; a whole model in `dtype` is then never in memory.
    """
    try:
        with meta_device():
            model = build_model(spec, config)
    except (NotImplementedError, RuntimeError):
        model = build_model(spec, config)  # its constructor reads values of tensors
    if quantize is not None and any(parameter.is_meta for parameter in model.parameters()):
        load_quantized(model, checkpoint_dir, quantize, dtype, device)
    else:
        load_model_weights(model, checkpoint_dir, dtype=dtype, weight_map=spec.weight_map)
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model = build_model(spec, config)  # its constructor computes buffers that no checkpoint holds
        load_model_weights(model, checkpoint_dir, dtype=dtype, weight_map=spec.weight_map)
    if quantize is not None:
        quantize_model(model, quantize, dtype)
    return model.to(device=device, dtype=dtype).eval()


def find_weights(path: Path, name: str, command: str) -> Path:
    """The file `path`, or `name` in the folder `path`; a FileNotFoundError says which command writes such files."""
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there: name the file that {command} wrote, such as OUT_DIR/final/{name}, or its folder"
        )
    return file
