"""Pretraining, to be read from top to bottom.

setup    decides and checks what was asked for, before anything expensive starts
main     the acts of a run, on every device: folders, model, data, state, loop, report
fit      the loop: one pass is one optimizer step
"""

import math
import signal
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn as nn

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.checkpoint.atomic import remove_leftovers
from litgpt.checkpoint.folders import WEIGHTS_NAME, extend_checkpoint_dir, find_resume_path, step_files
from litgpt.checkpoint.io import check_crc
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.hardware import device_peak_flops, get_default_supported_precision, parse_devices
from litgpt.loggers import Meter, MetricsWriter, Progress, log_row, report
from litgpt.objective import NextToken, Objective
from litgpt.optimizers import build_optimizer, read_optimizer
from litgpt.parallel import build_strategy
from litgpt.parser_config import capture_hparams, remember_hyperparameters
from litgpt.preflight import (
    check_fit,
    check_writable,
    choose_data,
    choose_model,
    init_out_dir,
    open_tokenizer,
    open_tracker,
)
from litgpt.prompts import Default, save_prompt_style
from litgpt.registry import ModelSpec, get_model_spec, get_objective, model_names
from litgpt.run_state import load_model, restore_rng, resume_run, rotate_checkpoints, save_run
from litgpt.tokenizer import Tokenizer
from litgpt.training import (
    BatchStream,
    LearningRate,
    NonFiniteError,
    Signals,
    batch_seed,
    explain,
    finish_step,
    get_lr,
    open_dataloaders,
    split_examples,
    to_device,
)
from litgpt.types import LoggerChoice
from litgpt.validation import evaluate, measure

if TYPE_CHECKING:
    import lightning as L

__all__ = ["fit", "get_dataloaders", "get_lr", "initialize_weights", "main", "save_checkpoint", "setup", "validate"]


def setup(
    model_name: str | None = None,
    model_config: Config | dict | None = None,
    out_dir: Path = Path("out/pretrain"),
    precision: Literal["bf16-true", "bf16-mixed", "32-true", None] = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(
        save_interval=1000,
        log_interval=1,
        global_batch_size=512,
        micro_batch_size=4,
        max_tokens=int(3e12),
        max_norm=1.0,
        min_lr=4e-5,
        lr_warmup_steps=2000,
        tie_embeddings=False,
    ),
    eval: EvalArgs = EvalArgs(interval=1000, max_iters=100),
    log: LogArgs = LogArgs(),
    optimizer: str | dict = "AdamW",
    devices: int | str = "auto",
    num_nodes: int = 1,
    tokenizer_dir: Path | None = None,
    logger_name: LoggerChoice = "tensorboard",
    seed: int = 42,
    compile: bool | Literal["auto"] = "auto",
    objective: str | None = None,
    overfit: int | None = None,
    plot: bool = True,
) -> None:
    """Pretrain a model from scratch, or go on training one.

    SIGTERM and Ctrl-C finish the step, save a checkpoint and exit with 143 and 130; SIGUSR1 saves and goes on.

    Arguments:
        model_name: Name of the model, as `litgpt pretrain list` shows them, or `my-model/size` with `--extend`.
        model_config: Single fields of the model's config, as `--model_config.n_layer 4`; without a model name they
            change the defaults of the config class.
        out_dir: Where to write checkpoints (`step-00000100/`, `final/`), metrics.csv, metrics.jsonl, loss.png and logs.
        precision: Precision of the training; by default bf16-mixed, or 16-mixed on GPUs without bf16.
        initial_checkpoint_dir: Folder with weights to start from, for continued pretraining. Not with `resume`.
        resume: Whether to go on with a run: `true` takes the newest checkpoint in `out_dir`, `auto` does so if there is
            one, a path names a checkpoint's folder or file.
        data: Where the training data comes from.
        train: Batch sizes, length, learning rate and checkpoints of the training.
        eval: When and how to validate.
        log: How an experiment tracker files the run.
        optimizer: Name of an optimizer (AdamW, Muon, another one of torch.optim, or a class path), or a map of
            `class_path` and `init_args`.
        devices: How many GPUs, or processes on a CPU, to use; `auto` uses all GPUs.
        num_nodes: How many machines take part.
        tokenizer_dir: Folder with the tokenizer for data that is text; copied into the checkpoints.
        logger_name: Experiment tracker, beside the metrics files that are always written.
        seed: Seed of the weights, of dropout and of the objective.
        compile: Whether to compile the model; `auto` does so on GPUs.
        objective: What to train: the name of a registered objective; by default that of the model.
        overfit: Train on this many micro batches again and again, to see whether a model can learn at all.
        plot: Whether to draw the loss curves at the end.
    """
    if model_name == "list":
        print("\n".join(sorted(model_names(), key=str.lower)))
        return
    remember_hyperparameters(setup, locals())
    hparams = capture_hparams()
    validate_args(train, eval, initial_checkpoint_dir, resume, overfit)
    tokenizer_dir = tokenizer_dir and extend_checkpoint_dir(tokenizer_dir)
    initial_checkpoint_dir = initial_checkpoint_dir and extend_checkpoint_dir(initial_checkpoint_dir)
    tokenizer = open_tokenizer(tokenizer_dir)
    spec, config = choose_model(model_name, model_config, train, tokenizer)
    check_fit(config, train, tokenizer)
    data = choose_data(data, tokenizer)
    chosen_objective = get_objective(objective or spec.objective)
    read_optimizer(optimizer)
    n_devices = parse_devices(devices)
    train.gradient_accumulation_iters(n_devices, num_nodes)
    out_dir = init_out_dir(Path(out_dir))
    check_writable(out_dir)

    import lightning as L  # takes seconds, and `litgpt pretrain --help` does not need it

    tracker = open_tracker(logger_name, out_dir, f"pretrain-{config.name}", train, log, bool(resume))
    fabric = L.Fabric(
        devices=n_devices,
        num_nodes=num_nodes,
        strategy=build_strategy(n_devices, num_nodes, spec.model),
        precision=precision or get_default_supported_precision(training=True),
        loggers=tracker,
    )
    fabric.launch()
    if tracker is not None and logger_name in ("tensorboard", "wandb", "mlflow"):
        fabric.logger.log_hyperparams(hparams)
    main(
        fabric, n_devices, seed, initial_checkpoint_dir, resume, config, data, out_dir, tokenizer_dir, tokenizer, train,
        eval, optimizer, num_nodes, spec=spec, objective=chosen_objective, overfit=overfit, plot=plot,
        compile=fabric.device.type == "cuda" if compile == "auto" else compile,
    )  # fmt: skip


def main(
    fabric: "L.Fabric",
    devices: int,
    seed: int,
    initial_checkpoint_dir: Path | None,
    resume: bool | Literal["auto"] | Path,
    config: Config,
    data: DataModule,
    out_dir: Path,
    tokenizer_dir: Path | None,
    tokenizer: Tokenizer | None,
    train: TrainArgs,
    eval: EvalArgs,
    optimizer: str | dict,
    num_nodes: int = 1,
    *,
    spec: ModelSpec | None = None,
    objective: Objective | None = None,
    compile: bool = False,
    overfit: int | None = None,
    plot: bool = False,
) -> None:
    """One run, on every device: model, data, state, loop, report."""
    spec, objective = spec or get_model_spec(config.model_type), objective or NextToken()

    # Act 1: where from, where to
    if fabric.global_rank == 0:
        remove_leftovers(out_dir)
    fabric.barrier()
    resume_path = find_resume_path(resume, out_dir)
    if resume_path is not None:
        check_crc(resume_path)
    elif fabric.global_rank == 0 and step_files(out_dir):
        warnings.warn(f"{out_dir} has checkpoints of an earlier run; --resume may mix them up.", stacklevel=1)

    # Act 2: the model and its optimizer
    fabric.seed_everything(seed, verbose=False)
    model = load_model(fabric, spec, config, resume_path or initial_checkpoint_dir)
    max_seq_length, size = train.max_seq_length or config.block_size, None
    if hasattr(model, "max_seq_length"):
        model.max_seq_length = max_seq_length
    if hasattr(model, "get_nparams_and_flops"):
        size = model.get_nparams_and_flops(max_seq_length)
    n_parameters = sum(p.numel() for p in model.parameters())
    fabric.print(f"{config.name or spec.name}: {n_parameters:,} parameters, {max_seq_length:,} tokens of context")
    model = fabric.setup(torch.compile(model) if compile else model)
    optimizer = fabric.setup_optimizers(build_optimizer(optimizer, model))
    base_lrs = [group["lr"] for group in optimizer.param_groups]

    # Act 3: the data
    train_dataloader, val_dataloader = get_dataloaders(fabric, data, tokenizer, train, max_seq_length)

    # Act 4: the state of the run, which is what a checkpoint holds
    state = {"model": model, "optimizer": optimizer, "train_dataloader": train_dataloader}
    state |= {"iter_num": 0, "step_count": 0, "total_tokens": 0, "run": {"is_new": initial_checkpoint_dir is None}}
    fabric.seed_everything(seed + fabric.global_rank, verbose=False)  # dropout is to differ between devices
    if resume_path is not None:
        resume_run(fabric, resume_path, state, train, overfit)
    elif val_dataloader is not None:
        n_batches = eval.max_iters if eval.initial_validation else 2  # two show that validation works at all
        loss = validate(fabric, model, val_dataloader, n_batches, eval.initial_validation, objective=objective)
        if eval.initial_validation:
            fabric.print(f"Validation loss before training: {loss.item():.3f}")

    # Act 5: the loop
    peak = device_peak_flops(fabric.device, str(fabric.strategy.precision.precision))
    meter = Meter(train.max_time, size and size.flops_per_token, peak and peak * fabric.world_size)
    fit(
        fabric, devices, state, train_dataloader, val_dataloader, out_dir, tokenizer_dir, train, eval, num_nodes,
        objective=objective, base_lrs=base_lrs, seed=seed, overfit=overfit, data=data, meter=meter,
    )  # fmt: skip

    # Act 6: the end
    save_checkpoint(fabric, state, tokenizer_dir, out_dir / "final" / WEIGHTS_NAME)
    if fabric.global_rank == 0:
        report(meter, fabric.device, out_dir, plot, title=config.name)


def fit(
    fabric: "L.Fabric",
    devices: int,
    state: dict[str, Any],
    train_dataloader: Iterable,
    val_dataloader: Iterable | None,
    out_dir: Path,
    tokenizer_dir: Path | None,
    train: TrainArgs,
    eval: EvalArgs,
    num_nodes: int = 1,
    *,
    objective: Objective | None = None,
    base_lrs: list[float] | None = None,
    seed: int = 42,
    overfit: int | None = None,
    data: DataModule | None = None,
    meter: Meter | None = None,
) -> None:
    """Take optimizer steps until the run is over, keeping `state` up to date."""
    model, objective, meter = state["model"], objective or NextToken(), meter or Meter(train.max_time)
    n_accumulated = train.gradient_accumulation_iters(devices, num_nodes)
    tokens_per_iter = train.micro_batch_size * (train.max_seq_length or model.config.block_size)
    tokens_per_step = tokens_per_iter * n_accumulated * fabric.world_size
    max_steps = min(max(1, train.max_tokens // tokens_per_step), train.max_steps or sys.maxsize)
    steps_per_epoch = len(train_dataloader) // n_accumulated if hasattr(train_dataloader, "__len__") else None
    schedule = LearningRate.of(state["optimizer"], train, max_steps, steps_per_epoch, base_lrs)
    stream = BatchStream(train_dataloader, overfit, state.pop("skip", 0))
    is_first_rank = fabric.global_rank == 0
    metrics = MetricsWriter(out_dir, state["step_count"] or None) if is_first_rank else None
    progress = Progress(max_steps, state["step_count"], is_first_rank)
    if "rng" in state:
        restore_rng(fabric, state.pop("rng"))

    with Signals() as signals:
        while state["step_count"] < max_steps:
            meter.start_step()
            learning_rate = schedule.apply(state["optimizer"], state["step_count"])
            outs = accumulate(fabric, state, objective, stream, n_accumulated, tokens_per_step, seed)
            requests = (signals.stop is not None, signals.save, meter.is_time_up())
            try:
                result = finish_step(fabric, model, state["optimizer"], outs, tokens_per_step, train.max_norm, requests)
            except NonFiniteError as error:
                raise explain(error, state, outs, stream.epoch, step_files(out_dir)) from None
            wants_stop, wants_save, is_time_up = result.requests
            state["step_count"], state["total_tokens"] = (
                state["step_count"] + 1,
                state["total_tokens"] + tokens_per_step,
            )
            meter.end_step(tokens_per_step)

            step, is_last = state["step_count"], is_time_up or state["step_count"] == max_steps
            progress.step(f"loss {result.loss:.3f}, {meter.tokens_per_second():,.0f} tok/s")
            is_due = eval.final_validation if is_last else step % eval.interval == 0
            val = {}
            if val_dataloader is not None and is_due and not wants_stop:
                val = measure(fabric, model, val_dataloader, eval.max_iters, objective, seed, data)
            if is_last or val or step % train.log_interval == 0:
                row = {"step": step, "iter": state["iter_num"], "epoch": stream.epoch + 1, "loss": result.loss}
                row |= {"learning_rate": learning_rate, "grad_norm": result.grad_norm, **result.parts}
                row |= {"tokens": state["iter_num"] * tokens_per_iter, "total_tokens": state["total_tokens"], **val}
                row |= meter.read(max_steps - step, n_accumulated)
                log_row(fabric, row, metrics, progress, is_last)
            is_due = train.save_interval is not None and step % train.save_interval == 0
            if is_due or wants_stop or wants_save or is_time_up:
                signals.save = False
                save_checkpoint(fabric, state, tokenizer_dir, out_dir / f"step-{step:08d}" / WEIGHTS_NAME)
                rotate_checkpoints(fabric, out_dir, train.keep_checkpoints)
            if wants_stop:
                progress.note(f"Stopped after step {step} and saved it in {out_dir}; --resume true goes on from there.")
                progress.close()
                raise SystemExit(128 + (signals.stop or signal.SIGTERM))
            if is_time_up:
                break
    progress.close()


def accumulate(
    fabric: "L.Fabric",
    state: dict[str, Any],
    objective: Objective,
    stream: BatchStream,
    n_accumulated: int,
    expected_n: int,
    seed: int,
) -> list[dict[str, torch.Tensor]]:
    """Forward and backward of one step's micro batches; gradients are those of the summed loss / `expected_n`."""
    outs, rng, model = [], torch.Generator(), state["model"]
    for index in range(n_accumulated):
        rng.manual_seed(batch_seed(seed, fabric.global_rank, state["iter_num"], "train"))
        batch = to_device(objective.collate(split_examples(next(stream)), "train", rng), fabric.device)
        with fabric.no_backward_sync(model, enabled=index < n_accumulated - 1):
            out = objective.loss(model, batch)
            fabric.backward(out["loss"] * (fabric.world_size / expected_n))  # devices average their gradients
        outs.append({name: value.detach() for name, value in out.items()})
        state["iter_num"] += 1
    return outs


def validate(
    fabric: "L.Fabric",
    model: nn.Module,
    val_dataloader: Iterable,
    max_iters: int,
    verbose: bool = True,
    *,
    objective: Objective | None = None,
    seed: int = 42,
) -> torch.Tensor:
    """Mean loss per target over at most `max_iters` batches per device; a scalar on the CPU."""
    if verbose:
        fabric.print("Validating ...", file=sys.stderr)
    metrics = evaluate(fabric, model, val_dataloader, max_iters, objective or NextToken(), seed)
    return torch.tensor(metrics.get("loss", math.nan))


def get_dataloaders(
    fabric: "L.Fabric", data: DataModule, tokenizer: Tokenizer | None, train: TrainArgs, block_size: int
) -> tuple[Any, Any]:
    """Loaders of training and validation data; the second may be None. Rank 0 prepares, the others wait for it."""
    return open_dataloaders(fabric, data, tokenizer, train.micro_batch_size, block_size)


def initialize_weights(fabric: "L.Fabric", model: nn.Module, n_layer: int, n_embd: int) -> None:
    """Draw new weights; how is the model's business, which knows its `n_layer` and `n_embd`."""
    model.init_weights()


def save_checkpoint(
    fabric: "L.Fabric", state: dict[str, Any], tokenizer_dir: Path | None, checkpoint_file: Path
) -> None:
    """Write a checkpoint folder, which appears only when it is complete.

    A model trained from new weights continues text, whatever chat style the name of its config stands for.
    """
    is_new = state.get("run", {}).get("is_new")
    finish = partial(save_prompt_style, Default()) if is_new else None
    save_run(fabric, state, tokenizer_dir, checkpoint_file, command=setup, finish=finish)


def validate_args(
    train: TrainArgs,
    eval: EvalArgs,
    initial_checkpoint_dir: Path | None,
    resume: bool | Literal["auto"] | Path,
    overfit: int | None = None,
) -> None:
    """Raise ValueError that lists each setting that pretraining cannot honour."""
    issues = []
    for group, args, names in (("train", train, ["epochs"]), ("eval", eval, ["max_new_tokens"])):
        issues += [f"--{group}.{name} is not used in pretraining" for name in names if getattr(args, name) is not None]
    issues += [f"--train.{name} is required" for name in ("max_tokens", "max_norm") if getattr(train, name) is None]
    if initial_checkpoint_dir and resume:
        issues.append("--initial_checkpoint_dir and --resume exclude each other")
    if overfit is not None and overfit < 1:
        issues.append(f"--overfit is {overfit}: it must be 1 or more")
    if issues:
        raise ValueError("; ".join(issues))
