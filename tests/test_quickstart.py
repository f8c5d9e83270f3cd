import csv

import pytest
import torch

from litgpt import quickstart
from litgpt.config import LlamaConfig


def small_config() -> LlamaConfig:
    sizes = dict(n_layer=1, n_embd=32, n_head=2, intermediate_size=64, vocab_size=quickstart.VOCAB_SIZE)
    return LlamaConfig(name="quickstart", **sizes, padding_multiple=64, block_size=128, tie_embeddings=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(quickstart, "build_config", small_config)
    monkeypatch.setattr(quickstart, "CONTEXT", 128)


def test_quickstart_trains_writes_text_and_draws_the_loss(tmp_path, capsys):
    quickstart.setup(tmp_path, max_steps=20)
    out = capsys.readouterr().out
    assert "20 steps" in out and all(prompt in out for prompt in quickstart.PROMPTS)
    with open(tmp_path / "pretrain" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["val_loss"]) < float(rows[0]["loss"])
    assert (tmp_path / "pretrain" / "loss.png").stat().st_size > 1000
    assert (tmp_path / "pretrain" / "final" / "tokenizer.json").exists()
    assert quickstart.QUESTION in out
    assert (tmp_path / "finetune" / "final" / "lit_model.pth.lora").exists()
    assert (tmp_path / "finetune" / "final" / "lit_model.pth").exists()


def test_speed_of_the_machine_decides_the_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    seconds = {"32-true": 2.0, "bf16-mixed": 1.0}
    monkeypatch.setattr(quickstart, "seconds_of_step", lambda config, name, device: seconds[name])
    assert quickstart.fastest_precision(small_config()) == ("bf16-mixed", 1.0)
    seconds["bf16-mixed"] = 9.0
    assert quickstart.fastest_precision(small_config()) == ("32-true", 2.0)


def test_no_time_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--minutes is 0"):
        quickstart.setup(tmp_path, minutes=0)
    assert not list(tmp_path.iterdir())
