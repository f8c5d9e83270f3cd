"""The finetuning loop, for every method, model and objective.

run        the acts of a run, on every device: folders, model, data, state, loop, report
fit        the loop: one pass is one optimizer step
validate   measure, show an example, keep the best
"""

import contextlib
import math
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt.args import TrainArgs
from litgpt.checkpoint.atomic import remove_leftovers
from litgpt.checkpoint.folders import find_resume_path, step_files
from litgpt.checkpoint.io import check_crc
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.finetune.example import generate_example
from litgpt.finetune.loading import build_model
from litgpt.finetune.method import Method
from litgpt.finetune.settings import Settings
from litgpt.hardware import device_peak_flops
from litgpt.loggers import Meter, MetricsWriter, Progress, log_row, report
from litgpt.objective import Objective
from litgpt.optimizers import paged_adamw
from litgpt.parallel import checkpoint_blocks, is_sharded
from litgpt.prompts import PromptStyle, save_prompt_style
from litgpt.registry import ModelSpec
from litgpt.run_state import restore_rng, resume_run, rotate_checkpoints, save_run
from litgpt.tokenizer import Tokenizer
from litgpt.training import (
    BatchStream,
    LearningRate,
    NonFiniteError,
    Signals,
    StepResult,
    WeightAverage,
    batch_seed,
    count_tokens,
    explain,
    finish_step,
    num_parameters,
    open_dataloaders,
    split_examples,
    to_device,
)
from litgpt.validation import measure

if TYPE_CHECKING:
    import lightning as L

EXPECTED_TARGETS = 128
"""Targets a sample that gradients are scaled by until the step's true number is known; keeps 16-bit ones in range."""

COUNTS = ("raw", "templated", "padded")
"""What `count_tokens` counts."""


@dataclass
class Run:
    """The parts of a run that the loop works with."""

    fabric: "L.Fabric"
    method: Method
    settings: Settings
    config: Config
    objective: Objective
    data: DataModule
    tokenizer: Tokenizer | None
    state: dict[str, Any]
    """What a checkpoint holds; see `save_run`. Under `run`: token counts, best validation, mean weights."""
    val_dataloader: Any | None
    average: WeightAverage | None
    meter: Meter


def run(
    fabric: "L.Fabric",
    method: Method,
    spec: ModelSpec,
    config: Config,
    objective: Objective,
    data: DataModule,
    settings: Settings,
    tokenizer: Tokenizer | None = None,
) -> Run:
    """One run, on every device: folders, model, data, state, loop, report."""
    train, out_dir = settings.train, settings.out_dir

    # Act 1: where from, where to
    if settings.ema_decay and is_sharded(fabric):
        raise ValueError("--ema_decay does not work with weights that are sharded over GPUs: leave it out.")
    resume_path = open_folder(fabric, method, settings)

    # Act 2: the model, what the method adds to it, and the optimizer
    fabric.seed_everything(settings.seed, verbose=False)
    model = build_model(fabric, method, spec, config, settings, resume_path)
    context, size = shortest(train.max_seq_length, getattr(config, "block_size", None)), None
    if context is not None and hasattr(model, "max_seq_length"):
        model.max_seq_length = context
    if hasattr(model, "get_nparams_and_flops"):
        size = model.get_nparams_and_flops(context)
    n_trained, n_frozen = num_parameters(model, requires_grad=True), num_parameters(model, requires_grad=False)
    fabric.print(f"{method.name}: {n_trained:,} parameters are trained, {n_frozen:,} frozen")
    if settings.activation_checkpointing:
        checkpoint_blocks(model)
    model = fabric.setup(torch.compile(model) if settings.compile else model)
    chosen = settings.optimizer
    if settings.quantize is not None and fabric.device.type == "cuda":
        chosen = paged_adamw(chosen)
    optimizer = fabric.setup_optimizers(method.build_optimizer(chosen, model))
    base_lrs = [group["lr"] for group in optimizer.param_groups]

    # Act 3: the data
    train_dataloader, val_dataloader = open_dataloaders(
        fabric, data, tokenizer, train.micro_batch_size, context, vocab_size=getattr(config, "padded_vocab_size", None)
    )
    if val_dataloader is not None and hasattr(val_dataloader, "__len__") and not len(val_dataloader):
        warnings.warn("There is no validation data: the run is not validated.", stacklevel=1)
        val_dataloader = None

    # Act 4: the state of the run, which is what a checkpoint holds
    state = {"model": model, "optimizer": optimizer, "train_dataloader": train_dataloader}
    state |= {"iter_num": 0, "step_count": 0, "total_tokens": 0, "run": {}}
    average = WeightAverage(model, settings.ema_decay) if settings.ema_decay else None
    peak = device_peak_flops(fabric.device, str(fabric.strategy.precision.precision))
    meter = Meter(train.max_time, size and size.flops_per_token, peak and peak * fabric.world_size)
    job = Run(fabric, method, settings, config, objective, data, tokenizer, state, val_dataloader, average, meter)
    fabric.seed_everything(settings.seed + fabric.global_rank, verbose=False)  # dropout differs between devices
    if resume_path is not None:
        resume(job, resume_path)
    elif val_dataloader is not None:
        n_batches = settings.eval.max_iters if settings.eval.initial_validation else 2  # two show that it works at all
        val = measure(fabric, model, val_dataloader, n_batches, objective, settings.seed, data)
        if settings.eval.initial_validation:
            fabric.print(f"Validation loss before training: {val.get('val_loss', math.nan):.3f}")

    # Act 5: the loop
    fit(job, base_lrs)

    # Act 6: the end
    save_weights(job, out_dir / "final")
    if fabric.global_rank == 0 and (out_dir / "best").is_dir():
        method.finish(out_dir / "best", settings.checkpoint_dir, config)
    if fabric.global_rank == 0:
        counts = {name: state["run"].get(name, 0) for name in COUNTS}
        hint = method.next_command(out_dir / "final", settings.checkpoint_dir)
        report(meter, fabric.device, out_dir, settings.plot, f"{config.name} {method.name}", counts, hint)
    return job


def fit(run: Run, base_lrs: list[float], schedule: Any | None = None) -> None:
    """Take optimizer steps until the run is over, keeping its state up to date; `schedule` replaces that of `train`."""
    fabric, state, train, meter = run.fabric, run.state, run.settings.train, run.meter
    n_accumulated = train.gradient_accumulation_iters(fabric.world_size)
    steps_per_epoch, max_steps = length_of(state["train_dataloader"], train, n_accumulated)
    schedule = schedule or LearningRate.of(state["optimizer"], train, max_steps, steps_per_epoch, base_lrs)
    stream = BatchStream(state["train_dataloader"], skip=state.pop("skip", 0))
    expected_n = train.global_batch_size * EXPECTED_TARGETS
    metrics = MetricsWriter(run.settings.out_dir, state["step_count"] or None) if fabric.global_rank == 0 else None
    progress = Progress(max_steps, state["step_count"], fabric.global_rank == 0)
    if "rng" in state:
        restore_rng(fabric, state.pop("rng"))
    if is_validation_due(run, state["step_count"] == max_steps):  # stopped between a step and its validation
        validate_step(run)

    with Signals() as signals:
        while state["step_count"] < max_steps and not is_stopped_early(run):
            meter.start_step()
            learning_rate, first_iter = schedule.apply(state["optimizer"], state["step_count"]), state["iter_num"]
            outs = accumulate(run, stream.take(n_accumulated), expected_n)
            requests = (signals.stop is not None, signals.save, meter.is_time_up())
            try:
                result = finish_step(
                    fabric, state["model"], state["optimizer"], outs, expected_n, train.max_norm, requests
                )
            except NonFiniteError as error:
                saved = step_files(run.settings.out_dir, run.method.weights_name)
                raise explain(error, state, outs, stream.begun, saved) from None
            wants_stop, wants_save, is_time_up = result.requests
            n_tokens = end_step(run, result)
            meter.end_step(n_tokens)

            step = state["step_count"]
            is_last = is_time_up or step == max_steps
            progress.step(f"loss {result.loss:.3f}, {meter.tokens_per_second():,.0f} tok/s")
            val = validate_step(run) if is_validation_due(run, is_last) and not wants_stop else {}
            is_last |= is_stopped_early(run)
            if is_last or val or state["iter_num"] // train.log_interval > first_iter // train.log_interval:
                row = {"step": step, "iter": state["iter_num"], "epoch": stream.begun + 1, "loss": result.loss}
                row |= {"learning_rate": learning_rate, "grad_norm": result.grad_norm, **result.parts}
                row |= {"tokens": n_tokens, "total_tokens": state["total_tokens"], **val}
                row |= meter.read(0 if is_last else max_steps - step, len(outs))
                log_row(fabric, row, metrics, progress, is_last)
            is_due = train.save_interval is not None and step % train.save_interval == 0
            if is_due or wants_stop or wants_save or is_time_up:
                signals.save = False
                save_step(run)
            if wants_stop:
                where = run.settings.out_dir
                progress.note(f"Stopped after step {step} and saved it in {where}; --resume true goes on from there.")
                progress.close()
                raise SystemExit(128 + (signals.stop or signal.SIGTERM))
            if is_time_up:
                break
    progress.close()


def accumulate(run: Run, batches: list[Any], expected_n: float) -> list[dict[str, Tensor]]:
    """Forward and backward of one step's micro batches; gradients are those of the summed loss / `expected_n`."""
    fabric, state, model, outs, rng = run.fabric, run.state, run.state["model"], [], torch.Generator()
    for index, raw in enumerate(batches):
        rng.manual_seed(batch_seed(run.settings.seed, fabric.global_rank, state["iter_num"], "train"))
        batch = run.objective.collate(split_examples(raw), "train", rng)
        counts = {name: torch.tensor(float(n)) for name, n in count_tokens(raw, batch).items()}
        batch = to_device(batch, fabric.device)
        with fabric.no_backward_sync(model, enabled=index < len(batches) - 1):
            out = run.objective.loss(model, batch)
            fabric.backward(out["loss"] * (fabric.world_size / expected_n))  # devices average their gradients
        outs.append({name: value.detach() for name, value in out.items()} | to_device(counts, fabric.device))
        state["iter_num"] += 1
    return outs


def end_step(run: Run, result: StepResult) -> int:
    """Keep the books of a step that was taken; returns its tokens without padding, over all devices."""
    state, counts = run.state, {name: round(result.parts.pop(name) * max(result.n, 1)) for name in COUNTS}
    state["step_count"] += 1
    state["total_tokens"] += counts["templated"]
    for name, n in counts.items():
        state["run"][name] = state["run"].get(name, 0) + n
    if run.average is not None:
        run.average.update()
    if not result.n:
        warnings.warn(
            "A step had no token to learn: all its labels are masked (look at --data.preview 3).", stacklevel=2
        )
    return counts["templated"]


def validate_step(run: Run) -> dict[str, float]:
    """Measure, show an example and keep the best weights; returns what it adds to the row of metrics."""
    settings, books = run.settings, run.state["run"]
    step, model = run.state["step_count"], run.state["model"]
    with averaged(run):
        val = measure(
            run.fabric, model, run.val_dataloader, settings.eval.max_iters, run.objective, settings.seed, run.data
        )
        if run.tokenizer is not None:
            generate_example(run.fabric, model, run.tokenizer, settings.eval, run.data, run.objective, seed=step)
    books["validated"] = step
    loss = val.get("val_loss", math.nan)
    if loss < books.get("best_loss", math.inf):
        books |= {"best_loss": loss, "best_step": step, "n_worse": 0}
        if settings.keep_best:
            save_weights(run, settings.out_dir / "best", is_final=False)
    else:
        books["n_worse"] = books.get("n_worse", 0) + 1
    return val


def is_validation_due(run: Run, is_last: bool) -> bool:
    """Whether the step just taken is to be validated and has not been."""
    step = run.state["step_count"]
    if run.val_dataloader is None or step == run.state["run"].get("validated", 0):
        return False
    return run.settings.eval.final_validation if is_last else step % run.settings.eval.interval == 0


def is_stopped_early(run: Run) -> bool:
    """Whether the validation loss has not fallen for as long as the user is patient."""
    patience = run.settings.early_stopping_patience
    return patience is not None and run.state["run"].get("n_worse", 0) >= patience


def length_of(loader: Any, train: TrainArgs, n_accumulated: int) -> tuple[int | None, int]:
    """Steps of an epoch, if that is known, and of the whole run; the last step of an epoch may be a smaller one."""
    steps_per_epoch = None
    with contextlib.suppress(TypeError):  # a stream has no length
        steps_per_epoch = math.ceil(len(loader) / n_accumulated)
    limits = [train.max_steps] if train.max_steps else []
    if train.epochs and (schedule := getattr(loader, "schedule", None)) is not None:  # batches may reach over its end
        each = schedule.batch_size * schedule.world
        ends = [math.ceil(epoch * schedule.n_samples / each) for epoch in range(train.epochs + 1)]
        limits.append(sum(math.ceil((end - start) / n_accumulated) for start, end in pairwise(ends)))
    elif train.epochs and steps_per_epoch is not None:
        limits.append(train.epochs * steps_per_epoch)
    if not limits:
        raise ValueError("The length of the data is not known: say --train.max_steps in place of --train.epochs.")
    if not min(limits):
        raise ValueError("The training data gives no batch: it is empty.")
    return steps_per_epoch, min(limits)


def shortest(*lengths: int | None) -> int | None:
    """The smallest of those that are known."""
    return min((length for length in lengths if length is not None), default=None)


# Folders


def open_folder(fabric: "L.Fabric", method: Method, settings: Settings) -> Path | None:
    """Clean up after dead runs, find what to resume from, and refuse to mix two runs in one folder."""
    out_dir = settings.out_dir
    if fabric.global_rank == 0:
        remove_leftovers(out_dir)
    fabric.barrier()
    resume_path = find_resume_path(settings.resume, out_dir, method.weights_name)
    if resume_path is not None:
        check_crc(resume_path)
    elif found := [path.name for path in sorted(out_dir.glob("step-*")) + sorted(out_dir.glob("best"))]:
        raise ValueError(
            f"--out_dir {out_dir} holds {found[-1]} of an earlier run: go on with it by --resume true, name another "
            "--out_dir, or remove these folders."
        )
    elif (out_dir / "final").exists():
        warnings.warn(f"{out_dir / 'final'} of an earlier run will be replaced when this one ends.", stacklevel=2)
    return resume_path


def resume(run: Run, path: Path) -> None:
    """Bring everything but the weights to where the checkpoint stood."""
    advice = f"give {path.parent} as CHECKPOINT_DIR to start from them"
    resume_run(run.fabric, path, run.state, run.settings.train, None, advice)
    average = run.state["run"].pop("average", None)
    if run.average is not None and average is not None:
        run.average.load_state_dict(average)
    elif run.average is not None:
        warnings.warn(f"{path} has no mean weights: --ema_decay starts anew.", stacklevel=2)


def save_step(run: Run) -> None:
    """Write all that a resumed run needs, and remove what is older than asked for."""
    state, name = run.state, run.method.weights_name
    step = state["step_count"]
    average = {} if run.average is None else {"average": run.average.state_dict()}
    saved = {**state, "scheduler": {"last_epoch": step}, "run": {**state["run"], **average}}
    file = run.settings.out_dir / f"step-{step:06d}" / name
    save(run, saved, file, finish=lambda folder: write_style(run.data, folder))
    rotate_checkpoints(run.fabric, run.settings.out_dir, run.settings.train.keep_checkpoints, name)


def save_weights(run: Run, folder: Path, is_final: bool = True) -> None:
    """Write weights alone; the final ones ready for use, such as merged, before the folder appears."""

    def finish(folder: Path) -> None:
        write_style(run.data, folder)
        if is_final:
            run.method.finish(folder, run.settings.checkpoint_dir, run.config)

    with averaged(run):
        save(run, run.state, folder / run.method.weights_name, weights_only=True, finish=finish)


def save(run: Run, state: Mapping[str, Any], file: Path, **how: Any) -> None:
    """Write a checkpoint folder with the part of the weights that the method changes."""
    is_saved = run.method.is_saved if run.method.is_partial else None
    save_run(run.fabric, state, run.settings.checkpoint_dir, file, run.settings.command, is_saved=is_saved, **how)


def write_style(data: DataModule, folder: Path) -> None:
    """Record the prompt style of the data, so that chat and generate use the same."""
    style = getattr(data, "prompt_style", None)
    if isinstance(style, (str, PromptStyle)):
        save_prompt_style(style, folder)


def averaged(run: Run) -> contextlib.AbstractContextManager:
    """Within, the model has the mean weights, where they are kept."""
    return contextlib.nullcontext() if run.average is None else run.average.applied()
