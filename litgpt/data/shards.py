"""Token shards: a folder of token ids in plain binary files with an index, and the reader of it.

    index.json          version, dtype, fingerprint, and for each shard its file, tokens, documents, bytes of text
    shard-00000.bin     token ids, nothing else, little endian uint16 or uint32

The shards are one long sequence of tokens, in the order of the index. `preparation.py` writes them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litgpt.data.documents import write_json

VERSION = 1
INDEX = "index.json"


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    file: str
    tokens: int
    documents: int
    bytes: int
    """Bytes of the text as UTF-8."""


def token_dtype(tokenizer: Any) -> np.dtype:
    """The narrower of uint16 and uint32 that holds every id of `tokenizer`, added tokens included."""
    sizes = [tokenizer.vocab_size]
    if hasattr(processor := getattr(tokenizer, "processor", None), "get_vocab_size"):
        sizes.append(processor.get_vocab_size(with_added_tokens=True))
    special = (getattr(tokenizer, "bos_id", None), getattr(tokenizer, "eos_id", None))
    sizes += [id + 1 for id in special if id is not None]
    return np.dtype("<u2" if max(sizes) <= 1 << 16 else "<u4")


def write_index(folder: Path, shards: list[Shard], dtype: np.dtype, fingerprint: str) -> None:
    """Declare `folder` complete."""
    index = {
        "format": "litgpt token shards",
        "version": VERSION,
        "dtype": dtype.name,
        "fingerprint": fingerprint,
        "shards": [asdict(shard) for shard in shards],
    }
    write_json(folder / INDEX, index)


def is_shards_folder(folder: Path) -> bool:
    """Whether `folder` holds complete token shards (litdata also has an `index.json`)."""
    try:
        return "litgpt" in json.loads((Path(folder) / INDEX).read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


class TokenShards:
    """The tokens of a folder of shards as one sequence, memory-mapped.

    Raises:
        FileNotFoundError: There is no index, so the preparation has not ended.
        ValueError: The index is damaged or of another version, or a shard has not the size that it says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"no token shards in {self.folder}: {INDEX} is missing, prepare the data first")
        try:
            index = json.loads(path.read_text())
            version = index["version"]
            dtype = np.dtype(index["dtype"]).newbyteorder("<")
            self.fingerprint = index["fingerprint"]
            self.shards = [Shard(**shard) for shard in index["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"damaged index {path} ({error}); delete {self.folder} to prepare the data again"
            ) from error
        if version != VERSION:
            raise ValueError(f"{path} has version {version}, this litgpt reads {VERSION}; delete {self.folder}")
        self.dtype = dtype
        self._arrays = []
        for shard in self.shards:
            file, wanted = self.folder / shard.file, shard.tokens * dtype.itemsize
            found = file.stat().st_size if file.is_file() else "no"
            if found != wanted:
                raise ValueError(f"{file} has {found} bytes instead of {wanted}; delete {self.folder} to prepare again")
            empty = shard.tokens == 0  # numpy cannot map an empty file
            self._arrays.append(np.empty(0, dtype) if empty else np.memmap(file, dtype, mode="r"))
        self._ends = np.cumsum([shard.tokens for shard in self.shards])

    def __reduce__(self) -> tuple:
        return TokenShards, (self.folder,)  # another process maps the files itself

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._ends[-1]) if self.shards else 0

    @property
    def n_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Bytes of the text as UTF-8."""
        return sum(shard.bytes for shard in self.shards)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens that begin at each of `starts`: `(B,)` -> `(B, length)` int64."""
        out = np.empty((len(starts), length), np.int64)
        first = np.searchsorted(self._ends, starts, side="right")
        for row, start, shard in zip(out, starts.tolist(), first.tolist()):
            offset, filled = start - int(self._ends[shard]) + self.shards[shard].tokens, 0
            while filled < length:
                part = self._arrays[shard][offset : offset + length - filled]
                row[filled : filled + len(part)] = part
                filled, shard, offset = filled + len(part), shard + 1, 0
        return out
