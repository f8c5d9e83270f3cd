"""`litgpt finetune_lora`: train low-rank updates of frozen layers, and merge them at the end."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.checkpoint.lora_merge import LORA_NAME, merge_folder
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.finetune.example import generate_example
from litgpt.finetune.launch import launch
from litgpt.finetune.method import Method
from litgpt.finetune.published import (
    fit_of,
    get_dataloaders,
    get_longest_seq_length,
    get_lr_scheduler,
    run_main,
    save_part,
    validate,
)
from litgpt.finetune.settings import EVAL, TRAIN, Quantize, validate_args
from litgpt.lora import LoRASettings, add_lora, is_lora, lora_plus_groups, mark_only_lora_as_trainable
from litgpt.optimizers import default_lr, instantiate_torch_optimizer
from litgpt.types import LoggerChoice

if TYPE_CHECKING:
    import lightning as L

__all__ = [
    "LoRA", "fit", "generate_example", "get_dataloaders", "get_longest_seq_length", "get_lr_scheduler", "main",
    "save_lora_checkpoint", "setup", "validate", "validate_args",
]  # fmt: skip


class LoRA(Method):
    """Low-rank updates (arXiv 2106.09685).

    Args:
        settings: Which layers get an update, and of which rank.
        plus_ratio: LoRA+ (arXiv 2402.12354): how many times faster B learns than A.
    """

    name = "lora"
    weights_name = LORA_NAME

    def __init__(self, settings: LoRASettings, plus_ratio: float | None = None) -> None:
        self.settings, self.plus_ratio = settings, plus_ratio

    def prepare(self, model: nn.Module, config: Config) -> None:
        """Wrap the layers."""
        add_lora(model, self.settings)

    def mark_trainable(self, model: nn.Module) -> None:
        """Train the updates alone."""
        mark_only_lora_as_trainable(model)

    def is_saved(self, name: str) -> bool:
        """The updates alone are saved."""
        return is_lora(name)

    def build_optimizer(self, optimizer: str | Mapping[str, Any], model: nn.Module) -> torch.optim.Optimizer:
        """With LoRA+ a learning rate of its own for B."""
        if self.plus_ratio is None:
            return super().build_optimizer(optimizer, model)
        groups = lora_plus_groups(model, default_lr(optimizer), self.plus_ratio)
        return instantiate_torch_optimizer(optimizer, groups)

    def finish(self, folder: Path, checkpoint_dir: Path, config: Config) -> None:
        """Merge the updates into a whole model beside them."""
        merge_folder(folder, checkpoint_dir, config, self.settings)


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    precision: str | None = None,
    quantize: Quantize | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TRAIN,
    eval: EvalArgs = EVAL,
    log: LogArgs = LogArgs(),
    optimizer: str | dict = "AdamW",
    logger_name: LoggerChoice = "csv",
    seed: int = 1337,
    access_token: str | None = None,
    compile: bool = False,
    activation_checkpointing: bool = False,
    ema_decay: float | None = None,
    early_stopping_patience: int | None = None,
    keep_best: bool = False,
    lora_targets: str | list[str] | None = None,
    lora_rslora: bool = False,
    lora_dora: bool = False,
    lora_plus_ratio: float | None = None,
    plot: bool = True,
) -> None:
    """Finetune low-rank updates of a frozen model, and merge them into it at the end.

    SIGTERM and Ctrl-C finish the step, save a checkpoint and exit with 143 and 130; SIGUSR1 saves and goes on.

    Arguments:
        checkpoint_dir: The model: a folder of litgpt or Hugging Face, or a name such as org/model, which is downloaded.
        out_dir: Where to write checkpoints (`step-000100/`, `best/`, `final/`), metrics.csv, metrics.jsonl, loss.png
            and logs.
        precision: Precision of the training; by default bf16-mixed, or 16-mixed on GPUs without bf16.
        quantize: Keep the frozen weights in 4 bits (bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq) or 8 (bnb.int8-training);
            needs a `-true` precision.
        devices: How many GPUs, or processes on a CPU, to use; `auto` uses all GPUs.
        num_nodes: How many machines take part.
        lora_r: Rank of the updates.
        lora_alpha: The updates are scaled by alpha / r.
        lora_dropout: Probability of dropping an input of an update in training.
        lora_query: Update the query projections.
        lora_key: Update the key projections.
        lora_value: Update the value projections.
        lora_projection: Update the output projections of the attention.
        lora_mlp: Update the MLPs.
        lora_head: Update the output head.
        resume: Whether to go on with a run: `true` takes the newest checkpoint in `out_dir`, `auto` does so if there is
            one, a path names a checkpoint's folder or file.
        data: Where the training data comes from; by default Alpaca.
        train: Batch sizes, length, learning rate and checkpoints of the training.
        eval: When and how to validate.
        log: How an experiment tracker files the run.
        optimizer: Name of an optimizer (AdamW, Muon, another one of torch.optim, or a class path), or a map of
            `class_path` and `init_args`.
        logger_name: Experiment tracker, beside the metrics files that are always written.
        seed: Seed of dropout and of the objective.
        access_token: Token of the hub, for models that need one.
        compile: Compile the model: slow to start, then faster.
        activation_checkpointing: Keep less of the forward pass and compute it again: slower, less memory.
        ema_decay: Train as usual but validate and save the running mean of the weights, of which each step keeps this
            share, such as 0.999.
        early_stopping_patience: End the run when so many validations in a row were no better than the best one.
        keep_best: Also save the weights of the best validation, in `best/`.
        lora_targets: Layers to update in place of the switches above: names, globs or regular expressions.
        lora_rslora: Scale by alpha / sqrt(r), which keeps large ranks learning.
        lora_dora: Learn the length of each row of the weights apart from its direction.
        lora_plus_ratio: LoRA+: how many times faster than A the matrices B learn, such as 16.
        plot: Whether to draw the loss curves at the end.
    """
    launch(setup, LoRA(LoRASettings.from_flags(locals()), lora_plus_ratio), locals())


def main(
    fabric: "L.Fabric",
    devices: int,
    seed: int,
    config: Config,
    data: DataModule,
    checkpoint_dir: Path,
    out_dir: Path,
    train: TrainArgs,
    eval: EvalArgs,
    optimizer: str | dict,
    num_nodes: int = 1,
    precision: str | None = None,
) -> None:
    """One run on devices that `fabric` has launched, as scripts written for 0.5 call it."""
    how = dict(train=train, eval=eval, optimizer=optimizer, seed=seed)
    run_main(setup, LoRA(LoRASettings.from_flags(config)), fabric, checkpoint_dir, data, out_dir=out_dir, **how)


fit = fit_of(setup, LoRA(LoRASettings()))


def save_lora_checkpoint(fabric: "L.Fabric", model: nn.Module, file_path: Path) -> None:
    """Write what this method trains into one file."""
    save_part(fabric, LoRA(LoRASettings()), model, file_path)
