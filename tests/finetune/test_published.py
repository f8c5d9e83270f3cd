"""The functions that scripts written for 0.5 import from the module of a method."""

from pathlib import Path

import lightning as L
import pytest
import torch

from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.io import load_torch, load_weights
from litgpt.finetune import adapter, adapter_v2, full, lora, lora_legacy
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import LoRASettings, add_lora, mark_only_lora_as_trainable
from litgpt.model import GPT
from litgpt.registry import load_checkpoint_config
from litgpt.tokenizer import Tokenizer
from tests.finetune.conftest import Sums
from tests.finetune.test_loop import rows_of

TRAIN = TrainArgs(global_batch_size=4, micro_batch_size=2, epochs=1, save_interval=None, lr_warmup_steps=0)
EVAL = EvalArgs(interval=3, max_new_tokens=5, max_iters=2)


@pytest.fixture
def fabric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return L.Fabric(devices=1, accelerator="cpu", precision="32-true")


@pytest.mark.parametrize("module", [full, lora, adapter, adapter_v2, lora_legacy])
def test_published_names_are_there(module):
    names = ["setup", "main", "fit", "validate", "generate_example", "get_lr_scheduler", "get_dataloaders"]
    assert all(callable(getattr(module, name)) for name in [*names, "get_longest_seq_length", "validate_args"])


@pytest.mark.parametrize("module", [full, lora, adapter, adapter_v2])
def test_main_runs_on_a_fabric_of_the_caller(fabric, checkpoint_dir, module):
    config = load_checkpoint_config(checkpoint_dir)[1]
    how = dict(config=config, data=Sums(), checkpoint_dir=checkpoint_dir, out_dir=Path("out"), train=TRAIN, eval=EVAL)
    more = {"resume": False} if module in (full, adapter_v2) else {}
    if module is lora:
        how["config"] = LoRAConfig.from_checkpoint(checkpoint_dir, lora_r=4, lora_alpha=8, lora_query=True)
    module.main(fabric, devices=1, seed=1, optimizer="AdamW", **how, **more)
    assert len(rows_of("out")) == 6 and list(Path("out/final").glob("lit_model.pth*"))
    if module is lora:
        weights = load_torch("out/final/lit_model.pth.lora")["model"]
        assert weights["transformer.h.0.attn.qkv.lora_A"].shape == (4, 32)  # the query alone, of rank 4


def test_parts_made_by_hand_are_trained_by_fit_and_saved(fabric, checkpoint_dir):
    tokenizer, data = Tokenizer(checkpoint_dir), Sums()
    model = GPT(load_checkpoint_config(checkpoint_dir)[1])
    model.load_state_dict(load_weights(checkpoint_dir))
    add_lora(model, LoRASettings())
    mark_only_lora_as_trainable(model)
    model = fabric.setup(model)
    optimizer = fabric.setup_optimizers(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))
    scheduler = lora.get_lr_scheduler(optimizer, warmup_steps=2, max_steps=6)
    train_dataloader, val_dataloader = lora.get_dataloaders(fabric, data, tokenizer, TRAIN)
    longest, index = lora.get_longest_seq_length(data.train_dataset)
    assert len(data.train_dataset[index]["input_ids"]) == longest
    before = lora.validate(fabric, model, val_dataloader, EVAL)
    counts = lora.fit(
        fabric, model, optimizer, scheduler, train_dataloader, val_dataloader, 1, checkpoint_dir, Path("out"), TRAIN,
        EVAL, data,
    )  # fmt: skip
    assert lora.validate(fabric, model, val_dataloader, EVAL) < before
    rates = [row["learning_rate"] for row in rows_of("out")]
    assert rates[0] == pytest.approx(0.005) and rates[1] == 0.01 and rates[-1] == 0
    assert counts["raw_tokens_plus_prompt_template"] == sum(len(e["input_ids"]) for e in data.train_dataset)
    lora.save_lora_checkpoint(fabric, model, Path("part.pth"))
    assert all("lora_" in name for name in load_torch("part.pth")["model"])
    assert lora.generate_example(fabric, model, tokenizer, EVAL, data)


@pytest.mark.parametrize("warmup", [0, 3, 10, 50])
def test_scheduler_takes_any_warmup(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = full.get_lr_scheduler(optimizer, warmup, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] > 0 and max(rates) > 0.9 and rates[-1] == pytest.approx(0, abs=1e-6)
