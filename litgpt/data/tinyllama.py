"""The data that TinyLlama was trained on: SlimPajama and Starcoder (arXiv:2401.02385)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from litgpt.data.base import DataModule
from litgpt.data.lit_data import folders_loader, join

WEIGHTS = (0.693584, 0.306416)
"""Shares of SlimPajama and Starcoder."""


@dataclass
class TinyLlama(DataModule):
    """SlimPajama and Starcoder as `litgpt.data.prepare_slimpajama` and `prepare_starcoder` write them."""

    data_path: str | Path = Path("data/")
    """Folder with slimpajama/train, slimpajama/val and starcoder: litgpt's shards, or litdata's chunks (may be s3://)."""
    seed: int = 42
    """Decides the order of the training samples."""
    num_workers: int = 8
    """Processes that read litdata's chunks; shards need none."""
    use_starcoder: bool = True
    """Whether to mix in Starcoder, 31 % of the samples."""

    batch_size: int = field(init=False, repr=False, default=1)
    seq_length: int = field(init=False, repr=False, default=2048)

    def connect(
        self, tokenizer: Any | None = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        self.batch_size = batch_size
        self.seq_length = (2048 if max_seq_length is None else max_seq_length) + 1

    def _folders(self) -> dict[str, str | Path]:
        names = {"train": "slimpajama/train", "val": "slimpajama/val"}
        if self.use_starcoder:
            names["starcoder"] = "starcoder"
        return {key: join(self.data_path, name) for key, name in names.items()}

    def prepare_data(self) -> None:
        """Check that the folders are there; they are prepared by scripts, which take days."""
        for folder in self._folders().values():
            if "://" not in str(folder) and not Path(folder).is_dir():
                source = "starcoder" if Path(folder).name == "starcoder" else "slimpajama"
                raise FileNotFoundError(
                    f"{folder} is missing: run `python -m litgpt.data.prepare_{source} --output_dir {folder}` "
                    "first, or give the right --data.data_path"
                )

    def train_dataloader(self) -> DataLoader:
        folders = self._folders()
        sources = [folders["train"], folders["starcoder"]] if self.use_starcoder else [folders["train"]]
        weights = WEIGHTS[: len(sources)]
        return folders_loader(sources, weights, self.seq_length, self.batch_size, self.seed, self.num_workers)

    def val_dataloader(self) -> DataLoader:
        folder = self._folders()["val"]
        return folders_loader([folder], [1.0], self.seq_length, self.batch_size, None, self.num_workers)
