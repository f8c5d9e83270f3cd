import csv
import json
import math
import sys

import pytest
import torch

from litgpt import loggers
from litgpt.loggers import Meter, MetricsWriter, Progress, choose_logger, format_row, plot_curves, read_metrics, report

ROW = {
    "step": 3, "iter": 6, "epoch": 1, "loss": 1.25, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 10,
    "total_tokens": 20, "tokens_per_second": 1234.5, "iter_time": 0.0125, "remaining_time": 75.2,
}  # fmt: skip


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_are_written_as_csv_and_jsonl_in_full_precision(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 1 / 3, "val_loss": None})
    writer.write({"step": 2, "loss": math.pi, "val_loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": math.pi, "val_loss": 2.5},
    ]
    assert [float(row["loss"]) for row in table(tmp_path / "metrics.csv")] == [1 / 3, math.pi]
    assert [row["val_loss"] for row in table(tmp_path / "metrics.csv")] == ["", "2.5"]


def test_new_metric_becomes_a_column_for_the_rows_before_too(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": 1.0})
    writer.write({"step": 2, "loss": 2.0, "surprise": 7})
    writer.write({"step": 3, "loss": 3.0, "surprise": 8})
    assert [(row["loss"], row["surprise"]) for row in table(tmp_path / "metrics.csv")] == [
        ("1.0", ""), ("2.0", "7"), ("3.0", "8")
    ]  # fmt: skip


def test_resumed_metrics_go_on_after_the_checkpoint(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write({"step": step, "extra": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6')
    MetricsWriter(tmp_path, keep_until_step=3).write({"step": 4, "extra": 0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["extra"] for row in table(tmp_path / "metrics.csv")] == ["1", "2", "3", "0"]
    MetricsWriter(tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == [] and table(tmp_path / "metrics.csv") == []


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_local_loggers_write_below_the_logs_of_the_run(tmp_path, name):
    logger = choose_logger(name, tmp_path, "pretrain-x", log_interval=1)
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finalize("success")
    assert any((tmp_path / "logs" / name).rglob("*"))


def test_wandb_gets_project_run_and_group(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", lambda **kwargs: given.update(kwargs))
    monkeypatch.setenv("WANDB_RUN_GROUP", "from-env")
    choose_logger("wandb", tmp_path, "pretrain-x", log_args={"project": None, "run": "r"}, resume=True)
    assert given == {"project": "pretrain-x", "name": "r", "group": "from-env", "resume": True}


def test_mlflow_gets_the_name_of_the_experiment(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger", lambda **kwargs: given.update(kwargs))
    choose_logger("mlflow", tmp_path, "pretrain-x")
    assert given == {"experiment_name": "pretrain-x"}


def test_unknown_logger_is_answered_with_the_choices(tmp_path):
    with pytest.raises(ValueError, match=r"'tb'.*csv, tensorboard, wandb, mlflow, litlogger"):
        choose_logger("tb", tmp_path, "x")


def test_line_for_people_has_loss_speed_and_remaining_time():
    assert format_row(ROW) == (
        "Epoch 1 | iter 6 step 3 | loss train: 1.250, val: n/a | iter time: 12.50 ms | 1,234 tok/s | "
        "remaining time: 0:01:15"
    )
    assert "val: 2.500 (0.700 nats/byte)" in format_row({**ROW, "val_loss": 2.5, "val_nats_per_byte": 0.7})


def test_lines_without_a_terminal_come_every_few_seconds_and_with_each_validation(capsys):
    progress = Progress(10, seconds=60)
    for step in range(1, 6):
        progress.step("")
        progress.line({**ROW, "step": step, **({"val_loss": 1.0} if step == 3 else {})})
    progress.line({**ROW, "step": 6}, is_last=True)
    progress.note("a note")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("step ")[1].split()[0] for line in lines[:-1]] == ["1", "3", "6"] and lines[-1] == "a note"


def test_terminal_gets_a_bar_with_the_remaining_time_and_no_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(4, first_step=1)
    progress.step("loss 1.5")
    progress.line(ROW, is_last=True)
    progress.bar.refresh()
    progress.note("saved")
    progress.close()
    shown = capsys.readouterr().err
    assert "2/4" in shown and "loss 1.5" in shown and "<" in shown and "saved" in shown and "remaining" not in shown


def test_other_devices_are_silent(capsys):
    progress = Progress(4, is_shown=False)
    progress.line(ROW, is_last=True)
    progress.note("x")
    assert capsys.readouterr().err == ""


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loggers, "time", clock)
    return clock


def test_speed_leaves_out_the_first_step_and_what_lies_between_steps(clock):
    meter = Meter(flops_per_token=10, peak_flops=4000.0)
    for seconds in (9.0, 1.0, 1.0, 2.0):
        meter.start_step()
        clock.now += seconds
        meter.end_step(200)
        clock.now += 50  # validation
        if seconds == 9.0:
            meter.read(3)
    assert meter.tokens_per_second() == pytest.approx(600 / 4)
    figures = meter.read(steps_left=6, n_accumulated=2)
    assert figures["tokens_per_second"] == pytest.approx(600 / 4)
    assert figures["iter_time"] == pytest.approx(4 / 3 / 2)
    assert figures["remaining_time"] == pytest.approx(8.0)
    assert figures["mfu"] == pytest.approx(150 * 10 / 4000)
    assert (meter.tokens, meter.seconds) == (800, 13.0)


def test_remaining_time_ends_with_the_time_limit(clock):
    meter = Meter(max_seconds=20)
    meter.start_step()
    clock.now += 15
    assert not meter.is_time_up()
    meter.end_step(10)
    assert meter.read(100)["remaining_time"] == pytest.approx(5) and meter.read(100)["mfu"] is None
    clock.now += 5
    assert meter.is_time_up()


def test_curves_are_drawn_from_sparse_rows(tmp_path):
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "val_loss": 2.5}]
    assert plot_curves(rows, tmp_path / "loss.png", "title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_report_names_loss_checkpoint_and_the_next_command(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 5, "loss": 2.0, "val_loss": 2.5, "val_nats_per_byte": 0.75}) + "\n"
    )
    meter = Meter()
    meter.end_step(1000)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report(meter, torch.device("cpu"), tmp_path, plot=True, title="x")
    printed = capsys.readouterr().out
    assert "1,000 tokens" in printed and "Validation loss 2.500, 0.750 nats per byte (step 5)" in printed
    assert "litgpt[plot]" in printed and f"litgpt generate {tmp_path / 'final'}" in printed
    assert not (tmp_path / "loss.png").exists()
