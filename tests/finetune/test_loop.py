import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from litgpt.checkpoint.io import load_torch, load_weights
from litgpt.finetune import adapter, adapter_v2, full, loop, lora
from tests.finetune.conftest import Sums

METHODS = {"full": full, "lora": lora, "adapter": adapter, "adapter_v2": adapter_v2}
FILES = {name: "lit_model.pth" + ("" if name == "full" else f".{name}") for name in METHODS}
every_method = pytest.mark.parametrize("name", METHODS)


class Killed(BaseException):
    pass


@contextmanager
def killed_at(step, where="finish_step"):
    """Ends the process, as far as the run can tell, in the given step."""
    calls, original = 0, getattr(loop, where)

    def replacement(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == step:
            raise Killed
        return original(*args, **kwargs)

    setattr(loop, where, replacement)
    try:
        with pytest.raises(Killed):
            yield
    finally:
        setattr(loop, where, original)


def rows_of(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


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


@every_method
def test_finetuning_lowers_the_loss_and_leaves_the_published_files(settings, name):
    METHODS[name].setup(**settings(train={"max_steps": 15}, eval={"interval": 5, "final_validation": True}))
    rows = rows_of("out")
    assert rows[-1]["val_loss"] < rows[4]["val_loss"] and rows[-1]["loss"] < rows[0]["loss"]
    files = {path.name for path in Path("out/final").iterdir()}
    assert files >= {
        FILES[name],
        "model_config.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
        "hyperparameters.yaml",
    }
    assert ("lit_model.pth" in files) == (name in ("full", "lora"))
    assert set(load_torch(Path("out/final") / FILES[name])) == {"model"}


@every_method
@pytest.mark.parametrize("step", [2, 5, 7])
def test_resumed_run_equals_the_straight_one_to_the_last_bit(settings, name, step):
    how = dict(train={"max_steps": 12, "save_interval": 2, "epochs": 4, "max_norm": None}, eval={"interval": 3})
    more = {"ema_decay": 0.9, "early_stopping_patience": 9} if step == 5 else {}
    more |= {"data": Sums(n=21, own_loader=True)} if step == 7 else {}
    METHODS[name].setup(**settings("straight", **how, **more))
    with killed_at(step):
        METHODS[name].setup(**settings("broken", **how, **more))
    with killed_at(3):
        METHODS[name].setup(**settings("broken", **how, **more, resume="auto"))
    METHODS[name].setup(**settings("broken", **how, **more, resume=True))
    for file in (f"step-000012/{FILES[name]}", f"final/{FILES[name]}"):
        assert_same(load_torch(Path("straight") / file), load_torch(Path("broken") / file))
    if name == "lora":
        assert_same(load_weights("straight/final"), load_weights("broken/final"))
    losses = [[row["loss"] for row in rows_of(out) if "loss" in row] for out in ("straight", "broken")]
    assert losses[0] == losses[1]
