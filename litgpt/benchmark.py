"""Speed of generation, measured and shown."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor


def measure(
    generate: Callable[..., Any], num_iterations: int, device: torch.device, **kwargs: Any
) -> tuple[Tensor, dict[str, list[float]]]:
    """Call `generate` a few times, once for each measurement.

    Args:
        generate: Takes `return_as_token_ids` and, to measure the time to the first token, `stream`.
        num_iterations: How often.
        device: Of the model.
        kwargs: For `generate`.

    Returns:
        The ids `(n,)` of the last time, and for each figure a list: seconds, seconds to the first token where they come
        as a stream, tokens, tokens per second, on CUDA also memory in units of 10^9 bytes.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations {num_iterations} is below 1: there would be nothing to measure")
    figures: dict[str, list[float]] = {}
    for _ in range(num_iterations):
        start = time.perf_counter()
        tokens = generate(**{**kwargs, "return_as_token_ids": True})
        row = {"Seconds total": 0.0}
        if kwargs.get("stream"):
            parts = []
            for token in tokens:
                if not parts:
                    row["Seconds to first token"] = time.perf_counter() - start
                parts.append(token)
            tokens = torch.cat([torch.empty(0, dtype=torch.long, device=device), *parts])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row["Seconds total"] = time.perf_counter() - start
        row["Tokens generated"] = len(tokens)
        row["Inference speed in tokens/sec"] = len(tokens) / row["Seconds total"]
        if device.type == "cuda":
            row["Total GPU memory allocated in GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        for name, value in row.items():
            figures.setdefault(name, []).append(value)
    return tokens, figures


def benchmark_dict_to_markdown_table(data: Mapping[str, Sequence[float | None]]) -> str:
    """Figures as a table of their means, with the standard deviation where there are several."""
    lines = ["| Metric | Mean | Std Dev |", "|---|---|---|"]
    for name, values in data.items():
        known = [float(value) for value in values if value is not None]
        middle = f"{mean(known):.2f}" if known else "-"
        spread = f"{stdev(known):.2f}" if len(known) > 1 else "-"
        lines.append(f"| {name} | {middle} | {spread} |")
    return "\n".join(lines) + "\n"
