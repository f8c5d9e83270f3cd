"""Finding flipped bits: checksums are written with every weights file and compared when somebody asks for it.

A torch file carries a checksum of each record, which torch never compares; what lies between the records has none. Our
own files therefore end with one more, over the whole file, in the comment that the zip format allows at its end.
Safetensors have no place for one: theirs stand in `checksums.json` beside them.
"""

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from litgpt.checkpoint.folders import SEAL_BYTES, damaged, existing_file, is_complete, some

CHECKSUMS_NAME = "checksums.json"
ZIP_MAGIC = b"PK\x03\x04"
_OLD_TORCH_MAGIC = b"\x80\x02"
_SEAL = re.compile(rb"litgpt crc32 ([0-9a-f]{8})\n")
_SLICE_BYTES = 1 << 22
_FREE_BYTES = 1 << 20
"""Below this, what is parsed may take many times its size in memory."""


class Refused(ValueError):
    """A file that could be read, but asks for something that no weights file needs."""


class SummingFile:
    """Passes on what is written, one piece after the other, and keeps its checksum.

    It cannot seek, so that a writer never goes back to change what is in the sum already.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc, self.n_bytes = file, 0, 0

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        data = memoryview(data).cast("B")
        self.file.write(data)
        self.crc, self.n_bytes = zlib.crc32(data, self.crc), self.n_bytes + len(data)
        return len(data)

    def flush(self) -> None:
        """Hand everything to the system."""
        self.file.flush()


def seal_zip(file: BinaryIO, crc: int) -> None:
    """Add the checksum `crc` of a finished zip file as its comment; `file` stands at its end and is seekable."""
    file.seek(-2, 2)
    file.write(SEAL_BYTES.to_bytes(2, "little"))
    file.write(b"litgpt crc32 %08x\n" % crc)


def check_crc(path: Path | str) -> None:
    """Compare a weights file with the checksums written with it; reading does not.

    Costs about as much as reading the file once. Torch files in the old format, and safetensors without a
    `checksums.json` beside them, carry no checksums and pass.

    Args:
        path: A torch file, a `.safetensors`, or an index of shards, which are then checked one by one.

    Raises:
        ValueError: Some bits differ; names the file, the record and another checkpoint if there is one.
    """
    path = existing_file(path)
    if path.suffix in (".safetensors", ".json"):
        _check_listed(path)
        return
    if not has_checksums(path):
        return
    with open(path, "rb") as file:
        if (is_intact := _is_intact(file)) is not True:
            _check_records(path, file)
    if is_intact is False:
        raise damaged(path, "the checksum of the whole file is wrong")


def _is_intact(file: BinaryIO) -> bool | None:
    """Whether the checksum of the whole file is right; None if it has none, as files of torch itself."""
    n_bytes = file.seek(0, 2)
    end = max(0, n_bytes - SEAL_BYTES - 2)
    file.seek(max(0, end - 20))
    tail = file.read()
    seal = _SEAL.fullmatch(tail[-SEAL_BYTES:])
    if seal is None or tail[20:22] != SEAL_BYTES.to_bytes(2, "little"):
        return None if tail[-22:-18] == b"PK\5\6" else False
    file.seek(0)
    return zlib.crc32(b"\0\0", _crc_of(file, end)) == int(seal[1], 16)


def _check_records(path: Path, file: BinaryIO) -> None:
    try:
        records = zip_records(path)
    except ValueError as error:
        raise damaged(path, str(error).removeprefix(f"{path} is ")) from None
    for record in records:
        file.seek(max(0, record.header_offset))
        header = file.read(30)
        name = file.read(int.from_bytes(header[26:28], "little"))
        file.seek(int.from_bytes(header[28:30], "little"), 1)
        is_intact = header[:4] == ZIP_MAGIC and name == record.filename.encode()
        if not is_intact or _crc_of(file, record.file_size) != record.CRC:
            raise damaged(path, f"the checksum of its record `{record.filename}` is wrong")


def has_checksums(path: Path) -> bool:
    """Whether `check_crc` has anything to compare."""
    if path.suffix in (".safetensors", ".json"):
        return (path.parent / CHECKSUMS_NAME).is_file()
    with open(path, "rb") as file:
        return file.read(2) != _OLD_TORCH_MAGIC


def zip_records(path: Path) -> list[zipfile.ZipInfo]:
    """The table of contents of a torch file; refuses what could make it much larger in memory than on disk."""
    size = path.stat().st_size
    try:
        if not is_complete(path):
            raise ValueError
        if (n_table := _table_bytes(path)) > max(_FREE_BYTES, size // 8):
            raise Refused(f"{path} is refused: a table of contents of {n_table:,} bytes in a file of {size:,}")
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Refused:
        raise
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OverflowError):
        raise damaged(path, "the table of contents at its end is missing") from None
    if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
        raise Refused(f"{path} is refused: its record `{some(packed[:1])}` is compressed, which torch never does")
    if sum(record.file_size for record in records) > size:
        raise Refused(f"{path} is refused: its records overlap, so that it would grow while it is read")
    n_pickle = sum(record.file_size for record in records if record.filename.endswith(".pkl"))
    if n_pickle > max(_FREE_BYTES, size // 8):
        raise Refused(f"{path} is refused: a pickle of {n_pickle:,} bytes in a file of {size:,}")
    return records


def _table_bytes(path: Path) -> int:
    """Size of the table of contents as the end of a zip file says it."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 10)))
        tail = file.read()
    long_form = tail.rfind(b"PK\6\6")  # of files larger than 4 GB
    if long_form >= 0:
        return int.from_bytes(tail[long_form + 40 : long_form + 48], "little")
    short_form = tail.rfind(b"PK\5\6")
    return int.from_bytes(tail[short_form + 12 : short_form + 16], "little")


def write_checksums(folder: Path, crcs: dict[str, int]) -> None:
    """Write `checksums.json` for files of `folder`; to be called when they are complete."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "crc32": f"{crc:08x}"} for name, crc in crcs.items()}
    (folder / CHECKSUMS_NAME).write_text(json.dumps({"files": entries}, indent=1) + "\n", encoding="utf-8")


def _check_listed(path: Path) -> None:
    sums = path.parent / CHECKSUMS_NAME
    if not sums.is_file():
        return
    try:
        if sums.stat().st_size > 1 << 22:
            raise ValueError
        files = json.loads(sums.read_text(encoding="utf-8"))["files"]
        listed = {name: (entry["bytes"], int(entry["crc32"], 16)) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(sums, "it is no list of checksums") from None
    if path.name not in listed:
        raise damaged(path, f"{CHECKSUMS_NAME} beside it lists only {some(listed)}")
    wanted = [path.name]
    if path.name.endswith(".index.json"):
        wanted += [name for name in listed if name.endswith(".safetensors")]
    if any(Path(name).name != name for name in wanted):
        raise damaged(sums, "it names files in other folders")
    for name in wanted:
        file, (n_bytes, crc) = existing_file(path.parent / name), listed[name]
        if file.stat().st_size != n_bytes or crc_of_file(file) != crc:
            raise damaged(file, f"it differs from {CHECKSUMS_NAME}, which was written with it")


def crc_of_file(path: Path) -> int:
    """The checksum of a whole file."""
    with open(path, "rb") as file:
        return _crc_of(file, path.stat().st_size)


def _crc_of(file: BinaryIO, n_bytes: int) -> int:
    """The checksum of the next `n_bytes`, read in slices, so that memory stays small and Ctrl-C works."""
    crc, buffer = 0, memoryview(bytearray(min(_SLICE_BYTES, max(1, n_bytes))))
    while n_bytes and (n_read := file.readinto(buffer[:n_bytes])):  # type: ignore[attr-defined]
        crc, n_bytes = zlib.crc32(buffer[:n_read], crc), n_bytes - n_read
    return crc
