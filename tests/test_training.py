import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from lightning.fabric import Fabric

import litgpt
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.objective import NextToken
from litgpt.training import (
    BatchStream,
    CycleIterator,
    LearningRate,
    NonFiniteError,
    Signals,
    batch_seed,
    explain,
    finish_step,
    get_lr,
    num_parameters,
    split_examples,
    to_device,
)

TINY = dict(n_layer=2, n_embd=32, n_head=4, block_size=16, vocab_size=60, padding_multiple=64)


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


# Batches


class Loader:
    """Counts its passes; draws from the global generator as torch's loaders do."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        torch.rand(3)
        return iter(self.batches)


def test_batches_go_on_epoch_after_epoch():
    stream = BatchStream(Loader(["a", "b", "c"]))
    assert [(next(stream), stream.epoch) for _ in range(7)] == [
        ("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("c", 1), ("a", 2)
    ]  # fmt: skip


def test_skipped_batches_may_reach_into_a_later_epoch():
    stream = BatchStream(Loader(["a", "b", "c"]), skip=4)
    assert (next(stream), stream.epoch) == ("b", 1)


def test_overfitting_reads_the_first_batches_once():
    loader = Loader(["a", "b", "c"])
    stream = BatchStream(loader, overfit=2)
    assert [next(stream) for _ in range(5)] == ["a", "b", "a", "b", "a"] and loader.passes == 1
    assert next(BatchStream(loader, overfit=2, skip=3)) == "b"


def test_loader_that_draws_random_numbers_does_not_disturb_the_training():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    next(BatchStream(Loader(["a"])))
    assert torch.equal(torch.rand(1), expected)


def test_empty_data_is_an_error_instead_of_an_endless_loop():
    with pytest.raises(ValueError, match="no batch"):
        next(BatchStream(Loader([])))


def test_epoch_of_a_loader_that_counts_itself_is_taken_from_it():
    loader = Loader(["a"])
    loader.epoch = 7
    assert BatchStream(loader).epoch == 7


def test_examples_are_the_rows_of_whatever_a_loader_yields():
    rows = torch.arange(6).view(2, 3)
    assert [e["input_ids"].tolist() for e in split_examples(rows)] == [[0, 1, 2], [3, 4, 5]]
    assert [e["x"].tolist() for e in split_examples({"x": rows, "y": [1, 2]})] == [[0, 1, 2], [3, 4, 5]]
    assert [e["y"] for e in split_examples({"x": rows, "y": [1, 2]})] == [1, 2]
    examples = [{"input_ids": rows[0]}]
    assert split_examples(examples) is examples


def test_every_micro_batch_rank_and_split_has_its_own_seed():
    seeds = {batch_seed(s, r, i, x) for s in range(5) for r in range(4) for i in range(100) for x in ("train", "eval")}
    assert len(seeds) == 4000 and batch_seed(1, 2, 3, "train") == batch_seed(1, 2, 3, "train")


def test_batch_on_the_cpu_is_not_copied():
    batch = {"input_ids": torch.zeros(2)}
    assert to_device(batch, torch.device("cpu"))["input_ids"] is batch["input_ids"]


# Learning rate


def test_cosine_falls_by_its_formula():
    for it, expected in [
        (0, 0.0),
        (5, 0.5),
        (10, 1.0),
        (15, 0.1 + 0.45 * (1 + math.cos(math.pi / 2))),
        (20, 0.1),
        (99, 0.1),
    ]:
        assert get_lr(1.0, it, 10, 20, 0.1) == pytest.approx(expected)
    assert get_lr(1.0, 0, 0, 10, 0.1) == 1.0


def rates(schedule, warmup_steps, max_steps, min_lr=0.0, **kwargs):
    course = LearningRate(schedule, [1.0], warmup_steps, max_steps, min_lr, **kwargs)
    return [course.at(step) for step in range(max_steps)]


def test_constant_schedule_stays_after_its_warmup():
    assert rates("constant", 4, 7) == [0.25, 0.5, 0.75, 1, 1, 1, 1]


def test_wsd_decays_linearly_in_its_last_share():
    assert rates("wsd", 2, 10, min_lr=0.2, decay_fraction=0.4) == pytest.approx([0.5, *[1] * 5, 0.8, 0.6, 0.4, 0.2])
    assert rates("wsd", 0, 4, decay_fraction=0.0) == [1, 1, 1, 1]
    assert rates("wsd", 2, 4, decay_fraction=1.0) == [0.5, 1, 0.5, 0]


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 9])
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_step_but_the_last_has_a_learning_rate_of_zero(schedule, warmup_steps):
    course = rates(schedule, warmup_steps, 10)
    assert all(0 < rate <= 1 for rate in course[:-1]) and max(course) == pytest.approx(1, rel=0.05)


def test_cosine_ends_at_the_minimum_and_never_rises_above_the_base():
    assert rates("cosine", 2, 10, min_lr=0.3)[-1] == pytest.approx(0.3)
    assert set(rates("cosine", 0, 5, min_lr=7.0)) == {1.0}


def test_every_group_follows_from_its_own_base():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.4, 0.1)])
    course = LearningRate.of(optimizer, TrainArgs(lr_warmup_steps=4, lr_schedule="constant"), 10, None)
    assert course.apply(optimizer, 0) == pytest.approx(0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.025])
    course.apply(optimizer, 9)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.1])


# The optimizer step


class Recorder(torch.optim.SGD):
    """Keeps the gradients that its step was given."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def take_step(fabric, idx, labels, sizes, expected_n=None, max_norm=None):
    """One step over micro batches of the given sizes; returns its result and the gradients it was taken with."""
    torch.manual_seed(0)
    model = GPT(Config(**TINY))
    model.init_weights()
    optimizer = Recorder(model.parameters(), lr=1.0)
    expected_n = expected_n or labels.numel()
    outs = []
    for idx_part, labels_part in zip(idx.split(sizes), labels.split(sizes), strict=True):
        out = NextToken().loss(model, {"input_ids": idx_part, "labels": labels_part})
        (out["loss"] / expected_n).backward()
        outs.append(out)
    result = finish_step(fabric, model, optimizer, outs, expected_n, max_norm)
    assert all(p.grad is None for p in model.parameters())
    return result, optimizer.gradients


@pytest.fixture
def uneven():
    """Eight rows with very different numbers of targets, one row without any."""
    rng = torch.Generator().manual_seed(0)
    idx, labels = torch.randint(60, (8, 12), generator=rng), torch.randint(60, (8, 12), generator=rng)
    for row, n in enumerate([12, 1, 0, 7, 12, 2, 3, 9]):
        labels[row, n:] = -100
    return idx, labels


@pytest.mark.parametrize("sizes", [[1] * 8, [2] * 4, [4, 4], [3, 1, 4]], ids=str)
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_any_split_of_a_global_batch_gives_the_same_loss_and_gradients(fabric, uneven, sizes, max_norm):
    expected, gradients = take_step(fabric, *uneven, [8], max_norm=max_norm)
    result, others = take_step(fabric, *uneven, sizes, max_norm=max_norm)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert result.n == 46
    largest = max(g.abs().max() for g in gradients)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6 * largest.item())


def test_gradients_are_those_of_the_mean_whatever_count_was_expected(fabric, uneven):
    torch.manual_seed(0)
    model = GPT(Config(**TINY))
    model.init_weights()
    loss, n = model(uneven[0], targets=uneven[1])
    gradients = torch.autograd.grad(loss / n, list(model.parameters()))
    for expected_n in (46, 96, 7):
        result, found = take_step(fabric, *uneven, [2] * 4, expected_n=expected_n)
        assert result.loss == pytest.approx((loss / n).item(), rel=1e-6)
        for gradient, other in zip(gradients, found, strict=True):
            torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-7)


def test_clipping_is_that_of_torch_and_reports_the_norm_before(fabric, uneven):
    free, gradients = take_step(fabric, *uneven, [8])
    total = torch.nn.utils.get_total_norm(gradients)
    assert free.grad_norm == pytest.approx(total.item(), rel=1e-5)
    clipped, gradients = take_step(fabric, *uneven, [8], max_norm=0.05)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.05, rel=1e-4)


def test_step_without_any_target_changes_nothing(fabric, uneven):
    result, found = take_step(fabric, uneven[0], torch.full_like(uneven[1], -100), [4, 4])
    assert (result.loss, result.n) == (0.0, 0) and all((gradient == 0).all() for gradient in found)


def test_parts_of_the_loss_are_means_too(fabric):
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    outs = [{"loss": (weight * k).sum(), "n": torch.tensor(2), "part": torch.tensor(float(k))} for k in (1, 5)]
    for out in outs:
        (out["loss"] / 4).backward()
    result = finish_step(fabric, nn.Module(), optimizer, outs, 4, None, requests=(True, False))
    assert (result.loss, result.parts, result.requests) == (1.5, {"part": 1.5}, (True, False))
    assert weight.item() == pytest.approx(1 - 0.15)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_that_is_not_finite_is_not_taken(fabric, bad, where):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    loss = weight.sum()
    loss.backward()
    if where == "gradient":
        weight.grad[1] = bad
    outs = [{"loss": loss * (bad if where == "loss" else 1.0), "n": torch.tensor(3)}]
    with pytest.raises(NonFiniteError, match=r"loss .*gradient norm"):
        finish_step(fabric, nn.Module(), optimizer, outs, 3, 1.0)
    assert torch.equal(weight, torch.ones(3)) and not optimizer.state


def test_explanation_names_step_batches_and_the_last_checkpoint():
    outs = [{"loss": torch.tensor(x)} for x in (1.0, math.nan, math.inf, 2.0)]
    state = {"iter_num": 12, "step_count": 2}
    message = str(explain(NonFiniteError("loss nan"), state, outs, 0, [Path("out/step-00000002/lit_model.pth")]))
    assert "step 3 (iter 8 to 11, epoch 1), in the loss of iter 9, 10" in message
    assert "resume from out/step-00000002" in message and "\n" not in message
    assert "in the gradient" in str(explain(NonFiniteError("x"), state, outs[:1], 0, []))


# Signals


def test_signals_become_requests_and_the_old_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert (signals.stop, signals.save) == (None, False)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (signals.stop, signals.save) == (None, True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_stop_signal_ends_the_process_at_once():
    code = (
        "import time\nfrom litgpt.training import Signals\n"
        "with Signals():\n    print('ready', flush=True)\n    end = time.monotonic() + 60\n"
        "    while time.monotonic() < end:\n        time.sleep(0.01)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(litgpt.__file__).parent.parent)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130


def test_cycle_iterator_counts_the_epochs_it_has_ended():
    cycle = CycleIterator([1, 2])
    assert [next(cycle) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert cycle.epoch == 2


def test_num_parameters_tells_trained_from_frozen_ones():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    model[0].requires_grad_(False)
    assert (num_parameters(model), num_parameters(model, True), num_parameters(model, False)) == (10, 2, 8)
