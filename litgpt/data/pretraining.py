"""The data module that pretraining corpora share: token shards of each split, read by the sampler."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from litgpt.data.base import DataModule
from litgpt.data.documents import Source
from litgpt.data.preparation import SHARD_BYTES, prepare_shards, tokenizer_hash
from litgpt.data.sampler import TokenLoader, WindowStream
from litgpt.data.shards import TokenShards


@dataclass
class TokenData(DataModule):
    """A corpus that is tokenised once into shards. A subclass says where its documents and its shards are."""

    bos: ClassVar[bool] = False
    """Whether the begin-of-text token goes before each document."""
    eos: ClassVar[bool] = False
    """Whether the end-of-text token goes after each document."""
    shard_bytes: ClassVar[int] = SHARD_BYTES

    tokenizer: Any = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)
    """Tokens per sample with the one that is only predicted, as published: that of the run + 1."""
    shards: dict[str, TokenShards] = field(default_factory=dict, init=False, repr=False)

    @abstractmethod
    def sources(self, split: str) -> Sequence[Source]:
        """The documents of `split`, "train" or "val"; raises ValueError or FileNotFoundError if there are none."""

    @abstractmethod
    def content_hash(self, split: str) -> str:
        """Hash of all text of `split`."""

    @abstractmethod
    def shards_root(self) -> Path:
        """Folder below which the shards of this corpus lie, a folder for each split and tokenizer."""

    def connect(
        self, tokenizer: Any | None = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_seq_length = (2048 if max_seq_length in (None, -1) else max_seq_length) + 1
        self.shards.clear()

    def prepare_data(self) -> None:
        validate_tokenizer(self.tokenizer)
        for split in ("train", "val"):
            sources = self.sources(split)
            self.shards[split] = prepare_shards(
                self.shards_root() / f"{split}-{tokenizer_hash(self.tokenizer)[:12]}",
                sources,
                self.tokenizer,
                self.content_hash(split),
                bos=self.bos,
                eos=self.eos,
                num_workers=self.num_workers,
                shard_bytes=self.shard_bytes,
            )

    def setup(self, stage: str = "") -> None:
        if not self.shards:
            self.prepare_data()

    def train_dataloader(self) -> TokenLoader:
        self.setup()
        stream = WindowStream(self.shards["train"], self.max_seq_length - 1, self.seed)
        return TokenLoader(stream, self.batch_size)

    def val_dataloader(self) -> TokenLoader:
        self.setup()
        return TokenLoader(WindowStream(self.shards["val"], self.max_seq_length - 1), self.batch_size, endless=False)

    def texts(self, split: str = "train") -> Iterator[str]:
        for source in self.sources(split):
            for piece in source.pieces():
                yield piece.text

    def bytes_per_token(self, split: str = "val") -> float | None:
        self.setup()
        return self.shards[split].n_bytes / max(1, len(self.shards[split]))


def validate_tokenizer(tokenizer: Any | None) -> None:
    """ValueError if there is no tokenizer."""
    if tokenizer is None:
        raise ValueError(
            "this data is text, and there is no tokenizer to turn it into tokens: give --tokenizer_dir FOLDER"
        )
