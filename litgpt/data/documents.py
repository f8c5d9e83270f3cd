"""Sources of text for the token shards: what can be read again, in pieces, in another process."""

import codecs
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

PIECE_BYTES = 1 << 20
"""Longest text that is tokenised in one go. Only a longer file is cut, at the end of a line."""

MIN_STAT_AGE_NS = 2_000_000_000
"""A file that was changed less than this before it was hashed may change again with the same time stamp."""


class Piece(NamedTuple):
    """A stretch of text of at most about `PIECE_BYTES`, and whether a document begins and ends with it."""

    text: str
    opens: bool = True
    closes: bool = True


class Source(Protocol):
    """Some documents, or a part of one. Pickled into the process that tokenises it."""

    n_bytes: int

    def pieces(self) -> Iterator[Piece]:
        """The text in order."""


@dataclass(frozen=True)
class Texts:
    """Documents that are in memory already."""

    documents: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return sum(len(text) for text in self.documents)

    def pieces(self) -> Iterator[Piece]:
        return (Piece(text) for text in self.documents)


@dataclass(frozen=True)
class TextRange:
    """Bytes `start` to `end` of a UTF-8 text file; a document begins with the first, ends with the last, or neither."""

    path: Path
    start: int
    end: int
    opens: bool = True
    closes: bool = True

    @property
    def n_bytes(self) -> int:
        return self.end - self.start

    def pieces(self) -> Iterator[Piece]:
        """The text with line ends made `\\n`.

        Raises:
            ValueError: The file is no UTF-8 text; names the file and the offset of the first bad byte.
        """
        try:
            with open(self.path, "rb") as file:
                start = self.start
                while start < self.end:
                    stop = line_end(file, start + PIECE_BYTES, self.end)
                    file.seek(start)
                    text = decode_text(file.read(stop - start), self.path, start)
                    yield Piece(text, self.opens and start == self.start, self.closes and stop == self.end)
                    start = stop
        except OSError as error:
            raise OSError(f"cannot read {self.path}: {error.strerror or error}") from error

    def text(self) -> str:
        """All of it in one string."""
        return "".join(piece.text for piece in self.pieces())


def decode_text(raw: bytes, path: Path, offset: int) -> str:
    """Text of `raw`, which lies `offset` bytes into `path`."""
    way_out = "convert the file to UTF-8 text or take it out of the folder"
    if offset == 0 and raw.startswith(codecs.BOM_UTF8):
        raw, offset = raw[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    if (bad := raw.find(b"\0")) >= 0:
        raise ValueError(f"{path} is no text file: NUL byte at offset {offset + bad}; {way_out}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
        raise ValueError(f"{path} is not UTF-8 text: {bad}; {way_out}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def character_start(block: bytes, at: int) -> int:
    """First place at or after `at` in UTF-8 `block` where a character begins."""
    while at < len(block) and block[at] & 0xC0 == 0x80:
        at += 1
    return at


def line_end(file: BinaryIO, position: int, end: int) -> int:
    """First place at or after `position` where a line begins or, with none in the next `PIECE_BYTES`, a character."""
    if position >= end:
        return end
    file.seek(position - 1)  # a line that ends right before `position` ends there
    block = file.read(min(PIECE_BYTES, end - position + 1))
    found = block.find(b"\n")
    return position + found if found >= 0 else position - 1 + character_start(block, 1)


def split_range(whole: TextRange, max_bytes: int) -> list[TextRange]:
    """`whole` cut at line ends into parts of about `max_bytes`, so that several processes share a large file."""
    parts, start = [], whole.start
    with open(whole.path, "rb") as file:
        while start < whole.end:
            stop = line_end(file, start + max_bytes, whole.end)
            first, last = start == whole.start, stop == whole.end
            parts.append(TextRange(whole.path, start, stop, whole.opens and first, whole.closes and last))
            start = stop
    return parts


def hold_out_end(path: Path, fraction: float) -> tuple[TextRange, TextRange]:
    """A training and a validation part of a file: the latter is about the last `fraction`, from a paragraph's start."""
    size = path.stat().st_size
    target = int(size * (1 - fraction))
    with open(path, "rb") as file:
        look_back = min(1 << 16, int(size * fraction / 2))
        file.seek(target - look_back)
        before = file.read(look_back)
        cut = character_start(before + file.read(4), look_back) - look_back + target
    for border in (b"\n\n", b"\r\n\r\n", b"\n", b" "):
        if (found := before.rfind(border)) >= 0:
            cut = target - look_back + found + len(border)
            break
    return TextRange(path, 0, cut), TextRange(path, cut, size)


def hash_texts(texts: Iterable[str]) -> str:
    """Hash of documents in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def hash_files(paths: Sequence[Path], record: Path) -> str:
    """Hash of the contents of `paths` in their order.

    Args:
        paths: Files.
        record: JSON file that keeps size, time and hash of each, so that an unchanged file is not read again.
    """
    try:
        known = json.loads(record.read_text())
    except (OSError, ValueError):
        known = {}
    seen = {}
    for path in paths:
        stat, name = path.stat(), os.fspath(path.absolute())
        entry = known.get(name)
        if not entry or entry[:2] != [stat.st_size, stat.st_mtime_ns] or entry[2] - stat.st_mtime_ns < MIN_STAT_AGE_NS:
            now = time.time_ns()
            entry = [stat.st_size, stat.st_mtime_ns, now, hash_file(path)]
        seen[name] = entry
    if any(known.get(name) != entry for name, entry in seen.items()):
        write_json(record, {**known, **seen})
    return hash_texts(entry[3] for entry in seen.values())


def write_json(path: Path, value: object) -> None:
    """Replace `path` in one step, so that a reader or a crash never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
