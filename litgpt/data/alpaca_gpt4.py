"""Alpaca's instructions with the answers of GPT-4 (arXiv:2304.03277)."""

from dataclasses import dataclass, field
from pathlib import Path

from litgpt.data.alpaca import Alpaca

_URL = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"


@dataclass(kw_only=True)
class AlpacaGPT4(Alpaca):
    """The instructions of Alpaca, answered by GPT-4."""

    val_split_fraction: float = 0.03847  # 2,000 samples
    """Share of the samples that is kept for validation."""
    download_dir: Path = Path("./data/alpacagpt4")
    """Folder for the download."""
    file_url: str = field(repr=False, default=_URL)
    """Where the file is fetched from."""
    file_name: str = field(repr=False, default="alpacagpt4_data_cleaned_archive.json")
    """Name of the file in the folder."""
