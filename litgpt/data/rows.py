"""Rows of the files in which people keep samples: JSON, JSON Lines, CSV, Parquet, and folders of Hugging Face datasets.

Every row is a plain dict and knows where it stood, so that a fault in it can be named.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Ending of a file name -> format."""

SPLIT_NAMES = {
    "train": ("train", "train_sft", "training"),
    "val": ("val", "validation", "valid", "dev", "test", "test_sft", "eval"),
}
"""What the two splits may be called, the best name first."""

MAX_CSV_FIELD = 1 << 30


class Rows(list):
    """Rows of one or more files; a list of dicts.

    Args:
        rows: The dicts.
        spans: `(file, what a row is called there, number of each row)` for each file, in order.
    """

    def __init__(
        self, rows: Iterable[dict[str, Any]] = (), spans: Iterable[tuple[Path, str, list[int] | range]] = ()
    ) -> None:
        super().__init__(rows)
        self.spans = list(spans)

    def place(self, n: int) -> str:
        """File and number of row `n`, for messages: `data.jsonl, line 17`."""
        for path, unit, numbers in self.spans:
            if n < len(numbers):
                return f"{path}, {unit} {numbers[n]}"
            n -= len(numbers)
        return f"sample {n + 1}"

    def append_rows(self, other: "Rows") -> None:
        """Add the rows of `other` behind these."""
        self.extend(other)
        self.spans += other.spans


def read_rows(path: Path) -> Rows:
    """All rows of one file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, damaged, of another format than its name says, or a row is no object. One line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a file of samples ({known_suffixes()})")
    form = SUFFIXES.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path}: the ending {path.suffix or '(none)'!r} is not known; expected {known_suffixes()}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; expected at least one sample")
    check_format(path, form)
    rows = {"json": read_json, "jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}[form](path)
    if not rows:
        raise ValueError(f"{path} holds no sample; expected at least one")
    for n, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{rows.place(n)}: is a {type(row).__name__}; expected an object with named values")
    return rows


def known_suffixes() -> str:
    """The endings, for messages."""
    return ", ".join(suffix for suffix in SUFFIXES if suffix not in (".ndjson", ".tsv"))


def check_format(path: Path, form: str) -> None:
    """Refuse a file whose first bytes say that it is of another format than `form`."""
    with open(path, "rb") as file:
        head = file.read(4096)
    found = sniff(head)
    fits = {
        "json": ("json", "object"),
        "jsonl": ("object",),
        "csv": ("text", "json", "object"),
        "parquet": ("parquet",),
    }
    if found not in fits[form] and not (form in ("json", "jsonl") and found == "text"):
        shown = {"json": "a JSON list", "object": "JSON", "text": "plain text"}.get(found, found)
        named = {"json": ".json", "object": ".jsonl", "parquet": ".parquet", "plain text": ".csv"}.get(found)
        way_out = f"rename it to {path.with_suffix(named).name}" if named else "unpack or convert it"
        raise ValueError(f"{path} is not {form.upper()} as its name says, but {shown}: {way_out}")


def sniff(head: bytes) -> str:
    """What the first bytes of a file look like."""
    magic = {
        b"PAR1": "parquet",
        b"ARROW1": "an Arrow file",
        b"\x1f\x8b": "a gzip archive",
        b"PK\x03\x04": "a zip archive",
    }
    magic |= {
        b"\x28\xb5\x2f\xfd": "a zstandard archive",
        b"\x80": "a Python pickle",
        b"\xd0\xcf\x11\xe0": "an Office file",
    }
    for start, name in magic.items():
        if head.startswith(start):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        return "an HTML or XML page"
    if b"\0" in head:
        return "binary data"
    return {b"[": "json", b"{": "object"}.get(text[:1], "text")


def read_text(path: Path) -> str:
    """Content of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from None


def read_json(path: Path) -> Rows:
    """Rows of a JSON list of objects."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Extra data":
            hint = f"; one object on each line is JSON Lines: rename it to {path.with_suffix('.jsonl').name}"
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}){hint}") from None
    except RecursionError:
        raise ValueError(f"{path}: lists and objects are nested too deeply") from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(lists) != 1:
            raise ValueError(
                f"{path} holds one object with the keys {', '.join(value)[:200]}; expected a list of samples"
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise ValueError(f"{path} holds a {type(value).__name__}; expected a list of samples")
    return Rows(value, [(path, "sample", range(1, len(value) + 1))])


def read_jsonl(path: Path) -> Rows:
    """Rows of a file with one JSON object on each line; empty lines are passed over."""
    rows, numbers = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})") from None
            except RecursionError:
                raise ValueError(f"{path}, line {number}: lists and objects are nested too deeply") from None
            numbers.append(number)
    return Rows(rows, [(path, "line", numbers)])


def read_csv(path: Path) -> Rows:
    """Rows of a table with a line of column names. A cell that is empty is no value."""
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").splitlines(keepends=True)
    if any("\0" in line for line in lines):
        raise ValueError(f"{path} is no text: it holds NUL bytes")
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    rows, numbers, names, start = [], [], None, 1
    try:
        for cells in reader:
            first, start = start, reader.line_num + 1
            if not cells:
                continue
            if names is None:
                names = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(names):
                raise ValueError(
                    f"{path}, line {first}: has {len(cells)} cells; the first line names {len(names)} columns"
                )
            rows.append({name: cell if cell or name == "output" else None for name, cell in zip(names, cells)})
            numbers.append(first)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    return Rows(rows, [(path, "line", numbers)])


def read_parquet(path: Path) -> Rows:
    """Rows of a Parquet file."""
    return table_rows(path, lambda arrow: import_arrow("parquet").read_table(path))


def read_arrow(path: Path) -> Rows:
    """Rows of an Arrow file, as `datasets.Dataset.save_to_disk` writes them."""

    def read(arrow: Any) -> Any:
        with arrow.memory_map(str(path)) as source:
            return import_arrow("ipc").open_stream(source).read_all()

    return table_rows(path, read)


def table_rows(path: Path, read: Any) -> Rows:
    """Rows of the Arrow table that `read` returns."""
    arrow = import_arrow()
    try:
        rows = read(arrow).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or of another format ({' '.join(str(error).split())[:200]})") from None
    return Rows(rows, [(path, "row", range(1, len(rows) + 1))])


def import_arrow(part: str | None = None) -> Any:
    """The package pyarrow or a module of it."""
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{part}" if part else "pyarrow")
    except ImportError as error:
        raise ModuleNotFoundError("Parquet and Arrow files need pyarrow: run `pip install 'litgpt[data]'`") from error


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """Files of the splits "train" and, if there is one, "val" in a folder.

    The folder has `train` and `val` files of a known ending, or is a data set of Hugging Face: one written by
    `save_to_disk`, or the files of a repo with names such as `data/train-00000-of-00002.parquet`.

    Raises:
        FileNotFoundError: There is no training data.
    """
    if (folder / "state.json").is_file():
        return {"train": saved_files(folder)}
    splits: dict[str, list[Path]] = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            if files := files_of_split(folder, name):
                splits[split] = files
                break
    if "train" not in splits:
        raise FileNotFoundError(
            f"no training data in {folder}: expected train.json (or {known_suffixes()}) and val.json, or a data set "
            "written by save_to_disk or with files such as data/train-00000-of-00001.parquet"
        )
    return splits


def files_of_split(folder: Path, name: str) -> list[Path]:
    """Files of the split called `name`."""
    if (folder / name / "state.json").is_file():
        return saved_files(folder / name)
    for suffix in SUFFIXES:
        if (file := folder / f"{name}{suffix}").is_file():
            return [file]
    for suffix in SUFFIXES:
        for place in (folder, folder / "data", folder / name):
            pattern = f"*{suffix}" if place == folder / name else f"{name}-*{suffix}"
            if files := sorted(place.glob(pattern)):
                return files
    return []


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set written by `datasets.Dataset.save_to_disk`."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} is no state of a saved data set ({error})") from None
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{folder / 'state.json'} names files outside of its folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {missing[0]}, which its state.json names")
    return [folder / name for name in names]


def read_files(files: Iterable[Path]) -> Rows:
    """Rows of all `files`."""
    rows = Rows()
    for file in files:
        rows.append_rows(read_arrow(file) if file.suffix == ".arrow" else read_rows(file))
    return rows
