"""Plain text files as pretraining data."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from litgpt.data.base import cache_folder, is_writable, rank_and_world
from litgpt.data.documents import TextRange, hash_files, hash_texts, hold_out_end, split_range
from litgpt.data.pretraining import TokenData, validate_tokenizer
from litgpt.tokenizer import Tokenizer

__all__ = ["TextFiles", "tokenize", "validate_tokenizer"]

VAL_FRACTION = 0.1
"""Share of a single text file that is kept for validation."""


@dataclass
class TextFiles(TokenData):
    """Text files (`*.txt`, UTF-8); each file is one document."""

    train_data_path: Path
    """Folder with `*.txt` files, or one text file. Tokens are kept below it in a folder `.litgpt`."""
    val_data_path: Path | None = None
    """Folder or file to validate on. Without it the first file of the training folder is used (and not trained on);
    a single file gives its last tenth."""
    seed: int = 42
    """Decides the order of the training samples."""
    num_workers: int = 4
    """Processes that tokenise the text. Reading the tokens needs none."""

    bos: ClassVar[bool] = True
    _splits: dict[str, list[TextRange]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.train_data_path = Path(self.train_data_path).expanduser()
        if self.val_data_path is not None:
            self.val_data_path = Path(self.val_data_path).expanduser()

    def splits(self) -> dict[str, list[TextRange]]:
        """Each file, or part of a single file, of the two splits."""
        if not self._splits:
            train = text_files(self.train_data_path, "--data.train_data_path")
            if self.val_data_path is not None:
                val = text_files(self.val_data_path, "--data.val_data_path")
                if both := {p.resolve() for p in train} & {p.resolve() for p in val}:
                    warnings.warn(f"{len(both)} files are training and validation data: {min(both)} ...", stacklevel=2)
            elif len(train) > 1:
                train, val = train[1:], train[:1]
            else:
                if rank_and_world()[0] == 0:
                    print(f"{train[0]} is the only text file: its last {VAL_FRACTION:.0%} is used for validation")
                first, last = hold_out_end(train[0], VAL_FRACTION)
                self._splits = {"train": [first], "val": [last]}
                return self._splits
            self._splits = {split: [whole_file(p) for p in files] for split, files in (("train", train), ("val", val))}
        return self._splits

    def sources(self, split: str) -> Sequence[TextRange]:
        return [part for whole in self.splits()[split] for part in split_range(whole, self.shard_bytes)]

    def content_hash(self, split: str) -> str:
        ranges = self.splits()[split]
        contents = hash_files([text.path for text in ranges], self.shards_root() / "files.json")
        return hash_texts([contents, *(f"{text.start} {text.end}" for text in ranges)])

    def shards_root(self) -> Path:
        single = self.train_data_path.is_file()
        folder = self.train_data_path.parent if single else self.train_data_path
        if is_writable(folder):
            home = folder / ".litgpt"
        else:
            home = cache_folder() / "text_files" / f"{folder.name}-{hash_texts([str(folder.absolute())])[:12]}"
        return home / self.train_data_path.name if single else home


def text_files(path: Path, flag: str) -> list[Path]:
    """The text files that `path` means, sorted, those without content left out.

    Raises:
        FileNotFoundError: There is no such path, or no text file in the folder.
        ValueError: All the files are empty.
    """
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.is_file())
    else:
        raise FileNotFoundError(f"{path} does not exist: {flag} names a folder with *.txt files, or a text file")
    if not files:
        raise FileNotFoundError(f"no *.txt files in {path}: {flag} names a folder with *.txt files, or a text file")
    if not (filled := [file for file in files if file.stat().st_size]):
        raise ValueError(f"all {len(files)} text files of {path} are empty" if len(files) > 1 else f"{path} is empty")
    return filled


def whole_file(path: Path) -> TextRange:
    """All of a text file as one document."""
    return TextRange(path, 0, path.stat().st_size)


def tokenize(filename: str, tokenizer: Tokenizer) -> Iterator[Tensor]:
    """Ids of a text file with the begin-of-text token, for scripts that tokenise by themselves."""
    yield tokenizer.encode(whole_file(Path(filename)).text(), bos=True, eos=False)
