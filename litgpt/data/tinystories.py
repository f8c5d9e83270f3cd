"""TinyStories: short stories in simple words, written by GPT-3.5 and GPT-4 (arXiv:2305.07759)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from litgpt.data.documents import Piece, hash_files
from litgpt.data.download import download_file, unpack_tar
from litgpt.data.pretraining import TokenData
from litgpt.tokenizer import Tokenizer

_URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"


@dataclass
class TinyStories(TokenData):
    """The TinyStories data set (about 2 million stories, a download of 1.6 GB); each story is one document."""

    data_path: Path = Path("data/tinystories")
    """Folder for the download and the tokens made of it."""
    seed: int = 42
    """Decides the order of the training samples."""
    num_workers: int = 8
    """Processes that tokenise the stories. Reading the tokens needs none."""

    bos: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.data_path = Path(self.data_path).expanduser()

    def files(self, split: str) -> list[Path]:
        """The JSON files of `split`: the first of all is for validation."""
        files = sorted(download(self.data_path).glob("*.json"))
        if len(files) < 2:
            raise ValueError(f"{len(files)} JSON files in {self.data_path / 'TinyStories_all_data'} instead of 50")
        return {"train": files[1:], "val": files[:1]}[split]

    def sources(self, split: str) -> Sequence["StoryFile"]:
        return [StoryFile(path, path.stat().st_size) for path in self.files(split)]

    def content_hash(self, split: str) -> str:
        return hash_files(self.files(split), self.shards_root() / "files.json")

    def shards_root(self) -> Path:
        return self.data_path / "shards"


@dataclass(frozen=True)
class StoryFile:
    """One file of the archive: a JSON list of `{"story": text, ...}`."""

    path: Path
    n_bytes: int

    def pieces(self) -> Iterator[Piece]:
        """A piece for each story."""
        try:
            stories = [row["story"].strip() for row in json.loads(self.path.read_text(encoding="utf-8"))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete the folder {self.path.parent}") from error
        return (Piece(story) for story in stories if story)


def tokenize(filename: str, tokenizer: Tokenizer) -> Iterator[Tensor]:
    """Ids of each story of a file with the begin-of-text token, for scripts that tokenise by themselves."""
    for piece in StoryFile(Path(filename), 0).pieces():
        yield tokenizer.encode(piece.text, bos=True, eos=False)


def download(data_dir: Path) -> Path:
    """Fetch and unpack the archive below `data_dir`, unless that is done; returns the folder with the JSON files."""
    folder = Path(data_dir) / "TinyStories_all_data"
    if folder.is_dir():
        return folder
    archive = download_file(_URL, Path(data_dir) / "TinyStories_all_data.tar.gz")
    return unpack_tar(archive, folder)
