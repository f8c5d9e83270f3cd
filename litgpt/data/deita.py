"""Deita: 10,000 conversations, chosen for quality and difficulty (arXiv:2312.15685)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.data.conversations import as_conversation, exchanges
from litgpt.data.hub_data import download_dataset
from litgpt.data.json_data import load_files
from litgpt.data.sft import SFTDataModule


@dataclass(kw_only=True)
class Deita(SFTDataModule):
    """The Deita data set, whose conversations become single questions with answers."""

    include_multiturn_conversations: bool = False
    """Take every exchange of a conversation as a sample of its own, not only the first."""
    download_dir: Path = Path("./data/deita")
    """Folder for the download."""
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"
    """Data set repo on the Hugging Face hub."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.download_dir = Path(self.download_dir).expanduser()

    def prepare_data(self) -> None:
        self.files()

    def files(self) -> dict[str, list[Path]]:
        """The files of both splits, fetched if need be."""
        wanted = {"train": "train_sft", "val": "test_sft"}
        return download_dataset(self.repo_id, self.download_dir, splits=wanted)

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        files, multi = self.files(), self.include_multiturn_conversations
        return tuple(format_dataset(load_files(files[split], check=False), multi) for split in ("train", "val"))


def format_dataset(dataset: list[dict], include_multi_turn_conversations: bool) -> list[dict]:
    """Questions with answers out of rows with `messages`: the first of each conversation, or all."""
    samples = []
    for row in dataset:
        pairs = list(exchanges(as_conversation({"messages": row["messages"]})))
        pairs = pairs if include_multi_turn_conversations else pairs[:1]
        samples += [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]
    return samples
