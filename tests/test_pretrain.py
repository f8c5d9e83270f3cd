import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from litgpt import pretrain, run_state
from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.io import load_torch
from litgpt.config import Config
from litgpt.data import TextFiles
from litgpt.data.base import DataModule
from litgpt.model import GPT
from litgpt.objective import NextToken
from litgpt.prompts import Default, load_prompt_style
from litgpt.registry import register_model, register_objective
from litgpt.tokenizer import Tokenizer
from litgpt.tokenizer_training import train_tokenizer

TINY = dict(
    n_layer=2, n_embd=32, n_head=4, intermediate_size=48, block_size=32, vocab_size=300, padded_vocab_size=320
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with text and a tokenizer for it; about 20 windows of 16 tokens to train on, so epochs are short."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    vocabulary = ["tree", "house", "river", "blue", "green", "fast", "slow", "and", "then"]
    text = " ".join(words.choice(vocabulary) for _ in range(400))
    (folder / "text").mkdir()
    (folder / "text" / "all.txt").write_text(text)
    train_tokenizer(iter([text]), 300, folder / "tok")
    return folder


@pytest.fixture
def run(corpus, tmp_path, monkeypatch):
    """Runs `setup` on the corpus with a tiny model; returns the output folder."""
    monkeypatch.chdir(tmp_path)

    def run(out_dir="out", train=None, eval=None, model_config=TINY, **kwargs):
        settings = dict(
            model_name="pythia-14m",
            model_config={**TINY, **model_config} if isinstance(model_config, dict) else model_config,
            data=TextFiles(corpus / "text" / "all.txt"),
            tokenizer_dir=corpus / "tok",
            precision="32-true",
            logger_name="csv",
            optimizer={"class_path": "AdamW", "init_args": {"lr": 0.01}},
            plot=False,
        )
        train = dict(
            global_batch_size=4, micro_batch_size=2, max_seq_length=16, max_steps=6, max_tokens=10**9, max_norm=1.0,
            lr_warmup_steps=2, save_interval=None, min_lr=1e-4,
        ) | (train or {})  # fmt: skip
        eval = dict(interval=1000, max_iters=2, final_validation=False) | (eval or {})
        settings |= dict(train=TrainArgs(**train), eval=EvalArgs(**eval)) | kwargs
        pretrain.setup(out_dir=Path(out_dir), **settings)
        return Path(out_dir)

    return run


class Killed(BaseException):
    pass


@contextmanager
def killed_at(step, where="finish_step"):
    """Ends the process, as far as the run can tell, in the given step."""
    calls, original = 0, getattr(pretrain, where)

    def replacement(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == step:
            raise Killed
        return original(*args, **kwargs)

    setattr(pretrain, where, replacement)
    try:
        with pytest.raises(Killed):
            yield
    finally:
        setattr(pretrain, where, original)


def rows_of(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def exact(rows):
    """The figures that do not depend on the clock."""
    timed = ("tokens_per_second", "iter_time", "remaining_time")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def assert_same(one, other):
    """All that two checkpoints hold is equal to the last bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


# What a run leaves


def test_pretraining_lowers_the_loss_and_leaves_checkpoint_metrics_and_plot(run, capsys):
    out = run(train={"max_steps": 30, "log_interval": 3}, eval={"interval": 10, "final_validation": True}, plot=True)
    rows = rows_of(out)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, 30]
    assert [row["step"] for row in rows] == sorted({*range(3, 31, 3), 10, 20})
    with open(out / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in rows]
    assert {p.name for p in (out / "final").iterdir()} >= {
        "lit_model.pth", "model_config.yaml", "hyperparameters.yaml", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "logs" / "csv").is_dir()
    printed = capsys.readouterr().out
    bytes_per_token = rows[-1]["val_loss"] / rows[-1]["val_nats_per_byte"]
    assert 1 < bytes_per_token < 6
    assert f"{rows[-1]['val_nats_per_byte']:.3f} nats per byte" in printed
    assert "litgpt generate out/final" in printed


def test_the_final_checkpoint_can_be_loaded_by_itself(run, corpus):
    out = run()
    config = Config.from_checkpoint(out / "final")
    assert (config.n_layer, config.name) == (2, "pythia-14m")
    payload = load_torch(out / "final" / "lit_model.pth")
    GPT(config).load_state_dict(payload["model"])
    assert payload.keys() == {
        "model", "optimizer", "train_dataloader", "iter_num", "step_count", "total_tokens", "run", "rng"
    }  # fmt: skip
    assert (payload["iter_num"], payload["step_count"], payload["total_tokens"]) == (12, 6, 6 * 4 * 16)
    assert Tokenizer(out / "final").vocab_size == Tokenizer(corpus / "tok").vocab_size
    # whatever chat style the name stands for, a new model has learnt to continue text
    assert type(load_prompt_style(out / "final")) is Default


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run):
    first, second, third = run("a"), run("b"), run("c", seed=7)
    assert exact(rows_of(first)) == exact(rows_of(second))
    assert rows_of(first)[0]["loss"] != rows_of(third)[0]["loss"]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_split_into_micro_batches_does_not_change_the_run(run, micro_batch_size):
    expected = [row["loss"] for row in rows_of(run("a"))]
    losses = [row["loss"] for row in rows_of(run("b", train={"micro_batch_size": micro_batch_size}))]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_reported_tokens_count_all_micro_batches(run):
    row = rows_of(run())[-1]
    assert (row["iter"], row["tokens"], row["total_tokens"]) == (12, 12 * 2 * 16, 6 * 4 * 16)
    assert row["tokens_per_second"] > 0 and row["remaining_time"] == 0


def test_validation_loss_is_the_mean_over_all_targets(run, corpus):
    out = run(eval={"final_validation": True, "max_iters": 1000})
    data = TextFiles(corpus / "text" / "all.txt")
    data.connect(Tokenizer(corpus / "tok"), 3, 16)
    data.setup()
    model = GPT(Config.from_checkpoint(out / "final"))
    model.load_state_dict(load_torch(out / "final" / "lit_model.pth")["model"])
    total = count = 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            loss, n = model(batch[:, :-1], targets=batch[:, 1:])
            total, count = total + loss.item(), count + n.item()
    row = rows_of(out)[-1]
    assert row["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert row["val_ppl"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert row["val_nats_per_byte"] == pytest.approx(total / count / data.bytes_per_token("val"), rel=1e-5)


# Length and course


@pytest.mark.parametrize(
    "train, steps",
    [({"max_steps": 3}, 3), ({"max_steps": None, "max_tokens": 4 * 16 * 5 + 10}, 5), ({"max_tokens": 1}, 1)],
)
def test_the_run_ends_at_its_limit(run, train, steps):
    assert rows_of(run(train=train))[-1]["step"] == steps


def test_max_time_ends_the_run_with_checkpoint_and_validation(run):
    begin = time.monotonic()
    out = run(train={"max_steps": None, "max_time": 0.3}, eval={"final_validation": True})
    assert time.monotonic() - begin < 10
    row = rows_of(out)[-1]
    assert "val_loss" in row and load_torch(out / "final" / "lit_model.pth")["step_count"] == row["step"]
    assert (out / f"step-{row['step']:08d}" / "lit_model.pth").is_file()


def test_learning_rate_follows_the_schedule_asked_for(run):
    train = {"max_steps": 10, "lr_schedule": "wsd", "decay_fraction": 0.3, "min_lr": 0.0}
    rates = [row["learning_rate"] for row in rows_of(run(train=train))]
    assert rates == pytest.approx([0.005, *[0.01] * 6, 0.02 / 3, 0.01 / 3, 0.0])


def test_warmup_longer_than_the_run_is_cut_with_a_warning(run):
    with pytest.warns(UserWarning, match="warm-up of 2000 steps"):
        out = run(train={"lr_warmup_steps": 2000, "max_steps": 3})
    assert rows_of(out)[0]["learning_rate"] > 0.005


def test_warmup_fraction_counts_in_epochs(run):
    out = run(train={"lr_warmup_steps": None, "lr_warmup_fraction": 0.5, "max_steps": 20})
    rates = [row["learning_rate"] for row in rows_of(out)]
    n_warmup = rates.index(max(rates)) + 1
    epoch_of = [row["epoch"] for row in rows_of(out)]
    assert n_warmup == pytest.approx(epoch_of.count(1) / 2, abs=1)


def test_overfit_uses_the_same_batches_again_and_again(run, monkeypatch):
    seen, original = [], pretrain.split_examples

    def spy(batch):
        seen.append(batch.sum().item())
        return original(batch)

    monkeypatch.setattr(pretrain, "split_examples", spy)
    out = run(train={"max_steps": 60}, overfit=2)
    assert len(seen) == 120 and seen[:2] * 60 == seen and seen[0] != seen[1]
    assert rows_of(out)[-1]["loss"] < 1.0


# Going on


@pytest.mark.parametrize("model_config", [{}, {"dropout": 0.2}], ids=["plain", "dropout"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
@pytest.mark.parametrize("step", [2, 6, 7])
def test_resumed_run_equals_the_straight_one_to_the_last_bit(run, model_config, optimizer, step):
    settings = dict(
        train={"max_steps": 14, "save_interval": 1, "keep_checkpoints": 2},
        eval={"interval": 3, "final_validation": True},
        model_config=model_config,
        optimizer={"class_path": optimizer, "init_args": {"lr": 0.01}},
    )
    straight = run("straight", **settings)
    assert rows_of(straight)[-1]["epoch"] >= 3
    with killed_at(step):
        run("broken", **settings)
    with killed_at(4, "to_device"):  # in the second micro batch of a step
        run("broken", resume="auto", **settings)
    run("broken", resume=True, **settings)
    assert exact(rows_of(Path("broken"))) == exact(rows_of(straight))
    assert_same(load_torch("broken/final/lit_model.pth"), load_torch("straight/final/lit_model.pth"))


def test_resume_takes_a_folder_or_a_file(run):
    settings = {"train": {"save_interval": 2}}
    straight = run(**settings)
    expected = load_torch("out/final/lit_model.pth")["model"]
    for resume in (straight / "step-00000002", straight / "step-00000004" / "lit_model.pth"):
        run("again", resume=resume, **settings)
        assert_same(load_torch("again/final/lit_model.pth")["model"], expected)


def test_resume_cuts_the_log_at_the_checkpoint(run):
    settings = {"train": {"save_interval": 2}}
    with killed_at(6):
        run(**settings)
    assert [row["step"] for row in rows_of(Path("out"))] == [1, 2, 3, 4, 5]
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # as a kill in the middle of a line leaves it
    with killed_at(1):
        run(resume=True, **settings)
    assert [row["step"] for row in rows_of(Path("out"))] == [1, 2, 3, 4]
    with open("out/metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == list("1234")


def test_resume_auto_starts_afresh_where_there_is_nothing_and_true_refuses(run):
    assert rows_of(run(resume="auto"))[-1]["step"] == 6
    with pytest.raises(FileNotFoundError, match="nothing to resume from"):
        run("empty", resume=True)


def test_resume_from_a_checkpoint_of_old_versions_goes_on_after_the_samples_seen(run):
    train = {"save_interval": 3}
    straight = run(train=train)
    file = straight / "step-00000003" / "lit_model.pth"
    old = {key: value for key, value in load_torch(file).items() if key not in ("rng", "total_tokens")}
    old["model"] = {f"_orig_mod.{key}": value.clone() for key, value in old["model"].items()}
    old["train_dataloader"] = {"dataset": {"num_samples_yielded": 12}}
    torch.save(old, "old.pth")
    with pytest.warns(UserWarning, match="going on after 12 samples"):
        run("again", resume=Path("old.pth"), train=train)
    assert exact(rows_of(Path("again"))) == exact(rows_of(straight))[3:]


def test_resume_from_a_damaged_checkpoint_names_it_and_an_older_one(run):
    out = run(train={"save_interval": 2})
    file = out / "step-00000006" / "lit_model.pth"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000006.*damaged.*step-00000004"):
        run(resume=True)


def test_resume_with_another_optimizer_says_so(run):
    run(train={"save_interval": 3})
    with pytest.raises(ValueError, match="another optimizer"):
        run(resume=True, optimizer="Muon")


def test_old_checkpoints_are_removed_but_the_newest(run):
    out = run(train={"save_interval": 1, "keep_checkpoints": 2})
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["final", "logs", "step-00000005", "step-00000006"]


def test_a_second_run_in_the_same_folder_is_warned_of_and_begins_new_metrics(run):
    run(train={"save_interval": 3})
    with pytest.warns(UserWarning, match="earlier run"):
        out = run(train={"max_steps": 2})
    assert [row["step"] for row in rows_of(out)] == [1, 2]


# When it goes wrong


class NanAt(NextToken):
    """The loss of one micro batch is not a number."""

    calls, bad = 0, 6

    def loss(self, model, batch):
        out = super().loss(model, batch)
        if model.training:
            NanAt.calls += 1
            if NanAt.calls == NanAt.bad:
                out["loss"] = out["loss"] * float("nan")
        return out


def test_nan_stops_before_the_step_names_it_and_saves_nothing(run, monkeypatch):
    monkeypatch.setattr(NanAt, "calls", 0)
    register_objective("nan-at", NanAt)
    with pytest.raises(ValueError) as error:
        run(objective="nan-at", train={"save_interval": 2})
    message = str(error.value)
    assert "in step 3 (iter 4 to 5, epoch 1), in the loss of iter 5" in message
    assert "step-00000002" in message and "\n" not in message
    assert not Path("out/final").exists() and not Path("out/step-00000004").exists()
    assert [row["step"] for row in rows_of(Path("out"))] == [1, 2]


def test_sigusr1_saves_and_goes_on(run, monkeypatch):
    original, calls = pretrain.accumulate, []

    def accumulate(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **kwargs)

    monkeypatch.setattr(pretrain, "accumulate", accumulate)
    out = run()
    assert (out / "step-00000002" / "lit_model.pth").is_file() and not (out / "step-00000003").exists()
    assert rows_of(out)[-1]["step"] == 6


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stop_signal_saves_within_the_step_and_exits_with_its_status(run, monkeypatch, number, status):
    original, calls = pretrain.accumulate, []

    def accumulate(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    handler = signal.getsignal(number)
    monkeypatch.setattr(pretrain, "accumulate", accumulate)
    with pytest.raises(SystemExit) as error:
        run(train={"max_steps": 8})
    assert error.value.code == status
    assert signal.getsignal(number) is handler
    assert load_torch("out/step-00000003/lit_model.pth")["step_count"] == 3
    run(resume=True, train={"max_steps": 8})
    assert [row["step"] for row in rows_of(Path("out"))] == list(range(1, 9))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model_name": "pythia-14n"}, "pythia-14m"),
        ({"model_name": None, "model_config": None}, "Name a model"),
        ({"model_config": {"n_layr": 3}}, "n_layr.*n_layer"),
        ({"data": None}, "TextFiles"),
        ({"tokenizer_dir": None}, "tokenizer_dir.*train_tokenizer"),
        ({"model_config": {"vocab_size": 64, "padded_vocab_size": 64}}, "tokens, the model 64.*vocab_size"),
        ({"train": {"max_seq_length": 4096}}, "4096.*block_size 32"),
        ({"train": {"global_batch_size": 5}}, "global_batch_size 5"),
        ({"train": {"epochs": 2}, "eval": {"max_new_tokens": 3}}, "train.epochs.*eval.max_new_tokens"),
        ({"train": {"max_norm": None, "max_tokens": None}}, "max_tokens is required.*max_norm is required"),
        ({"resume": True, "initial_checkpoint_dir": Path("x")}, "exclude each other"),
        ({"overfit": 0}, "overfit is 0"),
        ({"objective": "next-tokn"}, "next-token"),
        ({"optimizer": "AdamX"}, "AdamW"),
        ({"optimizer": {"class_path": "AdamW", "init_args": {"lrr": 1}}}, "lrr.*lr"),
        ({"devices": "two"}, "devices"),
        ({"logger_name": "tensorbord"}, "tensorboard"),
        ({"data": TextFiles(Path("nothing/here"))}, "nothing/here"),
    ],
)
def test_bad_input_is_one_line_that_says_what_and_where(run, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(**settings)
    assert "\n" not in str(error.value)


def test_output_folder_that_cannot_be_written_is_refused_before_the_model_is_built(run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pretrain, "main", lambda *args, **kwargs: pytest.fail("the run began"))
    with pytest.raises(OSError, match="out_dir file/out"):
        run("file/out")


def test_full_disk_ends_the_run_and_leaves_the_checkpoint_before(run, monkeypatch):
    original = run_state.save_torch

    def save_torch(payload, path):
        if payload["step_count"] == 4:
            raise OSError(28, f"cannot write {path}: No space left on device")
        original(payload, path)

    monkeypatch.setattr(run_state, "save_torch", save_torch)
    with pytest.raises(OSError, match="No space left"):
        run(train={"save_interval": 2})
    assert sorted(p.name for p in Path("out").iterdir() if p.is_dir()) == ["logs", "step-00000002"]


def test_missing_tracker_package_is_a_warning(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.warns(UserWarning, match="No wandb logs"):
        out = run(logger_name="wandb")
    assert rows_of(out)[-1]["step"] == 6


# Models, weights, places


def test_list_prints_the_model_names(capsys):
    pretrain.setup("list")
    names = capsys.readouterr().out.split()
    assert "pythia-14m" in names and len(names) > 200


def test_weights_to_start_from_are_loaded(run):
    first = run()
    out = run("more", initial_checkpoint_dir=first / "final", train={"max_steps": 1})
    assert rows_of(out)[0]["loss"] < rows_of(first)[-1]["loss"] + 0.3 < rows_of(first)[0]["loss"]
    with pytest.raises(ValueError, match="do not fit the model"):
        run("misfit", initial_checkpoint_dir=first / "final", model_config={"n_embd": 64})


def test_folders_below_checkpoints_are_found_by_their_name(run, corpus):
    first = run("checkpoints/org/first")
    run("more", initial_checkpoint_dir=Path("org/first/final"), tokenizer_dir=Path("org/first/final"))
    assert rows_of(Path("more"))[0]["loss"] < rows_of(first)[0]["loss"] - 0.5


def test_tied_embeddings_are_one_weight_and_stay_so(run):
    out = run(train={"tie_embeddings": True})
    model = load_torch(out / "final" / "lit_model.pth")["model"]
    assert Config.from_checkpoint(out / "final").tie_embeddings
    assert torch.equal(model["lm_head.weight"], model["transformer.wte.weight"])


def test_model_without_a_name_is_built_from_its_fields(run):
    out = run(model_name=None)
    assert Config.from_checkpoint(out / "final").n_embd == 32


def test_config_object_from_python_is_used_and_recorded(run):
    out = run(model_name=None, model_config=Config(**TINY, name="mine"))
    assert Config.from_checkpoint(out / "final").name == "mine"
    assert (out / "final" / "hyperparameters.yaml").is_file()


def test_compiled_run_saves_plain_names(run, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compile(model, **{**kwargs, "backend": "eager"}))
    plain, compiled = run("plain"), run("compiled", compile=True)
    assert [r["loss"] for r in rows_of(compiled)] == pytest.approx([r["loss"] for r in rows_of(plain)], rel=1e-3)
    names = [load_torch(out / "final" / "lit_model.pth")["model"].keys() for out in (plain, compiled)]
    assert names[0] == names[1]


@dataclass
class BigramConfig(Config):
    spread: float = 0.1


class Bigram(nn.Module):
    """A model that is no GPT."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.padded_vocab_size, config.padded_vocab_size)
        nn.init.normal_(self.table.weight, std=config.spread)

    def forward(self, idx):
        return self.table(idx)


def test_model_that_is_no_gpt_trains_and_resumes(run):
    register_model("bigram", model=Bigram, config=BigramConfig, sizes={"tiny": dict(TINY)})
    settings = dict(model_name="bigram/tiny", model_config={"spread": 0.02}, train={"save_interval": 3, "max_steps": 8})
    straight = run(**settings)
    rows = rows_of(straight)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "model_type: bigram" in (straight / "final" / "model_config.yaml").read_text()
    run("again", resume=straight / "step-00000003", **settings)
    assert_same(load_torch("again/final/lit_model.pth"), load_torch("out/final/lit_model.pth"))


class ListData(DataModule):
    """Samples in a plain torch DataLoader that knows nothing of resuming; no validation data."""

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **kwargs):
        self.batch_size, self.length = batch_size, max_seq_length + 1

    def train_dataloader(self):
        samples = torch.randint(300, (22, self.length), generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(samples, batch_size=self.batch_size)

    def val_dataloader(self):
        return None


def test_loader_without_a_state_is_read_again_up_to_the_checkpoint(run):
    settings = dict(
        data=ListData(),
        tokenizer_dir=None,
        train={"save_interval": 4, "max_steps": 10},
        eval={"final_validation": True},
    )
    straight = run(**settings)
    run("again", resume=straight / "step-00000004", **settings)
    assert exact(rows_of(Path("again"))) == exact(rows_of(straight))[4:]


def test_artifacts_folder_stands_before_a_relative_output_folder(run, monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", str(tmp_path / "artifacts"))
    run(train={"max_steps": 1})
    assert (tmp_path / "artifacts" / "out" / "final" / "lit_model.pth").is_file()


SCRIPT = """
import sys
from pathlib import Path
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import TextFiles
from litgpt.pretrain import setup

if __name__ == "__main__":
    setup(
        "pythia-14m", {tiny}, out_dir=Path(sys.argv[1]), data=TextFiles(Path({text!r})), tokenizer_dir=Path({tok!r}),
        precision="32-true", logger_name="csv", devices=int(sys.argv[2]), plot=False,
        optimizer={optimizer}, train=TrainArgs(**{train}), eval=EvalArgs(**{eval}),
    )
"""


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(run, corpus, tmp_path):
    train = dict(
        global_batch_size=8, micro_batch_size=2, max_seq_length=16, max_steps=6, max_tokens=10**9, max_norm=0.5,
        lr_warmup_steps=2, save_interval=3, min_lr=0.0,
    )  # fmt: skip
    eval = dict(interval=3, max_iters=2)
    # no Adam: where a gradient is almost 0 it makes a whole step of a rounding difference
    optimizer = {"class_path": "SGD", "init_args": {"lr": 0.5, "momentum": 0.9}}
    eval_all = {**eval, "max_iters": 4, "final_validation": True}
    single = run("one", train=train, eval=eval_all, optimizer=optimizer)
    text, tok = str(corpus / "text" / "all.txt"), str(corpus / "tok")
    script = SCRIPT.format(tiny=TINY, text=text, tok=tok, train=train, eval=eval, optimizer=optimizer)
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(pretrain.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "script.py", "two", "2"], check=True, cwd=tmp_path, env=environment, timeout=120)
    one, two = rows_of(single), rows_of(tmp_path / "two")
    for key in ("loss", "grad_norm", "val_loss", "learning_rate", "total_tokens"):
        assert [row.get(key, 0) for row in two] == pytest.approx([row.get(key, 0) for row in one], rel=1e-6), key
    run(
        "back", train=train, eval=eval, optimizer=optimizer, resume=tmp_path / "two" / "step-00000003"
    )  # two processes' state in one
    assert [row["loss"] for row in rows_of(Path("back"))] == pytest.approx([row["loss"] for row in one[3:]], rel=1e-6)
