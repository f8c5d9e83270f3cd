"""Alpaca: 52,000 instructions with answers, cleaned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.data.download import download_file
from litgpt.data.json_data import load_split
from litgpt.data.sft import SFTDataModule, split_samples

_URL = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"


@dataclass(kw_only=True)
class Alpaca(SFTDataModule):
    """The cleaned Alpaca data set: instructions, some with an input, and answers of a language model."""

    val_split_fraction: float = 0.03865  # 2,000 samples
    """Share of the samples that is kept for validation."""
    download_dir: Path = Path("./data/alpaca")
    """Folder for the download."""
    file_url: str = field(repr=False, default=_URL)
    """Where the file is fetched from."""
    file_name: str = field(repr=False, default="alpaca_data_cleaned_archive.json")
    """Name of the file in the folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.download_dir = Path(self.download_dir).expanduser()

    def prepare_data(self) -> None:
        download_if_missing(self.download_dir / self.file_name, self.file_url)

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        self.prepare_data()
        return split_samples(load_split(self.download_dir / self.file_name), self.val_split_fraction, self.seed)


def download_if_missing(file_path: Path, file_url: str, mode: str = "w", stream: bool = False) -> None:
    """Fetch `file_url` into `file_path` unless it is there. `mode` and `stream` are not needed any more."""
    download_file(file_url, Path(file_path))
