"""The command `litgpt plan`."""

import contextlib
import json as json_format
import os
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from litgpt.checkpoint.hf_config import config_from_hf, folder_name, read_hf_config
from litgpt.config import Config
from litgpt.plan import (
    TASKS,
    Knob,
    RunPlan,
    RunSettings,
    Task,
    count_parameters,
    flops_per_token,
    gpu_memory_bytes,
    plan_run,
    rank_knobs,
)

DEFAULT_MEMORY_GB = 24
COLUMNS = ("weights", "gradients", "optimizer", "activations", "kv_cache", "cuda_context", "total")


@dataclass
class TaskPlan:
    """One line of the plan."""

    task: Task
    precision: str
    plan: RunPlan
    knobs: list[Knob]


def setup(
    model: str,
    *,
    batch_size: int = 1,
    seq_length: int | None = None,
    precision: Literal["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"] | None = None,
    devices: int = 1,
    memory: float | None = None,
    task: Literal["pretrain", "full", "lora", "qlora", "generate"] | None = None,
    optimizer: str = "AdamW",
    activation_checkpointing: bool = False,
    accumulate: bool = True,
    quantize: Literal["bnb.nf4"] | None = None,
    lora_r: int = 8,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    device: Literal["cuda", "cpu"] = "cuda",
    json: bool = False,
) -> None:
    """Say what a model takes before anything is loaded: parameters, FLOPs, memory, whether it fits, what would help.

    Memory is that of eager code at its peak; compiled code keeps less. 1 GB is 10^9 bytes.

    Args:
        model: Name of a model, or a folder with model_config.yaml or with the config.json of Hugging Face.
        batch_size: Sequences that one device works on at once (the micro batch).
        seq_length: Tokens of each; when generating, prompt and answer. Default: 4096, or the context if it is shorter.
        precision: Default: bf16-mixed for training, bf16-true for inference and for QLoRA.
        devices: GPUs to share the work. Training shares weights, gradients and optimizer as FSDP does.
        memory: GB of one device. Default: that of this machine's GPU, or 24 where there is none.
        task: Show only this one.
        optimizer: AdamW, Muon, SGD, another one of torch.optim, or one of bitsandbytes such as AdamW8bit.
        activation_checkpointing: Whether blocks keep only their input, and run again in the backward pass.
        accumulate: Whether an optimizer step has several micro batches, so that gradients are there all the time.
        quantize: 4-bit weights for generating, and LoRA (which makes it QLoRA).
        lora_r: Rank of LoRA.
        lora_dropout: Dropout before LoRA.
        lora_query: Whether queries have LoRA.
        lora_key: Whether keys have LoRA.
        lora_value: Whether values have LoRA.
        lora_projection: Whether the output of attention has LoRA.
        lora_mlp: Whether the MLP has LoRA.
        lora_head: Whether the output head has LoRA.
        device: Decides the kernels of attention; on a CPU some keep all scores.
        json: Print JSON, in bytes, instead of a table.
    """
    if memory is not None and not memory > 0:
        raise ValueError(f"--memory is {memory}; it must be above 0, in GB")
    flags = dict(
        query=lora_query, key=lora_key, value=lora_value, projection=lora_projection, mlp=lora_mlp, head=lora_head
    )
    settings = RunSettings(
        "pretrain", batch_size, seq_length, precision, devices, optimizer, lora_r,
        frozenset(part for part, is_on in flags.items() if is_on), lora_dropout, activation_checkpointing, accumulate,
        quantize is not None, device,
    )  # fmt: skip
    config, n_parameters = find_model(model)
    length = settings.length(config)
    available = int(memory * 1e9) if memory else default_memory(device)
    plans = []
    for name in [task] if task else TASKS:
        run = replace(settings, task=name)
        plan, knobs = plan_run(config, run, n_parameters), rank_knobs(config, run, n_parameters)[:3]
        plans.append(TaskPlan(name, run.resolved_precision, plan, knobs))
    total, active = count_parameters(config)
    facts: dict[str, Any] = {"model": config.name or model, "parameters": n_parameters or total}
    facts |= {"active_parameters": n_parameters or active, "context": config.block_size, "layers": config.n_layer}
    facts |= {
        f"{k}_flops_per_token": flops_per_token(config, length, k == "training") for k in ("training", "inference")
    }
    facts |= {"batch_size": batch_size, "seq_length": length, "devices": devices, "device": device}
    facts |= {"memory": available, "is_exact": n_parameters is None}
    print(_as_json(facts, plans) if json else _as_text(facts, plans))


def find_model(name: str) -> tuple[Config, int | None]:
    """The config of a model, and its number of parameters where it is not the GPT that the config describes.

    The registry is asked only for what it alone knows: it imports torch, which takes longer than all the rest.
    """
    folder, is_extended = Path(name), "litgpt.registry" in sys.modules
    with warnings.catch_warnings():  # advice about using the model
        warnings.simplefilter("ignore")
        if folder.is_dir() and not is_extended:
            path = folder / "model_config.yaml"
            values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if path.is_file() and isinstance(values, dict) and values.get("model_type", "gpt") == "gpt":
                return Config.from_file(path), None
            if not path.is_file() and (folder / "config.json").is_file():
                return config_from_hf(read_hf_config(folder), folder_name(folder)), None
        if not folder.is_dir() and not is_extended:
            with contextlib.suppress(ValueError):
                return Config.from_name(name), None
        from litgpt.registry import get_model_spec, load_checkpoint_config, resolve_model

        spec, config = load_checkpoint_config(folder) if folder.is_dir() else resolve_model(name)
    if spec is get_model_spec("gpt"):
        return config, None
    import torch

    with torch.device("meta"):
        return config, sum(p.numel() for p in spec.model(config).parameters())


def default_memory(device: str) -> int:
    """Bytes of this machine's GPU, or 24 GB; for the CPU those of the machine."""
    if device == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return gpu_memory_bytes() or DEFAULT_MEMORY_GB * 10**9


def _as_json(facts: dict[str, Any], plans: list[TaskPlan]) -> str:
    runs = {}
    for p in plans:
        memory = asdict(p.plan) | {"total": p.plan.total, "fits": p.plan.total <= facts["memory"]}
        knobs = [asdict(knob) | {"fits": knob.total <= facts["memory"]} for knob in p.knobs]
        runs[p.task] = {"precision": p.precision, **memory, "knobs": knobs}
    return json_format.dumps(facts | {"runs": runs}, indent=2)


def _as_text(facts: dict[str, Any], plans: list[TaskPlan]) -> str:
    n, active, available = facts["parameters"], facts["active_parameters"], facts["memory"] / 1e9
    mixture = f", {_count(active)} for each token" if active != n else ""
    flops = [facts[f"{kind}_flops_per_token"] / 1e9 for kind in ("training", "inference")]
    on = f"each of {facts['devices']} devices" if facts["devices"] > 1 else "one device"
    lines = [
        f"{facts['model']}: {_count(n)} parameters{mixture}, {facts['layers']} layers, context {facts['context']:,}",
        f"FLOPs for each token at {facts['seq_length']:,} tokens: {flops[0]:,.3g} G in training, {flops[1]:,.3g} G "
        "in generation",
    ]
    if not facts["is_exact"]:
        lines.append("A model of your own: its weights are counted, its activations are those of a GPT of its config.")
    lines += ["", f"GB on {on}, {facts['batch_size']} x {facts['seq_length']:,} tokens at once ({facts['device']})"]
    columns = [c for c in COLUMNS if any(_bytes(p.plan, c) for p in plans)]
    heads = [c.replace("_", " ") for c in columns]
    widths = [max(len(head) + 2, 9) for head in heads]
    head = "".join(f"{text:>{width}}" for text, width in zip(heads, widths, strict=True))
    lines.append(f"{'':<10}{'precision':<11}{head}  fits {available:,.4g} GB")
    for p in plans:
        numbers = [_gigabytes(_bytes(p.plan, column)) for column in columns]
        row = "".join(f"{text:>{width}}" for text, width in zip(numbers, widths, strict=True))
        lines.append(f"{p.task:<10}{p.precision:<11}{row}  {'yes' if p.plan.total <= facts['memory'] else 'no'}")
    too_big = [p for p in plans if p.plan.total > facts["memory"]]
    shown = too_big or plans[: len(plans) == 1]
    if shown:
        lines += ["", "What saves most (GB, and the total with it):"]
    for p in shown:
        for i, knob in enumerate(p.knobs):
            fits = " fits" if knob.total <= facts["memory"] < p.plan.total else ""
            label, saved, total = p.task if i == 0 else "", _gigabytes(knob.saved), _gigabytes(knob.total)
            lines.append(f"{label:<10}{'-' + saved:>9} ->{total:>8}{fits:<5}  {knob.change}")
    return "\n".join(lines)


def _bytes(plan: RunPlan, column: str) -> int:
    return getattr(plan, column)


def _gigabytes(n: int) -> str:
    gigabytes = n / 1e9
    return "0" if n == 0 else f"{gigabytes:,.3f}" if gigabytes < 1 else f"{gigabytes:,.1f}"


def _count(n: int) -> str:
    return f"{n / 1e9:.3g} B" if n >= 1e9 else f"{n / 1e6:.3g} M"
