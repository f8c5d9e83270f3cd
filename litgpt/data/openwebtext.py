"""OpenWebText: the open copy of GPT-2's training data, from the Hugging Face hub."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from litgpt.data.documents import Piece, hash_texts
from litgpt.data.pretraining import TokenData

_REPO_ID = "Skylion007/openwebtext"
ROWS_PER_SOURCE = 4096
ROWS_PER_READ = 256
BYTES_PER_ROW = 4900
"""Mean length of a page; only the progress bar and the size of the shards depend on it."""


@dataclass
class OpenWebText(TokenData):
    """The OpenWebText data set (8 million web pages, 13 GB to download, 18 GB of tokens); each page is one document."""

    data_path: str | Path = Path("data/openwebtext")
    """Folder for the tokens. The text itself stays in the cache of the package `datasets`."""
    val_split_fraction: float = 0.0005
    """Share of the pages that is kept for validation."""
    seed: int = 42
    """Decides which pages are for validation, and the order of the training samples."""
    num_workers: int = 8
    """Processes that tokenise the pages. Reading the tokens needs none."""

    eos: ClassVar[bool] = True
    shard_bytes: ClassVar[int] = 64 << 20
    _splits: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if "://" in str(self.data_path):
            raise ValueError(
                f"--data.data_path {self.data_path} must be a local folder; for chunks elsewhere use LitData"
            )
        self.data_path = Path(self.data_path).expanduser()
        if not 0 < self.val_split_fraction < 1:
            raise ValueError(f"--data.val_split_fraction is {self.val_split_fraction}; it must lie between 0 and 1")

    def splits(self) -> dict[str, Any]:
        """The pages of the two splits, downloaded on first use."""
        if not self._splits:
            try:
                from datasets import load_dataset
            except ImportError as error:
                raise ModuleNotFoundError(
                    "OpenWebText needs the package datasets: pip install 'litgpt[data]'"
                ) from error
            pages = load_dataset(_REPO_ID, split="train")
            parts = pages.train_test_split(test_size=self.val_split_fraction, seed=self.seed, shuffle=True)
            self._splits = {"train": parts["train"], "val": parts["test"]}
        return self._splits

    def sources(self, split: str) -> Sequence["PageRange"]:
        pages = self.splits()[split]
        return [
            PageRange(pages, i, min(i + ROWS_PER_SOURCE, len(pages))) for i in range(0, len(pages), ROWS_PER_SOURCE)
        ]

    def content_hash(self, split: str) -> str:
        return hash_texts(
            [_REPO_ID, split, str(self.val_split_fraction), str(self.seed), str(len(self.splits()[split]))]
        )

    def shards_root(self) -> Path:
        return self.data_path


@dataclass(frozen=True)
class PageRange:
    """Rows `start` to `end` of a Hugging Face data set with a column `text`; its files are mapped, not pickled."""

    pages: Any
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        return (self.end - self.start) * BYTES_PER_ROW

    def pieces(self) -> Iterator[Piece]:
        """A piece for each page."""
        for row in range(self.start, self.end, ROWS_PER_READ):
            yield from map(Piece, self.pages[row : min(row + ROWS_PER_READ, self.end)]["text"])
