"""LIMA: 1,000 prompts with careful answers (arXiv:2305.11206)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from litgpt.data.base import cache_folder
from litgpt.data.hub_data import download_dataset
from litgpt.data.json_data import load_files
from litgpt.data.sft import SFTDataModule, split_samples


@dataclass(kw_only=True)
class LIMA(SFTDataModule):
    """The LIMA data set, whose conversations become single questions with answers. Its repo is gated."""

    val_split_fraction: float = 0.1
    """Share of the samples that is kept for validation."""
    include_multiturn_conversations: bool = False
    """Take every exchange of a conversation as a sample of its own, not only the first."""
    repo_id: str = "GAIR/lima"
    """Data set repo on the Hugging Face hub."""
    access_token: str | None = field(repr=False, default=None)
    """Access token of the hub for an account that may read the repo. Default: HF_TOKEN or a saved login."""

    def prepare_data(self) -> None:
        download_dataset(self.repo_id, cache_folder() / "lima", self.access_token)

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        files = download_dataset(self.repo_id, cache_folder() / "lima", self.access_token)["train"]
        samples = format_dataset(load_files(files, check=False), self.include_multiturn_conversations)
        return split_samples(samples, self.val_split_fraction, self.seed)


def format_dataset(dataset_partition: Sequence[dict], include_multi_turn_conversations: bool) -> list[dict]:
    """Questions with answers out of rows whose `conversations` are texts in turn: the first of each, or all."""
    samples = []
    for row in dataset_partition:
        texts = row["conversations"]
        pairs = list(zip(texts[::2], texts[1::2]))
        pairs = pairs if include_multi_turn_conversations else pairs[:1]
        samples += [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]
    return samples
