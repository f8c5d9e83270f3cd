"""What every test starts from: a fixed seed, one thread, no traces of other tests; and the tiny things they share."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from litgpt import extension, registry
from litgpt.config import Config

TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps on, and the fox goes home.",
    "A small model learns a small text by heart: first the letters, then the words, then the lines.",
    "Wer früh aufsteht, sieht die Sonne. Ça va bien, merci! 日本語の文章もあります。 🦙 llamas eat hay.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3\n",
]
"""Documents of several languages, so that byte-level tokens get their share."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def same_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Seeds, one thread, an own cache folder, no token; afterwards dtype, device and registry are as before."""
    random.seed(1234)
    np.random.seed(1234)
    torch.manual_seed(1234)
    torch.set_num_threads(1)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LITGPT_DEBUG", "LIGHTNING_ARTIFACTS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path / "litgpt-cache"))
    tables = (registry._models, registry._objectives, registry._data, registry._sources, extension._loaded)
    before = [table.copy() for table in tables]
    dtype, device, deterministic = (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
    )
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None if device.type == "cpu" else device)
    torch.use_deterministic_algorithms(deterministic)
    for table, old in zip(tables, before):
        table.clear()
        table.update(old)


@pytest.fixture
def tiny_config() -> Callable[..., Config]:
    """Builds a config of two layers, width 32 and four heads; keyword arguments replace fields."""

    def build(**fields: object) -> Config:
        sizes = dict(name="tiny", n_layer=2, n_embd=32, n_head=4, block_size=64, padded_vocab_size=320, vocab_size=300)
        return Config(**{**sizes, **fields})

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE of 300 tokens, as `litgpt train_tokenizer` writes it."""
    from litgpt.tokenizer_training import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, folder)
    return folder


@pytest.fixture
def text_dir(tmp_path: Path) -> Path:
    """A folder with four text files of some kilobytes each."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"part-{i}.txt").write_text("\n".join(TEXTS[i:] + TEXTS[:i]) * 12, encoding="utf-8")
    return folder
