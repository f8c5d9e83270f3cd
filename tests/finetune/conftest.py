"""A tiny pretrained model, and data that needs no files, for the tests of finetuning."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from litgpt.args import EvalArgs, TrainArgs
from litgpt.checkpoint.io import save_torch
from litgpt.config import Config, save_config
from litgpt.data.base import DataModule
from litgpt.data.batching import ExampleLoader
from litgpt.model import GPT
from litgpt.tokenizer_training import train_tokenizer

WORDS = ["tree", "house", "river", "blue", "green", "fast", "slow", "and", "then", "now"]
CONFIG = dict(
    name="tiny", n_layer=3, n_embd=32, n_head=4, n_query_groups=2, block_size=64, vocab_size=300, padded_vocab_size=320,
    intermediate_size=48, mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False, rotary_percentage=1.0,
    parallel_residual=False, dropout=0.1,
)  # fmt: skip


@dataclass
class Sums(DataModule):
    """Examples of uneven length with masked prompts; shuffled by a generator, as published, or by arithmetic."""

    n: int = 22
    n_val: int = 4
    seed: int = 7
    masked: bool = True
    own_loader: bool = False

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **_):
        self.tokenizer, self.batch_size, self.max_seq_length = tokenizer, batch_size, max_seq_length

    def setup(self, stage=""):
        examples = [self.example(i) for i in range(self.n + self.n_val)]
        self.train_dataset, self.test_dataset = examples[: self.n], examples[self.n :]

    def example(self, i):
        rng = random.Random(i)
        words = rng.choices(WORDS, k=rng.randint(2, 9))
        prompt = self.tokenizer.encode(" ".join(words) + " =")
        answer = self.tokenizer.encode(" " + " ".join(sorted(words)), bos=False, eos=True)
        ids = torch.cat((prompt, answer)).long()[: self.max_seq_length]
        labels = ids.clone()
        if self.masked:
            labels[: len(prompt)] = -100
        return {"input_ids": ids, "labels": labels}

    def train_dataloader(self):
        if self.own_loader:
            return ExampleLoader(self.train_dataset, self.batch_size)
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_dataset, self.batch_size, shuffle=True, generator=generator, collate_fn=list)

    def val_dataloader(self):
        if self.own_loader:
            return ExampleLoader(self.test_dataset, self.batch_size, shuffle=False)
        return DataLoader(self.test_dataset, self.batch_size, collate_fn=list)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory) -> Path:
    """Folder of a tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    words = random.Random(0)
    train_tokenizer(iter([" ".join(words.choice(WORDS) for _ in range(400))]), 300, folder)
    make_checkpoint(folder)
    return folder


def make_checkpoint(folder: Path, config: Config | None = None, model: torch.nn.Module | None = None) -> None:
    """Write weights and model_config.yaml into a folder."""
    config = config or Config(**CONFIG)
    torch.manual_seed(1)
    model = model or GPT(config)
    model.init_weights() if hasattr(model, "init_weights") else None
    save_torch(model.state_dict(), folder / "lit_model.pth")
    save_config(config, folder)


@pytest.fixture
def settings(checkpoint_dir, tmp_path, monkeypatch):
    """Builds the arguments of a `setup`; `train` and `eval` may be given as dicts of what differs."""
    monkeypatch.chdir(tmp_path)

    def build(out_dir="out", train=None, eval=None, **values):
        train = dict(
            global_batch_size=4, micro_batch_size=2, epochs=None, max_steps=6, lr_warmup_steps=2, save_interval=None,
            max_norm=1.0, min_lr=1e-4,
        ) | (train or {})  # fmt: skip
        eval = dict(interval=1000, max_iters=2, final_validation=False, max_new_tokens=5) | (eval or {})
        return dict(
            checkpoint_dir=checkpoint_dir, out_dir=Path(out_dir), data=Sums(), precision="32-true", plot=False,
            optimizer={"class_path": "AdamW", "init_args": {"lr": 0.01}}, train=TrainArgs(**train),
            eval=EvalArgs(**eval),
        ) | values  # fmt: skip

    return build
