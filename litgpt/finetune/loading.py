"""The model to finetune: pretrained weights, quantised where asked, what the method adds, and a checkpoint's part."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from litgpt.checkpoint.meta import meta_device
from litgpt.config import Config
from litgpt.finetune.method import Method
from litgpt.finetune.settings import Settings
from litgpt.generate.loading import load_model
from litgpt.parallel import is_sharded
from litgpt.quantize import load_quantized
from litgpt.registry import ModelSpec
from litgpt.registry import build_model as build
from litgpt.surgery import cast_frozen

if TYPE_CHECKING:
    import lightning as L


def build_model(
    fabric: "L.Fabric", method: Method, spec: ModelSpec, config: Config, settings: Settings, resume_path: Path | None
) -> nn.Module:
    """The model as it is to be trained, on this process's device, not wrapped yet.

    Frozen weights of the file's own type stay views of the mapped file on a CPU; trained ones get memory of their own.
    """
    precision = str(fabric.strategy.precision.precision)
    device = torch.device("cpu") if is_sharded(fabric) else fabric.device
    whole = settings.checkpoint_dir if resume_path is None or method.is_partial else resume_path
    if settings.quantize is None:
        model = load_model(spec, config, whole, device, weights_dtype(precision))
    else:
        with meta_device():
            model = build(spec, config)
        load_quantized(model, whole, settings.quantize, weights_dtype(precision), device)
    method.prepare(model, config)
    method.mark_trainable(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    if precision.endswith("-mixed") and not is_sharded(fabric):  # FSDP flattens weights of one type together
        cast_frozen(model, torch.bfloat16 if precision.startswith("bf16") else torch.float16)
    if resume_path is not None and method.is_partial:
        method.load_part(model, resume_path)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{method.name} finds nothing to train in {type(model).__name__}")
    return model.to(device).train()


def weights_dtype(precision: str) -> torch.dtype:
    """What weights are stored as: 16 bits with `-true` precisions, else float32."""
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(
        precision, torch.float32
    )
