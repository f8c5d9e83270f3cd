"""What every data module offers, and where data may be written."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist


class DataModule(ABC):
    """Supplies the training and validation batches of one data set.

    A command calls `connect` once, then `prepare_data` (downloads, tokenises; safe to call in every process and again
    after an interruption), `setup`, and the two loaders. A subclass is a dataclass: its fields are the flags
    `--data.<field>`, the strings below them the help text.
    """

    @abstractmethod
    def connect(
        self, tokenizer: Any | None = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        """Take what the run decides: the tokenizer, samples per micro batch and rank, and tokens per sample."""

    def prepare_data(self) -> None:  # noqa: B027
        """Bring the data onto this machine in the form that the loaders read."""

    def setup(self, stage: str = "") -> None:  # noqa: B027
        """Open what `prepare_data` has left."""

    @abstractmethod
    def train_dataloader(self) -> Any:
        """Batches to train on; one iteration is one epoch."""

    @abstractmethod
    def val_dataloader(self) -> Any | None:
        """Batches to validate on, always the same and in the same order, or None if there are none."""

    def texts(self, split: str = "train") -> Iterator[str]:
        """Raw documents of `split` ("train" or "val"), for training a tokenizer. Needs no `connect`."""
        raise ValueError(
            f"{type(self).__name__} has no raw text to train a tokenizer on; use TextFiles, TinyStories or PythonDocs"
        )

    def bytes_per_token(self, split: str = "val") -> float | None:
        """UTF-8 bytes of text per token of `split`, or None where it is not known. Turns loss into nats per byte."""
        return None


def rank_and_world() -> tuple[int, int]:
    """Rank of this process and number of processes, `(0, 1)` outside of a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def cache_folder() -> Path:
    """Folder for data that has no home of its own: the environment variable LITGPT_CACHE or `~/.cache/litgpt`."""
    return Path(os.environ.get("LITGPT_CACHE") or Path.home() / ".cache" / "litgpt").expanduser()


def is_writable(folder: Path) -> bool:
    """Whether files may be put into the existing `folder`; one without any write bit is left alone even by root."""
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)
