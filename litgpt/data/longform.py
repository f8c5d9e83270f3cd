"""LongForm: instructions for long texts that people have written (arXiv:2304.08460)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.data.download import download_file
from litgpt.data.json_data import load_files
from litgpt.data.sft import SFTDataModule
from litgpt.prompts import PromptStyle

_URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"


@dataclass(kw_only=True)
class LongForm(SFTDataModule):
    """The LongForm data set: long texts, and for each the instruction that could have led to it."""

    prompt_style: str | PromptStyle = "longform"
    """How an instruction is dressed: a prompt style, or "template" for the chat template of the tokenizer."""
    download_dir: Path = Path("./data/longform")
    """Folder for the download."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.download_dir = Path(self.download_dir).expanduser()

    def prepare_data(self) -> None:
        self.files()

    def files(self) -> list[Path]:
        """The files of both splits, fetched if need be."""
        return [download_file(f"{_URL}/{name}", self.download_dir / name) for name in ("train.json", "val.json")]

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        return tuple(
            [{"instruction": row["input"], "output": row["output"]} for row in load_files([file], check=False)]
            for file in self.files()
        )
