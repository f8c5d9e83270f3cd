"""What a run tells: its metrics as files, to an experiment tracker, on the terminal and as a plot."""

import csv
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from litgpt.checkpoint.atomic import atomic_file
from litgpt.constants import _SUPPORTED_LOGGERS
from litgpt.hardware import peak_memory_gb
from litgpt.types import LoggerChoice

if TYPE_CHECKING:
    from lightning.fabric import Fabric

COLUMNS = (
    "step", "iter", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "total_tokens", "tokens_per_second",
    "iter_time", "remaining_time", "val_loss", "val_ppl", "val_nats_per_byte",
)  # fmt: skip


class MetricsWriter:
    """Rows of metrics in `metrics.csv` and `metrics.jsonl`, numbers in full precision so that runs can be compared.

    Args:
        out_dir: Where the two files are.
        keep_until_step: Rows up to this step stay, later ones are cut: those of a resumed run that its checkpoint does
            not know. None starts anew.
    """

    def __init__(self, out_dir: Path, keep_until_step: int | None = None) -> None:
        self.csv_path, self.jsonl_path = Path(out_dir) / "metrics.csv", Path(out_dir) / "metrics.jsonl"
        rows = read_metrics(self.jsonl_path) if keep_until_step is not None else []
        rows = [row for row in rows if row.get("step", 0) <= keep_until_step]
        self.columns = list(COLUMNS)
        with atomic_file(self.jsonl_path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self._rewrite_csv(rows)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; None is left out, a new name becomes a new column."""
        row = {key: value for key, value in row.items() if value is not None}
        with open(self.jsonl_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row.keys() <= set(self.columns):
            with open(self.csv_path, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self._rewrite_csv(read_metrics(self.jsonl_path))

    def _rewrite_csv(self, rows: list[Mapping[str, Any]]) -> None:
        self.columns += dict.fromkeys(key for row in rows for key in row if key not in self.columns)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_file(self.csv_path) as file:
            file.write(text.getvalue().encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`; a last line that a kill cut off is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def choose_logger(
    logger_name: LoggerChoice,
    out_dir: Path,
    name: str,
    log_interval: int = 1,
    log_args: dict | None = None,
    resume: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The experiment tracker of that name.

    Args:
        logger_name: csv, tensorboard, wandb, mlflow or litlogger.
        out_dir: csv and tensorboard write below its `logs`.
        name: Name of the experiment, where `log_args` gives none.
        log_interval: Steps after which csv writes to the disk.
        log_args: Fields of `LogArgs`.
        resume: Whether wandb goes on with a run.
        kwargs: Handed on to the logger.

    Raises:
        ValueError: Another name.
        ModuleNotFoundError: The tracker's package is not installed.
    """
    args = log_args or {}
    if logger_name == "csv":
        from lightning.fabric.loggers import CSVLogger

        return CSVLogger(root_dir=Path(out_dir) / "logs", name="csv", flush_logs_every_n_steps=log_interval, **kwargs)
    if logger_name == "tensorboard":
        from lightning.fabric.loggers import TensorBoardLogger

        return TensorBoardLogger(root_dir=Path(out_dir) / "logs", name="tensorboard", **kwargs)
    if logger_name == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        run, group = args.get("run") or os.environ.get("WANDB_RUN_NAME"), args.get("group")
        group = group or os.environ.get("WANDB_RUN_GROUP")
        return WandbLogger(project=args.get("project") or name, name=run, group=group, resume=resume, **kwargs)
    if logger_name == "mlflow":
        from lightning.pytorch.loggers import MLFlowLogger

        return MLFlowLogger(experiment_name=name, **kwargs)
    if logger_name == "litlogger":
        from lightning.pytorch.loggers import LitLogger

        known = ("teamspace", "metadata", "log_model", "save_logs", "checkpoint_name")
        own = {key: args[key] for key in known if args.get(key) is not None}
        return LitLogger(root_dir=Path(out_dir), name=args.get("project") or name, **own, **kwargs)
    raise ValueError(f"--logger_name is {logger_name!r}: choose one of {', '.join(_SUPPORTED_LOGGERS)}.")


class Progress:
    """A bar on a terminal, with the remaining time; elsewhere a line every few seconds. Writes to stderr.

    Args:
        n_steps: Steps of the whole run.
        first_step: Steps done already.
        is_shown: False on all devices but the first.
        seconds: Shortest time between two lines where there is no terminal.
    """

    def __init__(self, n_steps: int, first_step: int = 0, is_shown: bool = True, seconds: float = 10.0) -> None:
        self.n_steps, self.is_shown, self.seconds = n_steps, is_shown, seconds
        self.bar, self._printed = None, -float("inf")
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=n_steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stderr)

    def step(self, text: str) -> None:
        """One step is done; `text` says how it went."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def line(self, row: Mapping[str, Any], is_last: bool = False) -> None:
        """Print a logged row, where there is no bar and the last one is long enough ago."""
        now = time.monotonic()
        if self.is_shown and self.bar is None and (is_last or "val_loss" in row or now - self._printed >= self.seconds):
            self._printed = now
            print(format_row(row), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.is_shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.close()


def format_row(row: Mapping[str, Any]) -> str:
    """A row of metrics as one line for people."""
    val = f"{row['val_loss']:.3f}" if row.get("val_loss") is not None else "n/a"
    parts = [
        f"Epoch {row['epoch']}",
        f"iter {row['iter']} step {row['step']}",
        f"loss train: {row['loss']:.3f}, val: {val}",
        f"iter time: {row['iter_time'] * 1000:.2f} ms",
        f"{row['tokens_per_second']:,.0f} tok/s",
        f"remaining time: {timedelta(seconds=round(row['remaining_time']))}",
    ]
    if row.get("val_nats_per_byte") is not None:
        parts[2] += f" ({row['val_nats_per_byte']:.3f} nats/byte)"
    return " | ".join(parts)


def plot_curves(rows: Iterable[Mapping[str, Any]], path: Path, title: str = "") -> bool:
    """Draw training and validation loss over the steps into a PNG. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = list(rows)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", {"lw": 1}), ("val_loss", "validation", {"marker": "o", "ms": 3})):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points), label=f"{label} (last {points[-1][1]:.3f})", **style)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


class Meter:
    """Speed of a run. Validation and saving do not count, and neither does the first step, which may compile.

    Args:
        max_seconds: The run ends after so long, if not before.
        flops_per_token: Of one training token; with `peak_flops` gives the share of the chips' speed that is used.
        peak_flops: Of all devices together.
    """

    def __init__(
        self, max_seconds: float | None = None, flops_per_token: int | None = None, peak_flops: float | None = None
    ) -> None:
        self.max_seconds, self.flops_per_token, self.peak_flops = max_seconds, flops_per_token, peak_flops
        self.begin = self.step_begin = time.perf_counter()
        self.n_steps = self.tokens = 0
        self.seconds = 0.0
        self._first = self._last = (0, 0, 0.0)

    def start_step(self) -> None:
        """A step begins."""
        self.step_begin = time.perf_counter()

    def end_step(self, tokens: int) -> None:
        """A step over `tokens` is done."""
        self.n_steps, self.tokens = self.n_steps + 1, self.tokens + tokens
        self.seconds += time.perf_counter() - self.step_begin
        if self.n_steps == 1:
            self._first = (self.n_steps, self.tokens, self.seconds)

    def is_time_up(self) -> bool:
        """Whether `max_seconds` have passed since the meter was made."""
        return self.max_seconds is not None and time.perf_counter() - self.begin >= self.max_seconds

    def tokens_per_second(self) -> float:
        """Over the whole run."""
        _, tokens, seconds = self._first if self.n_steps > 1 else (0, 0, 0.0)
        return (self.tokens - tokens) / max(self.seconds - seconds, 1e-9)

    def read(self, steps_left: int, n_accumulated: int = 1) -> dict[str, float | None]:
        """Figures for a row of metrics, over the steps since the last call."""
        (n_steps, tokens, seconds), self._last = self._last, (self.n_steps, self.tokens, self.seconds)
        step_seconds = (self.seconds - seconds) / max(self.n_steps - n_steps, 1)
        speed = (self.tokens - tokens) / max(self.seconds - seconds, 1e-9)
        remaining = step_seconds * steps_left
        if self.max_seconds is not None:
            remaining = min(remaining, max(self.max_seconds - (time.perf_counter() - self.begin), 0.0))
        known = self.flops_per_token is not None and self.peak_flops is not None
        return {
            "tokens_per_second": speed,
            "iter_time": step_seconds / n_accumulated,
            "remaining_time": remaining,
            "mfu": speed * self.flops_per_token / self.peak_flops if known else None,
        }


def log_row(
    fabric: "Fabric", row: dict[str, Any], metrics: MetricsWriter | None, progress: Progress, is_last: bool
) -> None:
    """Write a row of metrics everywhere: files and terminal on the first device, tracker where there is one."""
    row["memory_gb"] = peak_memory_gb(fabric.device)
    if metrics is not None:
        metrics.write(row)
        progress.line(row, is_last)
    fabric.log_dict({name: value for name, value in row.items() if value is not None}, step=row["iter"] - 1)


def report(
    meter: Meter,
    device: torch.device,
    out_dir: Path,
    plot: bool,
    title: str,
    counts: Mapping[str, int] | None = None,
    next_command: str | None = None,
) -> None:
    """What the run has come to, and what to type next; `counts` are those of finetuning, see `count_tokens`."""
    rows = read_metrics(out_dir / "metrics.jsonl")
    last_val = next((row for row in reversed(rows) if "val_loss" in row), {})
    lines = [f"Trained on {meter.tokens:,} tokens in {meter.seconds:,.1f} s, {meter.tokens_per_second():,.0f} tokens/s"]
    if counts:
        lines.append(
            f"Tokens of the data {counts['raw']:,}, with the prompt's template {counts['templated']:,}, with padding "
            f"{counts['padded']:,}"
        )
    if last_val:
        nats = f", {last_val['val_nats_per_byte']:.3f} nats per byte" if "val_nats_per_byte" in last_val else ""
        lines.append(f"Validation loss {last_val['val_loss']:.3f}{nats} (step {last_val['step']})")
    if device.type == "cuda":
        lines.append(f"Memory used: {peak_memory_gb(device):.2f} GB")
    if plot and rows:
        drawn = plot_curves(rows, out_dir / "loss.png", title)
        lines.append(
            f"Loss curves: {out_dir / 'loss.png'}" if drawn else "Loss curves need `pip install litgpt[plot]`."
        )
    lines.append(f"Checkpoint: {out_dir / 'final'}")
    prompt = "What food do llamas eat?" if counts else "Once upon a time"
    default = f"litgpt generate {out_dir / 'final'}"
    lines.append(f'Next: {next_command or default} --prompt "{prompt}"')
    print("\n".join(lines))
