"""The functions of a finetuning script of 0.5, over the one loop. Scripts import them from the module of a method."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.io import save_torch
from litgpt.data.base import DataModule
from litgpt.finetune import loop
from litgpt.finetune.method import Method
from litgpt.finetune.settings import Settings
from litgpt.loggers import Meter
from litgpt.objective import NextToken
from litgpt.parser_config import remember_hyperparameters
from litgpt.preflight import check_writable
from litgpt.registry import get_objective, load_checkpoint_config
from litgpt.tokenizer import Tokenizer
from litgpt.training import get_lr, open_dataloaders, plain_name
from litgpt.validation import evaluate

if TYPE_CHECKING:
    import lightning as L

STATE = ("step_count", "iter_num", "total_tokens")


def run_main(
    command: Callable[..., Any], method: Method, fabric: "L.Fabric", checkpoint_dir: Path, data: DataModule, **more: Any
) -> None:
    """One run on devices that are there already, with what `setup` would have chosen.

    Args:
        command: The `setup` of the method.
        method: What is trained.
        fabric: Launched.
        checkpoint_dir: A folder; the model's config is read there.
        data: What to train on.
        more: Further `Settings`.
    """
    remember_hyperparameters(command, {"checkpoint_dir": checkpoint_dir, "data": data, **more})
    settings = Settings(command=command, checkpoint_dir=Path(checkpoint_dir), **more)
    settings.check()
    check_writable(settings.out_dir)
    spec, config = load_checkpoint_config(checkpoint_dir)
    tokenizer = Tokenizer(checkpoint_dir)
    loop.run(fabric, method, spec, config, get_objective(spec.objective), data, settings, tokenizer)


def run_fit(
    command: Callable[..., Any],
    method: Method,
    fabric: "L.Fabric",
    state: Mapping[str, Any],
    scheduler: Any,
    val_dataloader: Iterable | None,
    data: DataModule,
    checkpoint_dir: Path,
    **more: Any,
) -> dict[str, int]:
    """The loop alone, over parts that the caller has made; returns the token counts.

    Args:
        command: The `setup` of the method.
        method: What is trained.
        fabric: Launched.
        state: `model` and `optimizer`, set up by `fabric`, `train_dataloader`, and counters where they are not 0.
        scheduler: Of torch; it steps after each optimizer step. None: what `train` says.
        val_dataloader: May be None.
        data: Has the prompt style and samples to show.
        checkpoint_dir: Where the tokenizer is.
        more: Further `Settings`.
    """
    remember_hyperparameters(command, {"checkpoint_dir": checkpoint_dir, "data": data, **more})
    settings = Settings(command=command, checkpoint_dir=Path(checkpoint_dir), **more)
    settings.check()
    check_writable(settings.out_dir)
    state = {**dict.fromkeys(STATE, 0), "run": {}, **state}
    run = loop.Run(
        fabric, method, settings, state["model"].config, NextToken(), data, Tokenizer(checkpoint_dir), state,
        val_dataloader, None, Meter(settings.train.max_time),
    )  # fmt: skip
    base_lrs = [group["lr"] for group in state["optimizer"].param_groups]
    loop.fit(run, base_lrs, None if scheduler is None else TorchSchedule(scheduler))
    counts = {name: state["run"].get(name, 0) for name in loop.COUNTS}
    return {
        "raw_tokens": counts["raw"],
        "raw_tokens_plus_prompt_template": counts["templated"],
        "raw_tokens_plus_prompt_template_and_padding": counts["padded"],
    }


def fit_of(command: Callable[..., Any], method: Method) -> Callable[..., dict[str, int]]:
    """The published `fit` of a method."""

    def fit(
        fabric: "L.Fabric",
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        train_dataloader: Iterable,
        val_dataloader: Iterable | None,
        devices: int,
        checkpoint_dir: Path,
        out_dir: Path,
        train: TrainArgs,
        eval: EvalArgs,
        data: DataModule,
        num_nodes: int = 1,
    ) -> dict[str, int]:
        """The loop alone, over parts that the caller has set up; returns the token counts."""
        parts = {"model": model, "optimizer": optimizer, "train_dataloader": train_dataloader}
        how = dict(out_dir=out_dir, train=train, eval=eval)
        return run_fit(command, method, fabric, parts, scheduler, val_dataloader, data, checkpoint_dir, **how)

    return fit


class TorchSchedule:
    """A scheduler of torch in the place of `LearningRate`."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.first = scheduler, True

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rate of `step`, which is the one after the step before; returns that of the first group."""
        if not self.first:
            self.scheduler.step()
        self.first = False
        return optimizer.param_groups[0]["lr"]


def get_lr_scheduler(optimizer: torch.optim.Optimizer, warmup_steps: int, max_steps: int) -> Any:
    """A scheduler of torch: linear warm-up, which may be 0 or too long for the run, then a cosine down to 0."""
    warmup_steps = warmup_steps if warmup_steps < max_steps else max_steps // 10
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: get_lr(1.0, step + 1, warmup_steps, max(max_steps, 1), 0.0)
    )


def get_dataloaders(fabric: "L.Fabric", data: DataModule, tokenizer: Tokenizer, train: TrainArgs) -> tuple[Any, Any]:
    """Loaders of training and validation data."""
    return open_dataloaders(fabric, data, tokenizer, train.micro_batch_size, train.max_seq_length)


def get_longest_seq_length(data: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Tokens of the longest example, and which one that is."""
    lengths = getattr(data, "lengths", None)
    lengths = [len(data[i]["input_ids"]) for i in range(len(data))] if lengths is None else [int(n) for n in lengths]
    longest = max(lengths)
    return longest, lengths.index(longest)


def validate(
    fabric: "L.Fabric", model: nn.Module, val_dataloader: Iterable, eval: EvalArgs, verbose: bool = True
) -> Tensor:
    """Mean loss per target over all devices; a scalar on the CPU."""
    if verbose:
        fabric.print("Validating ...", file=sys.stderr)
    metrics = evaluate(fabric, model, val_dataloader, eval.max_iters, NextToken(), 0)
    return torch.tensor(metrics.get("loss", math.nan))


def save_part(fabric: "L.Fabric", method: Method, model: nn.Module, file_path: Path) -> None:
    """Write the weights that the method saves into one file."""
    fabric.print(f"Saving {method.name} weights to {str(file_path)!r}")
    weights = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    if fabric.global_rank == 0:
        save_torch({"model": {name: x for name, x in weights.items() if method.is_saved(name)}}, file_path)
    fabric.barrier()
