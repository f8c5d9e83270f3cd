"""Everything that one finetuning run was asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data.base import DataModule
from litgpt.quantize import check_mode

TRAIN = TrainArgs(
    save_interval=1000, log_interval=1, global_batch_size=16, micro_batch_size=1, lr_warmup_steps=100, epochs=5
)
"""The published defaults of `--train.*`, for all methods."""
Quantize = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training"]
"""How frozen weights may be kept."""
EVAL = EvalArgs(interval=100, max_new_tokens=100, max_iters=100)
"""The published defaults of `--eval.*`, for all methods but full."""


@dataclass
class Settings:
    """What the commands have flags for; `setup` of each method explains them."""

    command: Callable[..., Any]
    """The `setup` whose flags these are; its settings go into hyperparameters.yaml."""
    checkpoint_dir: Path
    out_dir: Path
    train: TrainArgs = field(default_factory=lambda: TRAIN)
    eval: EvalArgs = field(default_factory=lambda: EVAL)
    log: LogArgs = field(default_factory=LogArgs)
    optimizer: str | dict = "AdamW"
    precision: str | None = None
    quantize: str | None = None
    devices: int | str = 1
    num_nodes: int = 1
    resume: bool | Literal["auto"] | Path = False
    data: DataModule | None = None
    logger_name: str = "csv"
    seed: int = 1337
    access_token: str | None = None
    compile: bool = False
    activation_checkpointing: bool = False
    ema_decay: float | None = None
    early_stopping_patience: int | None = None
    keep_best: bool = False
    plot: bool = True

    def check(self) -> None:
        """Raise a ValueError that lists each setting that cannot be honoured."""
        validate_args(self.train, self.eval)
        issues = []
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            issues.append(f"--ema_decay is {self.ema_decay}: it must be between 0 and 1")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            issues.append(f"--early_stopping_patience is {self.early_stopping_patience}: it must be 1 or more")
        if issues:
            raise ValueError("; ".join(issues))
        if self.quantize is not None:
            check_mode(self.quantize, self.precision, is_training=True)


def validate_args(train: TrainArgs, eval: EvalArgs) -> None:
    """Raise a ValueError that lists each setting that finetuning cannot honour."""
    issues = [
        f"--train.{name} is not used in finetuning"
        for name in ("max_tokens", "tie_embeddings")
        if getattr(train, name) not in (None, False)
    ]
    if train.epochs is None and train.max_steps is None:
        issues.append("--train.epochs or --train.max_steps is required")
    if issues:
        raise ValueError("; ".join(issues))
