"""What a run is asked for and what goes wrong, apart from what the method is."""

import importlib
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from litgpt.__main__ import main
from litgpt.checkpoint.io import load_torch, load_weights, save_torch
from litgpt.config import Config, save_config
from litgpt.finetune import adapter, full, loop, lora
from litgpt.model import GPT, Block, CausalSelfAttention
from litgpt.objective import NextToken
from litgpt.registry import get_model_spec, register_model
from tests.finetune.conftest import CONFIG, Sums, make_checkpoint
from tests.finetune.test_loop import FILES, METHODS, assert_same, every_method, rows_of

SGD = {"class_path": "SGD", "init_args": {"lr": 1.0}}


@pytest.fixture
def still_dir(checkpoint_dir, tmp_path):
    """The tiny model without dropout."""
    folder = tmp_path / "still"
    folder.mkdir()
    for file in checkpoint_dir.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    make_checkpoint(folder, Config(**{**CONFIG, "dropout": 0.0}))
    return folder


# The loss


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_split_into_micro_batches_changes_neither_loss_nor_gradients(settings, still_dir, name):
    start, losses, gradients = load_weights(still_dir), [], []
    more = {} if name == "full" else {"lora_dropout": 0.0}
    for size in (1, 2, 4, 8):
        train = dict(global_batch_size=8, micro_batch_size=size, max_steps=1, lr_warmup_steps=0, max_norm=None)
        train |= {"lr_schedule": "constant"}
        arguments = settings(f"out-{size}", train=train, checkpoint_dir=still_dir, optimizer=SGD)
        METHODS[name].setup(**arguments, **more)
        losses.append(rows_of(f"out-{size}")[0]["loss"])
        end = load_weights(f"out-{size}/final")
        gradients.append({key: start[key] - end[key] for key in start})
    largest = max(g.abs().max() for g in gradients[0].values())
    assert largest > 1e-3
    for loss, gradient in zip(losses[1:], gradients[1:]):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        assert all((gradient[key] - gradients[0][key]).abs().max() <= 1e-5 * largest for key in gradient)


def test_the_last_partial_step_of_an_epoch_is_taken(settings):
    full.setup(**settings(train={"epochs": 2, "max_steps": None}))  # 22 samples in micro batches of 2, steps of 4
    rows = rows_of("out")
    assert [row["iter"] for row in rows] == [2, 4, 6, 8, 10, 11, 13, 15, 17, 19, 21, 22]
    assert [row["epoch"] for row in rows] == [1] * 6 + [2] * 6


def test_tokens_are_counted_with_and_without_padding(settings, capsys):
    full.setup(**settings(train={"epochs": 1, "max_steps": None}))
    data = Sums()
    data.connect(loop.Tokenizer(settings()["checkpoint_dir"]), 2, 64)
    data.setup()
    n = sum(len(e["input_ids"]) for e in data.train_dataset)
    assert rows_of("out")[-1]["total_tokens"] == n
    assert f"with the prompt's template {n:,}, with padding" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_activation_checkpointing_changes_nothing(settings, name):
    METHODS[name].setup(**settings("plain"))
    METHODS[name].setup(**settings("again", activation_checkpointing=True))
    losses = [[row["loss"] for row in rows_of(out)] for out in ("plain", "again")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# Length and schedule


@pytest.mark.parametrize("warmup", [0, None, 6, 100])
def test_warmup_of_any_length_reaches_the_full_rate(settings, warmup):
    arguments = settings(train={"lr_warmup_steps": warmup, "lr_schedule": "constant"})
    if warmup and warmup >= 6:
        with pytest.warns(UserWarning, match="would fill the whole run of 6 steps"):
            full.setup(**arguments)
    else:
        full.setup(**arguments)
    rates = [row["learning_rate"] for row in rows_of("out")]
    assert rates[0] > 0 and rates[-1] == 0.01


@every_method
def test_max_time_ends_the_run_with_a_checkpoint(settings, name):
    METHODS[name].setup(**settings(train={"max_steps": 10**6, "max_time": 0.2, "epochs": None}))
    last = rows_of("out")[-1]["step"]
    assert last < 10**5
    assert (Path("out") / f"step-{last:06d}" / FILES[name]).is_file() and Path("out/final").is_dir()


def test_early_stopping_ends_the_run_and_the_best_weights_are_kept(settings, monkeypatch):
    losses = iter([9.0, 3.0, 2.0, 2.5, 2.6, 1.0])
    monkeypatch.setattr(loop, "measure", lambda *a: {"val_loss": next(losses)})
    eval = {"interval": 2, "final_validation": True}
    lora.setup(
        **settings(train={"max_steps": 40, "save_interval": 4}, eval=eval, early_stopping_patience=2, keep_best=True)
    )
    assert rows_of("out")[-1]["step"] == 8
    at_best, best = (load_torch(Path("out") / folder / FILES["lora"])["model"] for folder in ("step-000004", "best"))
    assert_same(best, at_best)
    assert Path("out/best/lit_model.pth").is_file()


def test_only_the_newest_checkpoints_are_kept(settings):
    lora.setup(**settings(train={"save_interval": 1, "keep_checkpoints": 2}))
    assert sorted(path.name for path in Path("out").glob("step-*")) == ["step-000005", "step-000006"]


def test_mean_weights_are_validated_and_saved(settings):
    full.setup(**settings("plain", train={"save_interval": 1}))
    full.setup(**settings("mean", train={"save_interval": 1}, ema_decay=0.5))
    steps = [load_torch(f"plain/step-{i:06d}/lit_model.pth")["model"] for i in range(1, 7)]
    name = "lm_head.weight"
    mean = load_weights(settings()["checkpoint_dir"])[name].clone()
    for i, step in enumerate(steps, 1):
        mean.lerp_(step[name], 1 - min(0.5, (1 + i) / (10 + i)))
    assert torch.allclose(load_weights("mean/final")[name], mean, atol=1e-6)
    assert torch.equal(load_torch("mean/step-000006/lit_model.pth")["model"][name], steps[-1][name])


# Folders


def test_a_second_run_in_the_same_folder_replaces_the_merged_model(settings):
    lora.setup(**settings())
    first = load_weights("out/final")
    with pytest.warns(UserWarning, match="will be replaced"):
        lora.setup(**settings(seed=5))
    second = load_weights("out/final")
    part = load_torch("out/final/lit_model.pth.lora")["model"]
    base = load_weights(settings()["checkpoint_dir"])
    A, B = (part[f"transformer.h.0.attn.qkv.lora_{x}"] for x in "AB")
    update = second["transformer.h.0.attn.qkv.weight"] - base["transformer.h.0.attn.qkv.weight"]
    assert torch.allclose(update[:32], B[:32] @ A[:8] * 2, atol=1e-6)
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_a_folder_with_steps_of_an_earlier_run_is_refused(settings):
    full.setup(**settings(train={"save_interval": 3}))
    with pytest.raises(ValueError, match="step-000006 of an earlier run: go on with it by --resume true"):
        full.setup(**settings())


def test_resume_takes_a_folder_or_a_file_and_refuses_other_settings(settings):
    lora.setup(**settings(train={"save_interval": 3}))
    for path in ("out/step-000003", "out/step-000003/lit_model.pth.lora"):
        lora.setup(**settings(f"again-{path[-4:]}", resume=Path(path)))
        assert_same(load_weights(f"again-{path[-4:]}/final"), load_weights("out/final"))
    with pytest.raises(ValueError, match="resume with the same model and the same settings of lora"):
        lora.setup(**settings("other", resume=Path("out/step-000003"), lora_r=4))
    with pytest.raises(ValueError, match="holds weights only: give out/final as CHECKPOINT_DIR"):
        lora.setup(**settings("other", resume=Path("out/final/lit_model.pth.lora")))


# Signals, kills and bad numbers


@every_method
def test_a_stop_signal_saves_and_the_resumed_run_is_the_straight_one(settings, name, monkeypatch):
    how = dict(train={"max_steps": 8}, eval={"interval": 3, "final_validation": True})
    METHODS[name].setup(**settings("straight", **how))
    original, calls = loop.accumulate, []

    def accumulate(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(loop, "accumulate", accumulate)
    with pytest.raises(SystemExit) as end:
        METHODS[name].setup(**settings("broken", **how))
    assert end.value.code == 143 and (Path("broken/step-000003") / FILES[name]).is_file()
    METHODS[name].setup(**settings("broken", **how, resume=True))
    assert_same(load_torch(f"straight/final/{FILES[name]}"), load_torch(f"broken/final/{FILES[name]}"))


def run_and_die(name, arguments, step):
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    original, calls = loop.finish_step, []
    loop.finish_step = lambda *args: (calls.append(1), die() if len(calls) == step else None, original(*args))[2]
    torch.set_num_threads(1)
    METHODS[name].setup(**arguments)


@every_method
def test_a_killed_run_goes_on_as_if_nothing_had_happened(settings, name):
    how = dict(train={"max_steps": 8, "save_interval": 2})
    METHODS[name].setup(**settings("straight", **how))
    for resume, step in ((False, 4), (True, 3)):
        process = get_context("fork").Process(
            target=run_and_die, args=(name, settings("broken", **how, resume=resume), step)
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    METHODS[name].setup(**settings("broken", **how, resume=True))
    assert_same(load_torch(f"straight/final/{FILES[name]}"), load_torch(f"broken/final/{FILES[name]}"))


def test_nan_stops_before_the_step_and_saves_nothing(settings, monkeypatch):
    original = NextToken.loss
    calls = []

    def loss(self, model, batch):
        out = original(self, model, batch)
        calls.append(1)
        return {**out, "loss": out["loss"] * float("nan")} if len(calls) == 8 else out  # after 2 of validation

    monkeypatch.setattr(NextToken, "loss", loss)
    with pytest.raises(ValueError, match=r"in step 3 \(iter 4 to 5, epoch 1\), in the loss of iter 5.*step-000002"):
        full.setup(**settings(train={"save_interval": 2}))
    assert not Path("out/final").exists() and [row["step"] for row in rows_of("out")] == [1, 2]


# Other models, other data


class NarrowAttention(CausalSelfAttention):
    def forward(self, x, *args, **kwargs):
        return super().forward(x * 0.5, *args, **kwargs)


class NarrowBlock(Block):
    attention_class = NarrowAttention


class NarrowGPT(GPT):
    block_class = NarrowBlock


@dataclass
class NarrowConfig(Config):
    pass


class Bag(nn.Module):
    """A model that is no GPT."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.padded_vocab_size, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.out = nn.Linear(16, config.padded_vocab_size)

    def forward(self, idx):
        x = self.table(idx).cumsum(dim=1)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.out(x)


@dataclass
class BagConfig(Config):
    pass


@pytest.mark.parametrize("kind", ["narrow", "bag"])
@every_method
def test_models_of_others_train_with_every_method(settings, still_dir, kind, name):
    model, config = {"narrow": (NarrowGPT, NarrowConfig), "bag": (Bag, BagConfig)}[kind]
    register_model(kind, model=model, config=config, sizes={"tiny": {}})
    config = get_model_spec(kind).config(**CONFIG)
    torch.manual_seed(0)
    built = model(config)
    save_torch(built.state_dict(), still_dir / "lit_model.pth")
    save_config(config, still_dir)
    arguments = settings(
        checkpoint_dir=still_dir,
        train={"max_steps": 10, "save_interval": 5},
        eval={"interval": 5, "final_validation": True},
    )
    if kind == "bag" and name == "lora":
        arguments["lora_targets"] = "layers.*"
    if kind == "bag" and name == "adapter":
        with pytest.raises(ValueError, match="finetune_lora and finetune_adapter_v2 work on any linear layer"):
            adapter.setup(**arguments)
        return
    METHODS[name].setup(**arguments)
    val = [row["val_loss"] for row in rows_of("out") if "val_loss" in row]
    assert val[1] < val[0]
    METHODS[name].setup(**arguments | {"out_dir": Path("again"), "resume": Path("out/step-000005")})
    assert_same(load_torch(f"again/final/{FILES[name]}"), load_torch(f"out/final/{FILES[name]}"))


@pytest.mark.parametrize("name", ["lora", "adapter", "adapter_v2"])
def test_quantised_base_weights_learn_with_what_is_added(settings, name):
    pytest.importorskip("bitsandbytes")
    METHODS[name].setup(**settings(quantize="bnb.nf4", train={"max_steps": 10, "save_interval": 5}))
    rows = rows_of("out")
    assert rows[-1]["loss"] < rows[0]["loss"]
    METHODS[name].setup(
        **settings("again", quantize="bnb.nf4", train={"max_steps": 10}, resume=Path("out/step-000005"))
    )
    assert_same(load_torch(f"again/final/{FILES[name]}"), load_torch(f"out/final/{FILES[name]}"))
    with pytest.raises(ValueError, match="does not go with precision bf16-mixed"):
        METHODS[name].setup(**settings("other", quantize="bnb.nf4", precision="bf16-mixed"))


def test_missing_base_weights_are_refused(settings, still_dir):
    weights = {k: v for k, v in load_weights(still_dir).items() if k != "transformer.h.1.mlp.proj.weight"}
    save_torch({k: v.clone() for k, v in weights.items()}, still_dir / "lit_model.pth")
    with pytest.raises(ValueError, match=r"missing: transformer\.h\.1\.mlp\.proj\.weight"):
        lora.setup(**settings(checkpoint_dir=still_dir))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": {"max_tokens": 5}}, "--train.max_tokens is not used in finetuning"),
        ({"train": {"max_steps": None}}, "--train.epochs or --train.max_steps is required"),
        ({"ema_decay": 1.5}, "--ema_decay is 1.5"),
        ({"early_stopping_patience": 0}, "--early_stopping_patience is 0"),
        ({"resume": True}, "nothing to resume from"),
    ],
)
def test_bad_input_is_one_line(settings, more, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        full.setup(**settings(**more))
    assert message in str(error.value) and "\n" not in str(error.value)


SCRIPT = """
import sys
from pathlib import Path
from litgpt.args import EvalArgs, TrainArgs
from litgpt.finetune import {name}
from tests.finetune.conftest import Sums

if __name__ == "__main__":
    {name}.setup(
        Path({folder!r}), out_dir=Path("two"), data=Sums(n=24, own_loader=True), precision="64-true", devices=2,
        plot=False, optimizer={optimizer}, train=TrainArgs(**{train}), eval=EvalArgs(**{eval}), **{more},
    )
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_processes_give_the_run_of_one(settings, still_dir, tmp_path, name):
    train = dict(
        global_batch_size=8, micro_batch_size=2, epochs=2, max_steps=None, lr_warmup_steps=0, max_norm=0.5, min_lr=0.0
    )
    eval = dict(interval=2, max_iters=1, final_validation=True)
    optimizer = {"class_path": "SGD", "init_args": {"lr": 0.1}}
    more = {} if name == "full" else {"lora_dropout": 0.0}
    data, one_eval = Sums(n=24, own_loader=True), {**eval, "max_iters": 2}
    METHODS[name].setup(
        **settings("one", train=train, eval=one_eval, optimizer=optimizer, checkpoint_dir=still_dir, data=data)
        | {"precision": "64-true"},
        **more,
    )
    how = dict(save_interval=None, **train)
    script = SCRIPT.format(
        name=name, folder=str(still_dir), optimizer=optimizer, train=how, eval={**eval, "max_new_tokens": 5}, more=more
    )
    (tmp_path / "script.py").write_text(script)
    root = Path(full.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "script.py"], check=True, cwd=tmp_path, env=environment, timeout=200)
    one, two = rows_of("one"), rows_of("two")
    assert len(one) == len(two) == 6
    for key in ("loss", "grad_norm", "val_loss", "total_tokens"):
        assert [row.get(key, 0) for row in two] == pytest.approx([row.get(key, 0) for row in one], rel=1e-6), key


@pytest.mark.slow
@every_method
def test_a_compiled_run_is_the_plain_one_and_saves_plain_names(settings, still_dir, name, monkeypatch):
    importlib.import_module("lightning")  # keeps its own record of what torch.compile is called with
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile(model, backend="eager"))
    how = dict(checkpoint_dir=still_dir, train={"max_steps": 3}, eval={"interval": 2})
    how |= {"lora_dropout": 0.0} if name == "lora" else {}
    for out_dir, is_compiled in (("plain", False), ("compiled", True)):
        METHODS[name].setup(**settings(out_dir, **how, compile=is_compiled))
    losses = [[row["loss"] for row in rows_of(out_dir)] for out_dir in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    files = [load_torch(f"{out_dir}/final/{FILES[name]}")["model"] for out_dir in ("plain", "compiled")]
    assert files[0].keys() == files[1].keys()


@pytest.mark.parametrize("name", ["lora", "adapter_v2"])
def test_mixed_precision_keeps_frozen_layers_in_16_bits_and_what_is_trained_in_32(settings, name):
    METHODS[name].setup(**settings(precision="bf16-mixed", train={"max_steps": 10}))
    rows = rows_of("out")
    assert rows[-1]["loss"] < rows[0]["loss"]
    part = load_torch(f"out/final/{FILES[name]}")["model"]
    assert {tensor.dtype for tensor in part.values()} == {torch.float32}


@every_method
def test_last_line_of_a_run_is_a_command_that_works(name, settings, capsys):
    METHODS[name].setup(**settings(train={"max_steps": 1}))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("Next: litgpt ")
    main([*shlex.split(last.removeprefix("Next: litgpt ")), "--max_new_tokens", "2", "--precision", "32-true"])
    assert capsys.readouterr().out
