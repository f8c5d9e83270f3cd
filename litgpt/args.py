"""The settings that training commands share. Each field is a flag, a YAML key and a line of help text."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class TrainArgs:
    """How to train: batch sizes, length of the run, learning-rate schedule, checkpoints."""

    save_interval: int | None = 1000
    """Optimizer steps between two checkpoints; null keeps only the final one."""
    log_interval: int = 1
    """Micro-batch iterations between two logged lines (pretraining counts optimizer steps)."""
    global_batch_size: int = 64
    """Samples per optimizer step, over all devices and nodes."""
    micro_batch_size: int = 4
    """Samples per forward pass on one device; the rest of the global batch is accumulated."""
    lr_warmup_steps: int | None = 100
    """Optimizer steps in which the learning rate rises from 0 to its full value; 0 or null for none."""
    lr_warmup_fraction: float | None = None
    """Length of the warm-up as a fraction of one epoch, in place of lr_warmup_steps (set that to null)."""
    epochs: int | None = None
    """Times to go through the training data."""
    max_tokens: int | None = None
    """Tokens to train on, over all devices and nodes."""
    max_steps: int | None = None
    """Optimizer steps after which training ends."""
    max_time: float | None = None
    """Seconds after which training ends."""
    max_seq_length: int | None = None
    """Longest sequence in tokens; longer samples are cut. Null: as long as data and model allow."""
    tie_embeddings: bool | None = None
    """Share one weight between the token embedding and the output head."""
    max_norm: float | None = None
    """Gradients are scaled down to this norm; null does not clip."""
    min_lr: float = 6e-5
    """Learning rate at which the schedule ends."""
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Course of the learning rate after the warm-up: cosine; wsd = constant, then a linear decay; constant."""
    decay_fraction: float = 0.2
    """Share of the steps in which the wsd schedule decays."""
    keep_checkpoints: int | None = None
    """How many step checkpoints to keep, the newest ones; null keeps all."""

    def __post_init__(self) -> None:
        if self.lr_warmup_fraction and self.lr_warmup_steps:
            raise ValueError(
                f"--train.lr_warmup_fraction {self.lr_warmup_fraction} and --train.lr_warmup_steps "
                f"{self.lr_warmup_steps} exclude each other: set one of them to null."
            )
        for name in ("lr_warmup_fraction", "decay_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--train.{name} is {value}: it must be between 0 and 1.")
        if self.lr_warmup_steps is not None and self.lr_warmup_steps < 0:
            raise ValueError(f"--train.lr_warmup_steps is {self.lr_warmup_steps}: it must be 0 or more, or null.")
        for name in ("save_interval", "log_interval", "global_batch_size", "micro_batch_size", "epochs", "max_tokens"):
            _check_positive("train", name, getattr(self, name))
        for name in ("max_steps", "max_time", "max_seq_length", "max_norm", "keep_checkpoints"):
            _check_positive("train", name, getattr(self, name))

    def gradient_accumulation_iters(self, devices: int, num_nodes: int = 1) -> int:
        """Micro batches that one device adds up for one optimizer step.

        Raises:
            ValueError: The micro batch does not divide what one device gets of the global batch.
        """
        per_device = self.batch_size(devices, num_nodes)
        if per_device % self.micro_batch_size:
            unit = self.micro_batch_size * devices * num_nodes
            near = max(unit, round(self.global_batch_size / unit) * unit)
            raise ValueError(
                f"--train.micro_batch_size {self.micro_batch_size} does not divide the {per_device} samples that each "
                f"of {_devices(devices, num_nodes)} gets of --train.global_batch_size {self.global_batch_size}. "
                f"A global batch size of {near} would fit."
            )
        return per_device // self.micro_batch_size

    def batch_size(self, devices: int, num_nodes: int = 1) -> int:
        """Samples that one device handles per optimizer step.

        Raises:
            ValueError: The global batch cannot be split evenly over the devices.
        """
        world_size = devices * num_nodes
        if world_size < 1:
            raise ValueError(f"{devices} devices on {num_nodes} nodes: both must be 1 or more.")
        if self.global_batch_size % world_size:
            near = max(1, round(self.global_batch_size / world_size)) * world_size
            raise ValueError(
                f"--train.global_batch_size {self.global_batch_size} cannot be split evenly over "
                f"{_devices(devices, num_nodes)}. A global batch size of {near} would fit."
            )
        return self.global_batch_size // world_size

    def warmup_iters(self, devices: int, num_nodes: int, max_iters: int, train_dataloader: Any) -> int:
        """Length of the warm-up in micro-batch iterations of one device, at most `max_iters`.

        Args:
            devices: Devices per node.
            num_nodes: Nodes.
            max_iters: Iterations of the whole run.
            train_dataloader: Its length is one epoch; only looked at when the warm-up is a fraction of an epoch.
        """
        if self.lr_warmup_fraction:
            return min(max_iters, math.ceil(self.lr_warmup_fraction * len(train_dataloader)))
        if self.lr_warmup_steps:
            return min(max_iters, self.lr_warmup_steps * self.gradient_accumulation_iters(devices, num_nodes))
        return 0

    def warmup_steps(self, max_steps: int, steps_per_epoch: int | None = None) -> int:
        """Length of the warm-up in optimizer steps, always shorter than the run.

        A warm-up that would fill the whole run is cut to a tenth of it with a warning: the learning rate
        would otherwise never reach its full value.

        Args:
            max_steps: Optimizer steps of the whole run.
            steps_per_epoch: Needed when the warm-up is given as a fraction of an epoch.
        """
        steps = self.lr_warmup_steps or 0
        if self.lr_warmup_fraction:
            if steps_per_epoch is None:
                raise ValueError(
                    "--train.lr_warmup_fraction needs data whose length is known; use --train.lr_warmup_steps instead."
                )
            steps = math.ceil(self.lr_warmup_fraction * steps_per_epoch)
        if steps and steps >= max_steps:
            shorter = max_steps // 10
            warnings.warn(
                f"The warm-up of {steps} steps would fill the whole run of {max_steps} steps; using {shorter}.",
                stacklevel=2,
            )
            return shorter
        return steps


@dataclass
class EvalArgs:
    """When and how to measure on the validation data."""

    interval: int = 600
    """Optimizer steps between two validations."""
    max_new_tokens: int | None = None
    """Tokens to generate for the example that finetuning prints."""
    max_iters: int = 100
    """Validation batches per validation."""
    initial_validation: bool = False
    """Validate before the first step."""
    final_validation: bool = True
    """Validate after the last step."""
    evaluate_example: str | int = "first"
    """Which instruction finetuning answers as an example: first, random, or its index."""

    def __post_init__(self) -> None:
        for name in ("interval", "max_new_tokens", "max_iters"):
            _check_positive("eval", name, getattr(self, name))


@dataclass
class LogArgs:
    """How an experiment tracker files the run."""

    project: str | None = None
    """Name of the project; null: the command and the model."""
    run: str | None = None
    """Name of the run."""
    group: str | None = None
    """Name of the group of runs."""
    teamspace: str | None = None
    """Teamspace of the litlogger."""
    metadata: dict | None = None
    """Further keys and values to store with the run."""
    log_model: bool = False
    """Upload checkpoints as well."""
    save_logs: bool = True
    """Upload the console output as well."""
    checkpoint_name: str | None = None
    """Name under which checkpoints are uploaded."""


def _check_positive(group: str, name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise ValueError(f"--{group}.{name} is {value}: it must be greater than 0.")


def _devices(devices: int, num_nodes: int) -> str:
    text = f"{devices} device{'s' * (devices != 1)}"
    return text if num_nodes == 1 else f"{text} on {num_nodes} nodes"
