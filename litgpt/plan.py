"""What a run needs, before anything is loaded: parameters, FLOPs, and memory at its peak. Imports no torch.

count_parameters, flops_per_token      from the config alone, experts counted right
plan_run                               memory of one run: weights, gradients, optimizer, activations, KV cache
rank_knobs                             what would save most, by trying it
"""

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from litgpt.config import Config, nearest
from litgpt.rehearsal import FLOAT, Setting, Stage
from litgpt.rehearsed_model import block_kinds, kv_cache_bytes, layer_window, model_weights, rehearse_stage

Task = Literal["pretrain", "full", "lora", "qlora", "generate"]
TASKS: tuple[Task, ...] = ("pretrain", "full", "lora", "qlora", "generate")
PRECISIONS = {
    "32-true": (4, 4), "bf16-true": (2, 2), "16-true": (2, 2), "bf16-mixed": (4, 2), "16-mixed": (4, 2),
}  # fmt: skip
"""Precision -> bytes of a weight, and of a number that a layer computes with."""
STATE_NUMBERS = {
    "AdamW": 2, "Adam": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "Adadelta": 2, "RMSprop": 1, "Adagrad": 1, "SGD": 0,
    "Muon": 2,
}  # fmt: skip
"""Optimizer -> numbers it keeps for each weight, in the weight's precision; Muon one for a matrix of a block."""
STATE_BYTES_8BIT = {"AdamW8bit": 2, "Adam8bit": 2, "PagedAdamW8bit": 2, "Lion8bit": 1}
"""Optimizer of bitsandbytes -> bytes it keeps for each weight."""
BYTES_4BIT = 4.5 / 8  # NF4: four bits, and a float32 scale for each 64 weights
CUDA_CONTEXT_BYTES = 600_000_000  # driver, kernels and cuBLAS workspaces; no tensor, so no profiler of torch shows it
PREFILL_CHUNK = 4096  # as in generate/decoding.py


class ParameterCount(NamedTuple):
    """Weights of a model (tied ones count once), and those that one token passes through."""

    total: int
    active: int


@dataclass(frozen=True)
class RunSettings:
    """What is to be run, and how. A field that is None takes what the command takes."""

    task: Task = "pretrain"
    batch_size: int = 1
    seq_length: int | None = None
    precision: str | None = None
    devices: int = 1
    optimizer: str = "AdamW"
    lora_r: int = 8
    lora_parts: frozenset[str] = frozenset({"query", "value"})
    lora_dropout: float = 0.05
    activation_checkpointing: bool = False
    accumulate: bool = True
    quantize: bool = False
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        for name in ("batch_size", "devices", "lora_r", "seq_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(f"--precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.optimizer_name not in STATE_NUMBERS | STATE_BYTES_8BIT:
            known = [*STATE_NUMBERS, *(f"bitsandbytes.optim.{name}" for name in STATE_BYTES_8BIT)]
            close = nearest(self.optimizer_name, known)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"--optimizer {self.optimizer!r}: {hint}memory is known for {', '.join(known)}")

    @property
    def optimizer_name(self) -> str:
        """The class without its module."""
        return self.optimizer.rpartition(".")[2]

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.task != "generate"

    @property
    def is_quantized(self) -> bool:
        """Whether the linear layers of the blocks have 4-bit weights."""
        return self.task == "qlora" or (self.quantize and self.task in ("lora", "generate"))

    @property
    def resolved_precision(self) -> str:
        """Mixed for training and bf16-true for inference, unless told otherwise; 4-bit weights exclude mixed."""
        precision = self.precision or ("bf16-mixed" if self.trains and not self.is_quantized else "bf16-true")
        return precision.replace("-mixed", "-true") if self.is_quantized else precision

    def length(self, config: Config) -> int:
        """Tokens of a sequence; ValueError where the model's context is shorter."""
        length = self.seq_length or min(config.block_size, 4096)
        if length > config.block_size:
            raise ValueError(
                f"--seq_length is {length}; the context of {config.name or 'the model'} has {config.block_size} tokens"
            )
        return length


@dataclass(frozen=True)
class RunPlan:
    """Bytes that one device has in use at the peak of a run."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps, what a layer works with, and what an optimizer step works with."""
    kv_cache: int
    cuda_context: int
    trained_parameters: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "trained_parameters")


# ---------------------------------------------------------------- parameters and FLOPs


def count_parameters(config: Config) -> ParameterCount:
    """Weights of the GPT that `config` describes; nothing is built."""
    total = active = 0
    for name, shape, count in model_weights(config):
        total += math.prod(shape) * count
        is_routed = ".experts." in name
        active += math.prod(shape) * (count * config.n_expert_per_token // config.n_expert if is_routed else count)
    return ParameterCount(total, active)


def flops_per_token(config: Config, seq_length: int, training: bool = True) -> int:
    """As `GPT.get_nparams_and_flops`: 6 FLOPs (2 without a backward pass) for each active weight but the embedding,
    and as many for each head, layer, number of a key and a value, and position in reach."""
    weights = count_parameters(config).active
    weights -= 0 if config.tie_embeddings else config.n_embd * config.padded_vocab_size
    width = config.qk_head_dim + config.v_head_dim if config.latent_attention else 2 * config.head_size
    reach = sum(min(seq_length, layer_window(config, i) or seq_length) for i in range(config.n_layer))
    return (6 if training else 2) * (weights + config.n_head * width * reach)


def flops_per_param(max_seq_length: int, n_layer: int, n_embd: int, n_params: int) -> int:
    """FLOPs of a forward pass over one sequence: 2 for each weight and token, and the two products of attention."""
    return 2 * n_params * max_seq_length + n_layer * 4 * n_embd * max_seq_length**2


def estimate_flops(model: Any, training: bool) -> int:
    """FLOPs of a GPT for one sequence of `max_seq_length`; a frozen weight needs no gradient, only passes one on."""
    length, config, count = model.max_seq_length, model.config, count_parameters(model.config)
    total = 0
    for is_trained, factor in ((True, 3 if training else 1), (False, 2 if training else 1)):
        if n := sum(p.numel() for p in model.parameters() if p.requires_grad is is_trained):
            n = n * count.active // count.total
            total += factor * flops_per_param(length, config.n_layer, config.n_embd, n)
    return total


# ---------------------------------------------------------------- memory of a run


def plan_run(config: Config, settings: RunSettings, n_parameters: int | None = None) -> RunPlan:
    """Memory at the peak of a run, on each device. Eager code is assumed: compiled code keeps less.

    Args:
        config: Of a GPT; a model of another kind is counted as the GPT of its config.
        settings: What to run.
        n_parameters: The true number of weights, where the model is not the GPT of its config.

    Raises:
        ValueError: The sequence is longer than the model's context.
    """
    seq_length, devices = settings.length(config), settings.devices
    setting = _setting(settings, seq_length)
    shapes = list(model_weights(config, setting))
    scale = n_parameters / count_parameters(config).total if n_parameters else 1
    trained = [w for w in shapes if settings.trains and (setting.trains_base or ".lora_" in w[0])]
    weights = int(scale * sum(math.prod(shape) * n * _width(name, shape, setting) for name, shape, n in shapes))
    n_trained = int(scale * sum(math.prod(shape) * n for _, shape, n in trained))
    optimizer = int(scale * sum(_state_bytes(*w, settings, setting.param_bytes) for w in trained))
    context = CUDA_CONTEXT_BYTES if settings.device == "cuda" else 0
    gathered = _gathered_bytes(shapes, config, setting) if devices > 1 and settings.trains else 0
    gradients, activations = _peak(config, setting, settings, n_trained * setting.param_bytes // devices)
    scratch = max((_step_scratch(*w, settings, setting.param_bytes) for w in trained), default=0)
    if n_trained * setting.param_bytes // devices + scratch > gradients + activations:
        gradients, activations = n_trained * setting.param_bytes // devices, scratch
    cache = 0 if settings.trains else kv_cache_bytes(config, setting.B, seq_length, setting.compute_bytes)
    return RunPlan(
        weights // devices,
        gradients,
        optimizer // devices,
        activations + gathered,
        cache // devices,
        context,
        n_trained,
    )


def _setting(settings: RunSettings, seq_length: int) -> Setting:
    param_bytes, compute_bytes = PRECISIONS[settings.resolved_precision]
    is_lora = settings.task in ("lora", "qlora")
    return Setting(
        B=settings.batch_size, T=seq_length if settings.trains else min(seq_length, PREFILL_CHUNK),
        param_bytes=param_bytes, compute_bytes=compute_bytes, device=settings.device, backward=settings.trains,
        trains_base=not is_lora, holds_gradients=settings.accumulate, quantized=settings.is_quantized,
        lora_r=settings.lora_r * is_lora, lora_parts=settings.lora_parts if is_lora else frozenset(),
        lora_dropout=settings.lora_dropout, n_cached=0 if settings.trains else seq_length,
    )  # fmt: skip


def _peak(config: Config, setting: Setting, settings: RunSettings, gradients: int) -> tuple[int, int]:
    """Gradients and everything else at the peak of a forward pass and, in training, its backward pass."""
    rehearsed: dict[tuple, Stage] = {}
    stages: list[Stage] = []
    for part, index in [("embed", 0), *(("block", i) for i in block_kinds(config)), ("end", 0)]:
        # the first block of a frozen model has an input that needs no gradient
        key = (part, index, setting.trains_base or len(stages) > 1)
        if key not in rehearsed:
            rehearsed[key] = rehearse_stage(config, setting, *key, settings.activation_checkpointing)
        stages.append(rehearsed[key])
    n_tokens, local = setting.B * setting.T, config.rope_local_base_freq is not None
    kept = 3 * 8 * n_tokens + 2 * setting.T * config.rope_n_elem * FLOAT * (1 + local)  # ids; cosines and sines
    held = gradients if settings.accumulate and settings.trains else 0
    best = (held, 0)
    for stage in stages:
        best = max(best, (held, kept + stage.forward_peak), key=sum)
        kept += stage.saved + stage.casts
    kept -= sum(stage.casts for stage in stages)
    for stage in reversed(stages if settings.trains else []):
        kept -= stage.saved
        best = max(best, (held, kept + stage.backward_peak), key=sum)
        if settings.accumulate:  # only that of a tied head has to wait
            kept += stage.gradients
        else:
            held += stage.gradients // settings.devices
    return best


def _is_packed(name: str, shape: tuple[int, ...], setting: Setting) -> bool:
    """Whether a weight has 4 bits: a matrix of a block, without LoRA's and the router's."""
    return setting.quantized and len(shape) == 2 and ".h." in name and ".lora_" not in name and ".gate." not in name


def _width(name: str, shape: tuple[int, ...], setting: Setting) -> float:
    return BYTES_4BIT if _is_packed(name, shape, setting) else setting.param_bytes


def _state_bytes(name: str, shape: tuple[int, ...], count: int, settings: RunSettings, param_bytes: int) -> int:
    """What the optimizer keeps for a weight."""
    optimizer, n = settings.optimizer_name, math.prod(shape) * count
    if optimizer in STATE_BYTES_8BIT:
        return n * STATE_BYTES_8BIT[optimizer]
    return n * param_bytes * (1 if _is_muons(name, shape, optimizer) else STATE_NUMBERS[optimizer])


def _is_muons(name: str, shape: tuple[int, ...], optimizer: str) -> bool:
    return optimizer == "Muon" and len(shape) == 2 and ".h." in name


def _step_scratch(name: str, shape: tuple[int, ...], count: int, settings: RunSettings, param_bytes: int) -> int:
    """What the step for one weight works with: Muon's update, two bfloat16 of it, and two of its Gram matrix."""
    if not _is_muons(name, shape, settings.optimizer_name):
        return 0
    return math.prod(shape) * (param_bytes + 4) + 4 * min(shape) ** 2


def _gathered_bytes(shapes: list, config: Config, setting: Setting) -> int:
    """Weights that FSDP has whole: embedding and head, the block at work and the next one; with their gradients."""
    blocks = sum(math.prod(s) * n * _width(name, s, setting) for name, s, n in shapes if ".h." in name)
    ends = sum(math.prod(s) * n * setting.param_bytes for name, s, n in shapes if ".h." not in name)
    return int((ends + 2 * blocks / config.n_layer) * (2 if setting.backward and setting.trains_base else 1))


# ---------------------------------------------------------------- does it fit, and what would help


@dataclass(frozen=True)
class Knob:
    """A change of the run, and the bytes it saves on each device."""

    change: str
    saved: int
    total: int


def rank_knobs(config: Config, settings: RunSettings, n_parameters: int | None = None) -> list[Knob]:
    """All changes that save memory, by what they save when tried one at a time, best first."""
    now, knobs = plan_run(config, settings, n_parameters).total, []
    for change, other in _changes(config, settings):
        total = plan_run(config, other, n_parameters).total
        if total < now:
            knobs.append(Knob(change, now - total, total))
    return sorted(knobs, key=lambda knob: -knob.saved)


def _changes(config: Config, s: RunSettings) -> Iterator[tuple[str, RunSettings]]:
    if s.batch_size > 1:
        yield f"--batch_size {s.batch_size // 2}", replace(s, batch_size=s.batch_size // 2)
    length = s.length(config)
    if length > 128:
        yield f"--seq_length {length // 2}", replace(s, seq_length=length // 2)
    if s.resolved_precision not in ("bf16-true", "16-true"):
        yield "--precision bf16-true", replace(s, precision="bf16-true")
    yield f"--devices {2 * s.devices}", replace(s, devices=2 * s.devices)
    if s.task == "generate":
        if not s.quantize:
            yield "--quantize bnb.nf4", replace(s, quantize=True)
        return
    if not s.activation_checkpointing:
        yield "--activation_checkpointing true", replace(s, activation_checkpointing=True)
    if s.accumulate:
        yield "--accumulate false (global batch = micro batch x devices)", replace(s, accumulate=False)
    for optimizer in ("Muon", "bitsandbytes.optim.AdamW8bit"):
        if s.optimizer_name != optimizer.rpartition(".")[2]:
            yield f"--optimizer {optimizer}", replace(s, optimizer=optimizer)
    if s.task == "full":
        yield "finetune_lora instead", replace(s, task="lora")
    if s.task == "lora":
        yield "--quantize bnb.nf4 (QLoRA)", replace(s, task="qlora")


def estimate_model_memory(config: Config, dtype: Any = "float32", training: bool = False) -> dict[str, Any]:
    """What one sequence (of at most 4,096 tokens) takes on one device, in units of 10^9 bytes.

    Args:
        config: Of a GPT.
        dtype: Of the weights, as a torch dtype or its name.
        training: Count gradients, AdamW and what is kept for the backward pass; else the KV cache.

    Returns:
        `param_count`, `param_memory_gb`, `estimated_total_gb`, and `available_gpu_memory_gb` with `fits_in_memory`,
        which are None where there is no GPU.
    """
    name = str(dtype).removeprefix("torch.")
    precisions = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}
    if name not in precisions:
        raise ValueError(f"dtype is {name}; memory is known for {', '.join(precisions)}")
    available = gpu_memory_bytes()
    settings = RunSettings("pretrain" if training else "generate", precision=precisions[name], accumulate=False,
                           device="cpu" if available is None else "cuda")  # fmt: skip
    plan, n = plan_run(config, settings), count_parameters(config).total
    return {
        "param_count": n,
        "param_memory_gb": n * PRECISIONS[precisions[name]][0] / 1e9,
        "estimated_total_gb": plan.total / 1e9,
        "available_gpu_memory_gb": None if available is None else available / 1e9,
        "fits_in_memory": None if available is None else plan.total <= available,
    }


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU of this machine, or None; asks the driver's own program, not torch."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    sizes = [int(line) * 2**20 for line in lines if line.isdigit()]
    return min(sizes, default=None)
