"""From the flags of a finetuning command to a run: all is chosen and checked before anything expensive starts."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from litgpt.checkpoint.hub import find_checkpoint
from litgpt.data.alpaca import Alpaca
from litgpt.finetune.loop import Run, run
from litgpt.finetune.method import Method
from litgpt.finetune.settings import Settings
from litgpt.hardware import get_default_supported_precision, parse_devices
from litgpt.objective import Objective
from litgpt.optimizers import read_optimizer
from litgpt.parallel import build_strategy
from litgpt.parser_config import plain, remember_hyperparameters
from litgpt.preflight import check_writable, init_out_dir, open_tracker
from litgpt.registry import get_objective, load_checkpoint_config
from litgpt.tokenizer import Tokenizer


def launch(
    command: Callable[..., Any],
    method: Method,
    values: Mapping[str, Any],
    objective: Objective | None = None,
    before: Callable[..., None] | None = None,
) -> Run:
    """Check what was asked for, start the devices, and run.

    Args:
        command: The `setup` that was called.
        method: What is trained.
        values: The arguments of `setup`, by name; those that are no `Settings` are the method's business.
        objective: What to train; None: the model's own.
        before: Called on every device before the run, with its fabric, model spec, config, data, settings, tokenizer.
    """
    remember_hyperparameters(command, values)
    known = {field.name for field in fields(Settings)} - {"command"}
    settings = Settings(command=command, **{name: value for name, value in values.items() if name in known})
    settings.check()
    read_optimizer(settings.optimizer)
    n_devices = parse_devices(settings.devices)
    settings.train.gradient_accumulation_iters(n_devices, settings.num_nodes)
    settings.checkpoint_dir = find_checkpoint(settings.checkpoint_dir, settings.access_token)
    spec, config = load_checkpoint_config(settings.checkpoint_dir)
    tokenizer = Tokenizer(settings.checkpoint_dir)
    objective = objective or get_objective(spec.objective)
    data = settings.data or Alpaca()  # as published
    settings.out_dir = init_out_dir(Path(settings.out_dir))
    check_writable(settings.out_dir)
    settings.precision = settings.precision or default_precision(settings)

    import lightning as L  # takes seconds, and `litgpt finetune --help` does not need it

    name = f"finetune-{method.name}-{config.name}"
    tracker = open_tracker(
        settings.logger_name, settings.out_dir, name, settings.train, settings.log, bool(settings.resume)
    )
    strategy = build_strategy(n_devices, settings.num_nodes, spec.model)
    if settings.quantize and strategy != "auto":
        strategy = "ddp"  # quantised weights cannot be sharded
    fabric = L.Fabric(
        devices=n_devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        precision=settings.precision,
        loggers=tracker,
    )
    fabric.launch()
    if tracker is not None and settings.logger_name in ("tensorboard", "wandb", "mlflow"):
        fabric.logger.log_hyperparams(plain(dict(values)))
    if before is not None:
        before(fabric, spec, config, data, settings, tokenizer)
    return run(fabric, method, spec, config, objective, data, settings, tokenizer)


def default_precision(settings: Settings) -> str:
    """Mixed precision, or that of the weights alone where they are quantised."""
    precision = get_default_supported_precision(training=True)
    return precision.replace("-mixed", "-true") if settings.quantize else precision
