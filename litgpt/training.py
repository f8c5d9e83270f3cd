"""What pretraining and finetuning share: batches, schedules, the guarded optimizer step, random state, signals."""

import contextlib
import inspect
import math
import os
import re
import signal
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader

from litgpt.args import TrainArgs
from litgpt.data.base import DataModule
from litgpt.parallel import is_sharded

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class NonFiniteError(ValueError):
    """The loss or a gradient became infinite or NaN; the optimizer step was not taken."""


class BatchStream:
    """Batches of a data loader without end, epoch after epoch, or the first `overfit` of them again and again.

    What a loader draws from torch's global generator when an epoch begins does not reach the training: a run resumed in
    the middle of an epoch sees the same dropout as one that went through.
    """

    _END = object()
    """Stands between two epochs."""

    def __init__(self, loader: Any, overfit: int | None = None, skip: int = 0) -> None:
        self.loader, self.overfit = loader, overfit
        self._epochs, self._batches = 0, self._cycle(skip) if overfit else self._read(skip)
        self.begun = 0
        """Number of the epoch that the last batch comes from, or begins in."""

    @property
    def epoch(self) -> int:
        """Number of the current epoch, from 0."""
        return getattr(self.loader, "epoch", self._epochs)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(batch for batch in self._batches if batch is not self._END)

    def take(self, n: int) -> list[Any]:
        """The next `n` batches, or those that are left of the epoch."""
        taken: list[Any] = []
        for batch in self._batches:
            if batch is not self._END:
                taken.append(batch)
            if len(taken) == n or (taken and batch is self._END):
                break
        return taken

    def _read(self, skip: int = 0) -> Iterator[Any]:
        for self._epochs in count():
            self.begun = self.epoch
            with torch.random.fork_rng(devices=[]):
                batches = iter(self.loader)
                batch = next(batches, None)
            if batch is None:
                raise ValueError("The training data gives no batch: it is empty, or shorter than one sample.")
            while batch is not None:
                if skip:
                    skip -= 1
                else:
                    yield batch
                batch = next(batches, None)
            yield self._END

    def _cycle(self, skip: int) -> Iterator[Any]:
        kept = list(islice((batch for batch in self._read() if batch is not self._END), self.overfit))
        for index in count(skip):
            yield kept[index % len(kept)]


class CycleIterator:
    """Goes through an iterable again and again; `epoch` counts how often it has come to the end."""

    def __init__(self, iterable: Iterable) -> None:
        self.iterable, self.epoch, self._iterator = iterable, 0, None

    def __iter__(self) -> "CycleIterator":
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.iterable)
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator, self.epoch = iter(self.iterable), self.epoch + 1
            return next(self._iterator)


def num_parameters(module: nn.Module, requires_grad: bool | None = None) -> int:
    """Number of parameters; only those with, or without, gradients if `requires_grad` says so."""
    return sum(p.numel() for p in module.parameters() if requires_grad is None or p.requires_grad == requires_grad)


def open_dataloaders(
    fabric: "Fabric", data: DataModule, tokenizer: Any | None, batch_size: int, max_seq_length: int | None, **more: Any
) -> tuple[Any, Any]:
    """Loaders of training and validation data; the second may be None. Rank 0 prepares, the others wait for it.

    `more` goes to `connect` as far as that takes it.
    """
    taken = inspect.signature(data.connect).parameters
    more = {name: value for name, value in more.items() if name in taken}
    data.connect(tokenizer=tokenizer, batch_size=batch_size, max_seq_length=max_seq_length, **more)
    with fabric.rank_zero_first():
        data.prepare_data()
        data.setup()
    loaders = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        if isinstance(loader, DataLoader) and not hasattr(loader, "state_dict"):
            loader = fabric.setup_dataloaders(loader, move_to_device=False)  # shares it among the devices
        loaders.append(loader)
    return tuple(loaders)


def split_examples(batch: Any) -> Sequence[Mapping[str, Any]]:
    """The examples in what a data loader yields: rows of a tensor, of a dict of tensors, or the list as it is."""
    if isinstance(batch, Tensor):
        return [{"input_ids": row} for row in batch]
    if isinstance(batch, Mapping):
        columns = {key: value for key, value in batch.items() if not isinstance(value, Mapping)}  # no token counts
        n = len(next(iter(columns.values())))
        return [{key: value[i] for key, value in columns.items()} for i in range(n)]
    return batch


def count_tokens(batch: Any, collated: Mapping[str, Any]) -> dict[str, int]:
    """Tokens of a batch: `raw`, `templated` (with the prompt's template) and `padded`.

    Args:
        batch: What the data loader yields; its `token_counts`, as the published modules give them, are believed.
        collated: What the objective made of it.
    """
    n_padded = sum(x.numel() for key, x in collated.items() if key.endswith("input_ids") and isinstance(x, Tensor))
    if isinstance(batch, Mapping) and (counts := batch.get("token_counts")):
        n_raw, n_templated = (int(counts[key].sum()) for key in ("raw", "raw_plus_prompt_template"))
        return {"raw": n_raw, "templated": n_templated, "padded": max(n_padded, n_templated)}
    n_raw = n_real = 0
    for example in split_examples(batch):
        if isinstance(counts := example.get("token_counts"), Mapping):
            n_raw, n_real = n_raw + int(counts["raw"]), n_real + int(counts["raw_plus_prompt_template"])
            continue
        ids = [value for key, value in example.items() if key.endswith("input_ids")]
        if isinstance(batch, Mapping) and len(ids) == 1 and "labels" in example:  # without the padding on the right
            is_real = ((ids[0] != 0) | (example["labels"] != -100)).nonzero()
            n = int(is_real[-1]) + 1 if len(is_real) else 0
        else:
            n = sum(value.numel() for value in ids)
        n_raw, n_real = n_raw + n, n_real + n
    return {"raw": n_raw, "templated": n_real, "padded": max(n_padded, n_real)}


def batch_seed(seed: int, rank: int, iter_num: int, split: str) -> int:
    """Seed of one micro batch's collator; torch's generator looks at 32 bits only, so they are well mixed."""
    return zlib.crc32(f"{seed}/{rank}/{iter_num}/{split}".encode())


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on `device`, on its way without a pause for the GPU's running work."""
    if device.type == "cpu":
        return dict(batch)
    is_cuda = device.type == "cuda"
    return {
        key: (value.pin_memory() if is_cuda and value.device.type == "cpu" else value).to(device, non_blocking=is_cuda)
        if isinstance(value, Tensor)
        else value
        for key, value in batch.items()
    }


def get_lr(learning_rate: float, it: int, warmup_iters: int, max_iters: int, min_lr: float) -> float:
    """Linear warm-up from 0, then a cosine down to `min_lr` at `max_iters`."""
    if it < warmup_iters:
        return learning_rate * it / warmup_iters
    if it >= max_iters:
        return min_lr
    share = (it - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * share)) * (learning_rate - min_lr)


@dataclass
class LearningRate:
    """Course of the learning rate over optimizer steps; each group of an optimizer follows it from its own base."""

    schedule: str
    """cosine; wsd: constant, then linear to `min_lr` in the last `decay_fraction` of the steps; or constant."""
    base_lrs: list[float]
    warmup_steps: int
    max_steps: int
    min_lr: float = 0.0
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        self.min_lr = min(self.min_lr, self.base_lrs[0])

    @classmethod
    def of(
        cls,
        optimizer: torch.optim.Optimizer,
        train: TrainArgs,
        max_steps: int,
        steps_per_epoch: int | None,
        base_lrs: list[float] | None = None,
    ) -> "LearningRate":
        """What `train` asks for; `base_lrs` where the optimizer's own rates come from a checkpoint."""
        base_lrs = base_lrs or [group["lr"] for group in optimizer.param_groups]
        warmup_steps = train.warmup_steps(max_steps, steps_per_epoch)
        return cls(train.lr_schedule, base_lrs, warmup_steps, max_steps, train.min_lr, train.decay_fraction)

    def at(self, step: int) -> float:
        """Learning rate of the first group in `step`, counted from 0. The first step has one above 0."""
        base, it = self.base_lrs[0], step + 1
        if it < self.warmup_steps or self.schedule == "cosine":
            return get_lr(base, it, self.warmup_steps, self.max_steps, self.min_lr)
        n_decay = min(round(self.max_steps * self.decay_fraction), self.max_steps - self.warmup_steps)
        left = max(self.max_steps - it, 0)
        if self.schedule == "constant" or left >= n_decay:
            return base
        return self.min_lr + (base - self.min_lr) * left / n_decay

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rate of every group for `step`; returns that of the first."""
        lr = self.at(step)
        for group, base in zip(optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr if base == self.base_lrs[0] else base * lr / self.base_lrs[0]
        return lr


@dataclass
class StepResult:
    """What one optimizer step reports; all numbers are over all micro batches and devices."""

    loss: float
    """Mean over the `n` terms."""
    n: int
    grad_norm: float
    """Norm of the gradient before clipping."""
    parts: dict[str, float] = field(default_factory=dict)
    """Means of the further entries of `Objective.loss`."""
    requests: tuple[bool, ...] = ()
    """Which of the requests any device has made."""


class WeightAverage:
    """Running mean of the trained weights (EMA), in float32 beside the model.

    Args:
        model: Those of its parameters that have a gradient are averaged.
        decay: Share of the mean that a step keeps; in the first steps less, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.n_steps = decay, 0
        self.parameters = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self.n_steps += 1
        decay = min(self.decay, (1 + self.n_steps) / (10 + self.n_steps))
        now = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.means.values()), now, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model has the mean weights."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._copy(self.means)
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """Means and number of steps."""
        return {"means": self.means, "n_steps": self.n_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of an object over the same parameters."""
        if state["means"].keys() != self.means.keys():
            raise ValueError("the checkpoint's mean weights (--ema_decay) are those of other parameters")
        self.n_steps = state["n_steps"]
        for name, mean in self.means.items():
            mean.copy_(state["means"][name])


def plain_name(name: str) -> str:
    """Name of a parameter without what wrappers of compiling, replicating and sharding put before it."""
    return re.sub(r"(_orig_mod|_fsdp_wrapped_module|_forward_module|^module)\.", "", name)


def finish_step(
    fabric: "Fabric",
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    outs: Sequence[Mapping[str, Tensor]],
    expected_n: float,
    max_norm: float | None,
    requests: Sequence[bool] = (),
) -> StepResult:
    """Normalise by the true number of terms, check, clip and take the optimizer step. Waits for the device once.

    Args:
        fabric: Reduces over devices.
        model: Its gradients are those of `loss / expected_n` per micro batch, averaged over devices times their number.
        optimizer: Takes the step.
        outs: What `Objective.loss` gave for each micro batch, detached.
        expected_n: Number of terms over all micro batches and devices that the backward passes divided by.
        max_norm: Longest gradient; None does not clip.
        requests: What this device asks for; all devices learn of it in the same step.

    Raises:
        NonFiniteError: Loss or gradient is not finite. Neither weights nor optimizer have changed.
    """
    names = [name for name in outs[0] if name != "n"]  # the loss is among them
    wide = wide_dtype(fabric.device)
    totals = torch.stack([torch.stack([out[name].detach() for out in outs]).to(wide).sum() for name in [*names, "n"]])
    asked = list(requests)
    if fabric.world_size > 1:
        asked = torch.tensor(requests, dtype=wide, device=fabric.device)
        totals, asked = fabric.all_reduce(torch.cat([totals, asked]), reduce_op="sum").split([len(totals), len(asked)])
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    is_scaled = fabric.strategy.precision.precision == "16-mixed"  # its scaler skips steps with infinite gradients
    if is_scaled or is_sharded(fabric):
        norm = fabric.clip_gradients(model, optimizer, max_norm=math.inf, error_if_nonfinite=False)
    else:
        norm = nn.utils.get_total_norm(grads)
    *totals, n, norm = torch.cat([totals, norm.to(totals).view(1)]).tolist()
    scale, means = expected_n / max(n, 1), {name: total / max(n, 1) for name, total in zip(names, totals)}
    loss, norm = means.pop("loss"), norm * scale
    if not math.isfinite(loss) or not (math.isfinite(norm) or is_scaled):
        raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
    if max_norm is not None and norm > max_norm:
        scale *= max_norm / (norm + 1e-6)
    if scale != 1.0:
        torch._foreach_mul_(grads, scale)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss, int(n), norm, means, tuple(bool(value > 0) for value in asked))


def wide_dtype(device: torch.device) -> torch.dtype:
    """The type to add up losses in: the widest that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def explain(
    error: NonFiniteError, state: Mapping[str, Any], outs: Sequence[Mapping[str, Tensor]], epoch: int, saved: list[Path]
) -> NonFiniteError:
    """Where the run became NaN or infinite, and what to do. `saved` are its checkpoints, oldest first."""
    first, last = state["iter_num"] - len(outs), state["iter_num"] - 1
    bad = [first + i for i, out in enumerate(outs) if not torch.isfinite(out["loss"])]
    where = f"in the loss of iter {', '.join(map(str, bad))}" if bad else "in the gradient, or on another device"
    advice = f"resume from {saved[-1].parent}" if saved else "start again"
    return NonFiniteError(
        f"{error} in step {state['step_count'] + 1} (iter {first} to {last}, epoch {epoch + 1}), {where}. The step was "
        f"not taken and nothing was saved: {advice} with a lower learning rate or --train.max_norm, or look at these "
        "batches."
    )


class Signals:
    """Turns signals into requests that the loop looks at after each step.

    SIGTERM and SIGINT: finish the step, save, exit with 128 + the signal's number. SIGUSR1: save and go on. A second
    SIGTERM or SIGINT exits at once. The handlers last as long as the `with` block.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._note) for number in (getattr(signal, n) for n in names)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.save = True
        elif self.stop is None:
            self.stop = number
        else:
            os._exit(128 + number)
