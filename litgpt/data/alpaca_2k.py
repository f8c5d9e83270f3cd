"""Alpaca2k: 2,000 samples of Alpaca, for short runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.data.alpaca import Alpaca
from litgpt.data.hub_data import download_dataset
from litgpt.data.json_data import load_files
from litgpt.data.sft import split_samples


@dataclass(kw_only=True)
class Alpaca2k(Alpaca):
    """2,000 samples of Alpaca."""

    val_split_fraction: float = 0.05  # 100 samples
    """Share of the samples that is kept for validation."""
    download_dir: Path = Path("./data/alpaca2k")
    """Folder for the download."""
    repo_id: str = field(repr=False, default="mhenrichsen/alpaca_2k_test")
    """Data set repo on the Hugging Face hub."""
    file_name: str = field(repr=False, default="alpaca2k_data_cleaned_archive.json")
    """Not needed: the names of the files are those of the repo."""

    def prepare_data(self) -> None:
        download_dataset(self.repo_id, self.download_dir)

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        files = download_dataset(self.repo_id, self.download_dir)["train"]
        return split_samples(load_files(files), self.val_split_fraction, self.seed)
