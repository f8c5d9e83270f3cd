"""SlimPajama as token shards for TinyLlama and MicroLlama: `python -m litgpt.data.prepare_slimpajama --help`."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from litgpt.data.documents import Piece
from litgpt.data.preparation import prepare_files
from litgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class SlimPajamaFile:
    """One `*.jsonl.zst` file: a JSON object with `text` and `meta` per line. What comes from GitHub is left out."""

    path: Path

    @property
    def n_bytes(self) -> int:
        return 3 * self.path.stat().st_size  # about what compression saves; only the progress bar depends on it

    def pieces(self) -> Iterator[Piece]:
        """A piece for each row."""
        try:
            import zstandard
        except ImportError as error:
            raise ModuleNotFoundError("*.zst files need the package zstandard: pip install zstandard") from error
        try:
            with open(self.path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as raw:
                for line in io.TextIOWrapper(raw, encoding="utf-8"):
                    row = json.loads(line)
                    if row["meta"]["redpajama_set_name"] != "RedPajamaGithub":
                        yield Piece(row["text"])
        except (ValueError, KeyError, zstandard.ZstdError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): download it again") from error


class SlimPajamaDataRecipe:
    """Files and rows of SlimPajama, for scripts that tokenise by themselves."""

    def __init__(self, tokenizer: Tokenizer, chunk_size: int) -> None:
        self.tokenizer, self.chunk_size = tokenizer, chunk_size

    def prepare_structure(self, input_dir: str | Path) -> list[str]:
        """The files below `input_dir`."""
        return sorted(os.fspath(path) for path in Path(input_dir).rglob("*.zst"))

    def prepare_item(self, filepath: str | Path) -> Iterator[Tensor]:
        """Ids of each row, with the end-of-text token."""
        for piece in SlimPajamaFile(Path(filepath)).pieces():
            yield self.tokenizer.encode(piece.text, bos=False, eos=True)


def prepare(
    input_dir: Path = Path("data/SlimPajama-627B/train"),
    output_dir: Path = Path("data/slimpajama/train"),
    tokenizer_path: Path = Path("checkpoints/Llama-2-7b-hf/"),
    chunk_size: int = 2049 * 16384,
    fast_dev_run: bool = False,
) -> None:
    """Tokenise SlimPajama. Can be interrupted: started again, it keeps the finished shards.

    Args:
        input_dir: Folder with the `*.jsonl.zst` files of one split, searched in all folders below.
        output_dir: Folder for the shards.
        tokenizer_path: Folder with the tokenizer of the model to be trained.
        chunk_size: Tokens per shard, roughly.
        fast_dev_run: Take only the first two files, to try it out.
    """
    tokenizer = Tokenizer(tokenizer_path)
    names = SlimPajamaDataRecipe(tokenizer, chunk_size).prepare_structure(input_dir)
    sources = [SlimPajamaFile(Path(name)) for name in names]
    prepare_files(Path(output_dir), sources, tokenizer, chunk_size, fast_dev_run, f"*.zst files below {input_dir}")


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(prepare)
