"""Starcoder's code as token shards for TinyLlama: `python -m litgpt.data.prepare_starcoder --help`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from litgpt.data.documents import Piece
from litgpt.data.preparation import prepare_files
from litgpt.tokenizer import Tokenizer

ROWS_PER_READ = 256


@dataclass(frozen=True)
class StarcoderFile:
    """One `*.parquet` file with a column `content`; each row is a source file."""

    path: Path

    @property
    def n_bytes(self) -> int:
        return 3 * self.path.stat().st_size  # about what compression saves; only the progress bar depends on it

    def pieces(self) -> Iterator[Piece]:
        """A piece for each row."""
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise ModuleNotFoundError("*.parquet files need the package pyarrow: pip install 'litgpt[data]'") from error
        try:
            with ParquetFile(self.path) as file:
                for batch in file.iter_batches(ROWS_PER_READ, columns=["content"]):
                    yield from map(Piece, batch.column("content").to_pylist())
        except (pyarrow.ArrowException, KeyError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): download it again") from error


class StarcoderDataRecipe:
    """Files and rows of Starcoder, for scripts that tokenise by themselves."""

    def __init__(self, tokenizer: Tokenizer, chunk_size: int) -> None:
        self.tokenizer, self.chunk_size = tokenizer, chunk_size

    def prepare_structure(self, input_dir: str | Path) -> list[str]:
        """The files below `input_dir`."""
        return sorted(os.fspath(path) for path in Path(input_dir).rglob("*.parquet"))

    def prepare_item(self, item_metadata: str | Path) -> Iterator[Tensor]:
        """Ids of each row of a file, with the end-of-text token."""
        for piece in StarcoderFile(Path(item_metadata)).pieces():
            yield self.tokenizer.encode(piece.text, bos=False, eos=True)


def prepare(
    input_dir: Path = Path("data/starcoderdata"),
    output_dir: Path = Path("data/starcoder"),
    tokenizer_path: Path = Path("checkpoints/Llama-2-7b-hf/"),
    chunk_size: int = 2049 * 8192,
    fast_dev_run: bool = False,
) -> None:
    """Tokenise Starcoder. Can be interrupted: started again, it keeps the finished shards.

    Args:
        input_dir: Folder with the `*.parquet` files, searched in all folders below.
        output_dir: Folder for the shards.
        tokenizer_path: Folder with the tokenizer of the model to be trained.
        chunk_size: Tokens per shard, roughly.
        fast_dev_run: Take only the first two files, to try it out.
    """
    tokenizer = Tokenizer(tokenizer_path)
    names = StarcoderDataRecipe(tokenizer, chunk_size).prepare_structure(input_dir)
    sources = [StarcoderFile(Path(name)) for name in names]
    prepare_files(Path(output_dir), sources, tokenizer, chunk_size, fast_dev_run, f"*.parquet files below {input_dir}")


if __name__ == "__main__":
    from jsonargparse import CLI

    CLI(prepare)
