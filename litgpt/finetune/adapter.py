"""`litgpt finetune_adapter`: train adaption prompts of a frozen model."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from litgpt.adapter import adapter_filter, add_adapter, mark_only_adapter_as_trainable
from litgpt.args import EvalArgs, LogArgs, TrainArgs
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
from litgpt.types import LoggerChoice

if TYPE_CHECKING:
    import lightning as L

__all__ = [
    "Adapter", "fit", "generate_example", "get_dataloaders", "get_longest_seq_length", "get_lr_scheduler", "main",
    "save_adapter_checkpoint", "setup", "validate", "validate_args",
]  # fmt: skip


class Adapter(Method):
    """Adaption prompts (arXiv 2303.16199)."""

    name = "adapter"
    weights_name = "lit_model.pth.adapter"

    def prepare(self, model: nn.Module, config: Config) -> None:
        """Add the prompts."""
        add_adapter(model)

    def mark_trainable(self, model: nn.Module) -> None:
        """Train what was added."""
        mark_only_adapter_as_trainable(model)

    def is_saved(self, name: str) -> bool:
        """What is trained is saved."""
        return adapter_filter(name, None)

    def next_command(self, folder: Path, checkpoint_dir: Path) -> str:
        """The adapter's file goes on top of the model."""
        return f"litgpt generate_adapter {checkpoint_dir} --adapter_path {folder / self.weights_name}"


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter"),
    precision: str | None = None,
    quantize: Quantize | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
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
    plot: bool = True,
) -> None:
    """Finetune adaption prompts of a frozen model (LLaMA-Adapter).

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
        plot: Whether to draw the loss curves at the end.
    """
    launch(setup, Adapter(), locals())


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
) -> None:
    """One run on devices that `fabric` has launched, as scripts written for 0.5 call it."""
    how = dict(train=train, eval=eval, optimizer=optimizer, seed=seed)
    run_main(setup, Adapter(), fabric, checkpoint_dir, data, out_dir=out_dir, **how)


fit = fit_of(setup, Adapter())


def save_adapter_checkpoint(fabric: "L.Fabric", model: nn.Module, file_path: Path) -> None:
    """Write what this method trains into one file."""
    save_part(fabric, Adapter(), model, file_path)
