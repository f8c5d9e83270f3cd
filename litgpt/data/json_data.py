"""Samples of your own, from files."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt.data.conversations import check_rows
from litgpt.data.rows import Rows, find_splits, read_files
from litgpt.data.sft import SFTDataModule, SFTDataset, split_samples

DEFAULT_FRACTION = 0.05


@dataclass
class JSON(SFTDataModule):
    """Your own samples: JSON, JSON Lines, CSV or Parquet, or a folder; instructions, chats, prompts with answers."""

    json_path: Path
    """A file (.json, .jsonl, .csv, .parquet), a folder with files called train and val, or a folder with a data set of
    Hugging Face."""
    val_split_fraction: float | None = field(default=None, kw_only=True)
    """Share of the samples that is kept for validation; not with a folder that has such samples. Default: 0.05."""
    val_dataset: SFTDataset | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.json_path = Path(self.json_path).expanduser()
        if not self.json_path.exists():
            raise FileNotFoundError(
                f"--data.json_path {self.json_path} does not exist: it names a file of samples, or a folder with files "
                "called train and val"
            )
        if self.json_path.is_dir() and self.val_split_fraction is not None and "val" in find_splits(self.json_path):
            raise ValueError(
                f"{self.json_path} has validation samples of its own, so --data.val_split_fraction must not be given"
            )
        if self.json_path.is_file() and self.val_split_fraction is None:
            self.val_split_fraction = DEFAULT_FRACTION
            warnings.warn(
                f"--data.val_split_fraction is not given; {DEFAULT_FRACTION} of the samples are for validation",
                stacklevel=3,
            )

    def load_samples(self) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]:
        train, val = self.get_splits()
        return train, val

    def setup(self, stage: str = "") -> None:
        super().setup(stage)
        self.val_dataset = self.test_dataset

    def get_splits(self) -> tuple:
        """The samples for training and for validation, all of them checked."""
        if self.json_path.is_file():
            return split_samples(load_split(self.json_path), self.val_split_fraction, self.seed)
        splits = {name: load_files(files) for name, files in find_splits(self.json_path).items()}
        if "val" in splits:
            return splits["train"], splits["val"]
        return split_samples(
            splits["train"], DEFAULT_FRACTION if self.val_split_fraction is None else self.val_split_fraction, self.seed
        )

    def find_split(self, split_name: str) -> Path | None:
        """The file of `split_name`, "train" or "val", in the folder, if there is one."""
        files = find_splits(self.json_path).get(split_name)
        return files[0] if files else None


def load_split(json_path: Path) -> Any:
    """The samples of one file, all of them checked."""
    return load_files([Path(json_path)])


def load_files(files: Sequence[Path], check: bool = True) -> Rows:
    """The rows of all `files`; with `check` each must be a conversation or instruction."""
    rows = read_files(files)
    if check:
        check_rows(rows, rows.place)
    return rows
