"""The default corpus: what every Python can read without a download."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.data.base import cache_folder
from litgpt.data.documents import Texts, hash_texts
from litgpt.data.pretraining import TokenData
from litgpt.data.python_corpus import is_held_out, python_documents


@dataclass
class PythonDocs(TokenData):
    """Documentation inside the running Python: language reference and docstrings, about 2 MB. Needs no download."""

    seed: int = 42
    """Decides the order of the training samples; which texts are for validation depends on the texts alone."""
    val_split_fraction: float = 0.05
    """Share of the documents that is kept for validation."""
    num_workers: int = 4
    """Processes that tokenise the text; so little of it is always done in this one."""

    bos: ClassVar[bool] = True
    eos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.val_split_fraction < 1:
            raise ValueError(f"--data.val_split_fraction is {self.val_split_fraction}; it must lie between 0 and 1")

    def sources(self, split: str) -> Sequence[Texts]:
        wanted = {"train": False, "val": True}[split]
        documents = python_documents()
        return [Texts(tuple(str(d) for d in documents if is_held_out(d.text, self.val_split_fraction) == wanted))]

    def content_hash(self, split: str) -> str:
        return hash_texts(text for source in self.sources(split) for text in source.documents)

    def shards_root(self) -> Path:
        return cache_folder() / "python_docs"
