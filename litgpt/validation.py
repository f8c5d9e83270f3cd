"""Measuring a model on validation data during a run."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from litgpt.data.base import DataModule
from litgpt.objective import NextToken, Objective
from litgpt.training import batch_seed, split_examples, to_device, wide_dtype

if TYPE_CHECKING:
    import lightning as L


@torch.no_grad()
def evaluate(
    fabric: "L.Fabric", model: nn.Module, val_dataloader: Iterable, max_iters: int, objective: Objective, seed: int
) -> dict[str, float]:
    """Means of the objective's metrics over all devices; leaves the random state of the training alone."""
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    totals: dict[str, list[torch.Tensor]] = {}
    model.eval()
    with torch.random.fork_rng(devices=devices):
        for index, examples in enumerate(islice(val_dataloader, max_iters)):
            rng = torch.Generator().manual_seed(batch_seed(seed, fabric.global_rank, index, "eval"))
            batch = to_device(objective.collate(split_examples(examples), "eval", rng), fabric.device)
            for name, pair in objective.metrics(batch, objective.loss(model, batch)).items():
                totals.setdefault(name, []).append(torch.stack([x.to(wide_dtype(fabric.device)) for x in pair]))
    model.train()
    metrics = {}
    for name, pairs in totals.items():
        total = torch.stack(pairs).sum(dim=0)
        if fabric.world_size > 1:
            total = fabric.all_reduce(total, reduce_op="sum")
        value, n = total.tolist()
        metrics[name] = value / max(n, 1)
    return metrics


def measure(
    fabric: "L.Fabric",
    model: nn.Module,
    val_dataloader: Iterable,
    max_iters: int,
    objective: Objective,
    seed: int,
    data: DataModule | None,
) -> dict[str, float]:
    """What a validation adds to a row of metrics; nats per byte do not depend on the tokenizer."""
    metrics = {f"val_{k}": v for k, v in evaluate(fabric, model, val_dataloader, max_iters, objective, seed).items()}
    loss = metrics.get("val_loss")
    if loss is not None and isinstance(objective, NextToken):
        metrics["val_ppl"] = math.exp(loss) if loss < 700 else None
        bytes_per_token = data.bytes_per_token("val") if hasattr(data, "bytes_per_token") else None
        metrics["val_nats_per_byte"] = loss / bytes_per_token if bytes_per_token else None
    return metrics
