"""Folders of tokens that were prepared beforehand: litdata's chunks, or the shards that litgpt writes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from litgpt.data.base import DataModule
from litgpt.data.sampler import MixedStream, TokenLoader, WindowStream
from litgpt.data.shards import INDEX, TokenShards, is_shards_folder

VAL_FRACTION = 0.05
"""Share of the chunks' samples that is kept for validation where no split has a folder of its own."""


@dataclass
class LitData(DataModule):
    """Tokens in litdata's format, written by `litdata.optimize` with a TokensLoader (needs the package litdata)."""

    data_path: str | Path = Path("data/")
    """Folder with the chunks, or the folder above those of the splits. May be remote, such as s3://bucket/path."""
    split_names: tuple[str, str] | None = None
    """Folders below data_path for training and validation. Without them a twentieth of the samples, always the same,
    is kept for validation and never trained on."""
    seed: int = 42
    """Decides the order of the training samples."""
    num_workers: int = 8
    """Processes that read."""

    batch_size: int = field(init=False, repr=False, default=1)
    seq_length: int = field(init=False, repr=False, default=2048)

    def __post_init__(self) -> None:
        if self.split_names is not None and len(self.split_names) != 2:
            raise ValueError(f"--data.split_names needs two names, training and validation, not {self.split_names}")

    def connect(
        self, tokenizer: Any | None = None, batch_size: int = 1, max_seq_length: int | None = None, **kwargs: Any
    ) -> None:
        self.batch_size = batch_size
        self.seq_length = (2048 if max_seq_length is None else max_seq_length) + 1

    def train_dataloader(self) -> DataLoader:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader:
        return self._loader(1)

    def _loader(self, split: int) -> DataLoader:
        seed = self.seed if split == 0 else None
        if self.split_names is not None:
            folder = join(self.data_path, self.split_names[split])
            return folders_loader([folder], [1.0], self.seq_length, self.batch_size, seed, self.num_workers)
        if is_shards_folder(Path(self.data_path)):
            raise ValueError(
                f"{self.data_path} is one folder of litgpt shards: --data.split_names says which to validate on"
            )
        parts = hold_out(open_chunks(self.data_path, self.seq_length, seed), self.data_path)
        return chunks_loader(parts[split], self.batch_size, self.num_workers)


def join(folder: str | Path, name: str) -> str | Path:
    """`folder/name`, also where `folder` is a URL."""
    return f"{str(folder).rstrip('/')}/{name}" if "://" in str(folder) else Path(folder) / name


def folders_loader(
    folders: Sequence[str | Path],
    weights: Sequence[float],
    seq_length: int,
    batch_size: int,
    seed: int | None,
    num_workers: int,
) -> DataLoader:
    """Loader of batches `(B, seq_length)` int64 over folders of shards, or all of litdata's chunks.

    Args:
        folders: Where the tokens are.
        weights: Share of each folder in the samples.
        seq_length: Tokens per sample, the one that is only predicted included.
        batch_size: Samples per batch and rank.
        seed: Decides the order; None is validation: the order of the folder, one pass.
        num_workers: Processes that read chunks; shards need none.
    """
    kinds = {is_shards_folder(Path(folder)) for folder in folders}
    if kinds == {True}:
        streams = [WindowStream(TokenShards(Path(folder)), seq_length - 1, seed) for folder in folders]
        stream = streams[0] if len(streams) == 1 else MixedStream(streams, weights)
        return TokenLoader(stream, batch_size, endless=seed is not None)
    if kinds == {True, False}:
        raise ValueError(
            f"one of {', '.join(map(str, folders))} has litgpt's shards, another has not; prepare all alike"
        )
    datasets = [open_chunks(folder, seq_length, seed) for folder in folders]
    if len(datasets) == 1:
        return chunks_loader(datasets[0], batch_size, num_workers)
    mixed = import_litdata().CombinedStreamingDataset(
        datasets=datasets, seed=seed, weights=list(weights), iterate_over_all=False
    )
    return chunks_loader(mixed, batch_size, num_workers)


def import_litdata() -> Any:
    """The package litdata."""
    try:
        import litdata
    except ImportError as error:
        raise ModuleNotFoundError(
            "reading litdata chunks needs the package litdata: pip install 'litgpt[data]'"
        ) from error
    return litdata


def open_chunks(folder: str | Path, seq_length: int, seed: int | None) -> Any:
    """A litdata `StreamingDataset` of blocks of `seq_length` tokens, shuffled if there is a seed."""
    if "://" not in str(folder) and not (Path(folder) / INDEX).is_file():
        raise FileNotFoundError(f"no tokens in {folder}: {INDEX} is missing there; is --data.data_path right?")
    litdata = import_litdata()
    return litdata.StreamingDataset(
        input_dir=str(folder),
        item_loader=litdata.TokensLoader(block_size=seq_length),
        shuffle=seed is not None,
        drop_last=seed is not None,
        seed=42 if seed is None else seed,
    )


def hold_out(dataset: Any, folder: str | Path) -> Sequence[Any]:
    """Two parts of `dataset` for training and validation that have no sample in common, the same in every run."""
    if len(dataset) * VAL_FRACTION < 1:
        raise ValueError(
            f"{folder} has {len(dataset)} samples, too few to keep {VAL_FRACTION:.0%} for validation: "
            "lower --train.max_seq_length or name two folders by --data.split_names"
        )
    return import_litdata().train_test_split(dataset, [1 - VAL_FRACTION, VAL_FRACTION], seed=42)


def chunks_loader(dataset: Any, batch_size: int, num_workers: int) -> DataLoader:
    """litdata's loader; it shares the chunks among the ranks itself."""
    return import_litdata().StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=stack, pin_memory=torch.cuda.is_available()
    )


def stack(rows: list[Tensor]) -> Tensor:
    """Rows `(T + 1,)` of any integer type -> `(B, T + 1)` int64."""
    return torch.stack([row.long() for row in rows])
