"""Examples tokenised once: in several processes where it pays, kept in one memory-mapped file per content.

The file: `MAGIC`, the examples one behind the other, where each begins (int64) and how long it is (int32), a
description in JSON, its length in 8 bytes, `MAGIC`. An example is its values one behind the other, each as a code of
its type, the number of its elements, and the elements in the narrowest type; labels as the ranges that are trained.
"""

import io
import json
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, is_dataclass
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch.utils.data import Dataset
from tqdm import tqdm

from litgpt.checkpoint.atomic import atomic_file, remove_leftovers
from litgpt.data.base import rank_and_world
from litgpt.data.documents import hash_texts
from litgpt.data.preparation import live_as_worker

VERSION = 1
"""Counted up when the file's layout changes; files of other versions are not found, as it is part of the hash."""

MAGIC = b"litgpt examples\n"
IGNORE_INDEX = -100
CHUNK_SAMPLES = 256
"""Samples given to a process at once."""

PAYS_SECONDS = 10.0
"""Other processes help when the rest would take this one so long: they need some seconds to start."""

Example = Mapping[str, Any]
Encode = Callable[[Any], Example | None]
Field = tuple[str, ...]
"""Names that lead to a value of an example, which may be a dict of dicts."""

RANGES = 255
_TYPES = [np.dtype(name) for name in ("<u2", "<u4", "<i8", "<f4", "<f8", "|b1")]
_HEAD = np.dtype([("code", "u1"), ("is_number", "u1"), ("n", "<u4")])


class TokenizedExamples(Dataset):
    """Examples of `samples`, read from disk as they are needed; tokenised now unless an earlier run has done it.

    Ranks and runs that want the same at the same time wait for the first one. After a kill the work begins anew.

    Args:
        samples: Anything that JSON or a dataclass can hold; part of the content that the cached file goes by.
        encode: Turns a sample into an example: a dict of 1-D tensors or arrays such as `input_ids` and `labels`, of
            numbers (counts) and of such dicts; or into None to leave the sample out. All examples have the same keys.
            Other processes help only if it can be pickled: a function of a module, `functools.partial` of one, or an
            object with `__call__`.
        cache_dir: Folder of the cached files; None keeps the examples in memory.
        key: What else decides about the result: hash of the tokenizer (`preparation.tokenizer_hash`), template,
            settings.
        num_workers: Processes at most; None: as many as there are cores; 0 or 1: this one.

    Raises:
        ValueError: A sample cannot be encoded; the message names its number.
        OSError: The file cannot be written.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        encode: Encode,
        cache_dir: Path | str | None,
        key: str | Iterable[str] = "",
        num_workers: int | None = None,
    ) -> None:
        num_workers = (os.cpu_count() or 1) if num_workers is None else num_workers
        self.path: Path | None = None
        if cache_dir is None:
            file = io.BytesIO()
            write_examples(file, samples, encode, num_workers)
            self._read(np.frombuffer(file.getvalue(), np.uint8))
            return
        self.path = Path(cache_dir) / f"{content_hash(samples, key)}.examples"
        if self._open():
            self._tell(f"Using {len(self):,} examples tokenised before: {self.path}")
            return
        if getattr(current_process(), "_inheriting", False):  # a helper that runs the calling script while it starts
            raise RuntimeError("the calling script lacks `if __name__ == '__main__':`")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):  # another rank or run may want the same
            if not self._open():
                start = time.perf_counter()
                remove_leftovers(self.path.parent)
                with atomic_file(self.path) as file:
                    write_examples(file, samples, encode, num_workers)
                found = self._open()
                assert found, f"{self.path} cannot be read back"
                seconds = time.perf_counter() - start
                self._tell(f"Tokenised {len(self):,} examples in {seconds:.1f} s: {self.path}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example as `encode` gave it: integers as int64 tensors, counts as numbers."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        return decode_example(self._data[self._starts[index] : self._starts[index + 1]].tobytes(), self._fields)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __reduce__(self) -> tuple:
        return reopen, (self.path, self._data.tobytes() if self.path is None else None)  # workers map the file again

    def _open(self) -> bool:
        """Whether the file is there and whole; then it is in use."""
        try:
            return self._read(np.memmap(self.path, np.uint8, mode="r"))
        except (OSError, ValueError):  # absent, or empty
            return False

    def _read(self, data: np.ndarray) -> bool:
        """Take `data` if it is a complete file."""
        tail = len(MAGIC) + 8
        if (
            len(data) < len(MAGIC) + tail
            or data[: len(MAGIC)].tobytes() != MAGIC
            or data[-len(MAGIC) :].tobytes() != MAGIC
        ):
            return False
        size = int.from_bytes(data[-tail : -len(MAGIC)].tobytes(), "little")
        index = json.loads(data[-tail - size : -tail].tobytes())
        if index["size"] != len(data) - tail - size:
            return False
        n, at = index["n"], index["index_at"]
        self._starts = np.frombuffer(data[at : at + 8 * (n + 1)].tobytes(), "<i8")
        self.lengths = np.frombuffer(data[at + 8 * (n + 1) : index["size"]].tobytes(), "<i4").astype(np.int64)
        self._fields = [tuple(field) for field in index["fields"]]
        self.n_left_out: int = index["n_left_out"]
        self.totals: dict[str, float] = index["totals"]
        self._data = data
        return True

    def _tell(self, line: str) -> None:
        if rank_and_world()[0] == 0:
            left_out = f" ({self.n_left_out:,} samples left out)" if self.n_left_out else ""
            print(line + left_out)


def reopen(path: Path | None, data: bytes | None) -> TokenizedExamples:
    """The examples in another process."""
    examples = TokenizedExamples.__new__(TokenizedExamples)
    examples.path = path
    found = examples._open() if data is None else examples._read(np.frombuffer(data, np.uint8))
    if not found:
        raise FileNotFoundError(f"{path} is gone or damaged; start again to tokenise anew")
    return examples


def content_hash(samples: Sequence[Any], key: str | Iterable[str]) -> str:
    """Hash of everything that decides about the examples."""
    keys = [key] if isinstance(key, str) else list(key)
    rows = (json.dumps(sample, ensure_ascii=False, default=plain) for sample in samples)
    return hash_texts([f"{VERSION} {len(keys)}", *keys, hash_texts(rows)])


def plain(value: Any) -> Any:
    """What JSON cannot hold, as something that it can."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (bytes, os.PathLike)) or value.__class__.__repr__ is not object.__repr__:
        return repr(value)  # dates, decimals and the like
    raise TypeError(
        f"a sample holds a {type(value).__qualname__}, whose content cannot be told: make it a dict or text"
    )


class Chunk(NamedTuple):
    """Examples of some neighbouring samples."""

    data: bytes
    sizes: np.ndarray
    """Bytes of each example."""
    lengths: np.ndarray
    fields: list[Field] | None
    totals: dict[str, float]
    n_samples: int


def encode_chunk(encode: Encode, samples: Sequence[Any], first: int) -> Chunk:
    """Encode samples, of which `first` is the number of the first one."""
    parts, lengths, fields, totals = [], [], None, {}
    for number, sample in enumerate(samples, first):
        try:
            example = encode(sample)
        except ValueError as error:
            raise ValueError(f"sample {number + 1}: {error}") from error
        if example is None:
            continue
        values = dict(flatten(example))
        if list(values) != (fields := fields or list(values)):
            raise ValueError(f"sample {number + 1}: its example has {list(values)}, others have {fields}")
        parts.append(encode_example(values))
        arrays = {field: np.shape(value)[0] for field, value in values.items() if np.ndim(value)}
        lengths.append(sum([n for field, n in arrays.items() if field[-1] == "input_ids"] or arrays.values()))
        for field, value in values.items():
            if not np.ndim(value):
                totals["/".join(field)] = totals.get("/".join(field), 0) + np.asarray(value).item()
    sizes = np.array([len(part) for part in parts], np.int64)
    return Chunk(b"".join(parts), sizes, np.array(lengths, np.int64), fields, totals, len(samples))


def flatten(example: Example, above: Field = ()) -> Iterator[tuple[Field, Any]]:
    """Each value of an example with the names that lead to it."""
    for name, value in example.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*above, name))
        else:
            yield (*above, name), value.numpy() if isinstance(value, torch.Tensor) else value


def encode_example(values: Mapping[Field, Any]) -> bytes:
    """Bytes of an example. Labels that repeat the ids beside them are the edges of the ranges where they do."""
    parts, before = [], {}
    for field, value in values.items():
        array = before[field] = np.asarray(value)
        if array.ndim > 1 or array.dtype.kind not in "iufb":
            raise TypeError(
                f"{'.'.join(field)} has shape {array.shape} and type {array.dtype}: only 1-D numbers are kept"
            )
        ids, code = before.get((*field[:-1], "input_ids")), None
        if field[-1] == "labels" and ids is not None and ids.shape == array.shape:
            trained = array != IGNORE_INDEX
            if np.array_equal(array[trained], ids[trained]):
                array, code = np.flatnonzero(np.diff(trained, prepend=False, append=False)).astype("<u4"), RANGES
        if code is None:
            array = narrow(array)
            code = _TYPES.index(array.dtype)
        parts += [np.array((code, array.ndim == 0, array.size), _HEAD).tobytes(), array.tobytes()]
    return b"".join(parts)


def narrow(array: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest of `_TYPES`."""
    if array.dtype.kind not in "iu":
        return array.astype(array.dtype if array.dtype in _TYPES else "<f4")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    return array.astype("<i8" if low < 0 or high >= 1 << 32 else "<u2" if high < 1 << 16 else "<u4")


def decode_example(data: bytes, fields: Sequence[Field]) -> dict[str, Any]:
    """The example of `encode_example`."""
    example: dict[str, Any] = {}
    at = 0
    for *above, name in fields:
        code, is_number, n = np.frombuffer(data, _HEAD, 1, at)[0].item()
        at += _HEAD.itemsize
        dtype = np.dtype("<u4") if code == RANGES else _TYPES[code]
        array = np.frombuffer(data, dtype, n, at)
        at += n * dtype.itemsize
        inner = example
        for step in above:
            inner = inner.setdefault(step, {})
        if is_number:
            inner[name] = array[0].item()
        elif code == RANGES:
            ids = inner["input_ids"]
            labels = torch.full_like(ids, IGNORE_INDEX)
            for start, end in array.reshape(-1, 2).tolist():
                labels[start:end] = ids[start:end]
            inner[name] = labels
        else:
            inner[name] = torch.from_numpy(array.astype(np.int64) if dtype.kind in "iu" else array.copy())
    return example


def write_examples(file: BinaryIO, samples: Sequence[Any], encode: Encode, num_workers: int) -> None:
    """Encode all samples and write the whole file."""
    file.write(MAGIC)
    sizes, lengths, fields, n_left_out = [np.array([len(MAGIC)])], [np.empty(0, np.int64)], None, 0
    totals: dict[str, float] = {}
    for chunk in encode_all(samples, encode, num_workers):
        file.write(chunk.data)
        if chunk.fields is not None and chunk.fields != (fields := fields or chunk.fields):
            raise ValueError(f"some examples have {chunk.fields}, others {fields}")
        sizes.append(chunk.sizes)
        lengths.append(chunk.lengths)
        n_left_out += chunk.n_samples - len(chunk.sizes)
        for name, value in chunk.totals.items():
            totals[name] = totals.get(name, 0) + value
    starts = np.concatenate(sizes).cumsum()
    file.write(starts.astype("<i8").tobytes())
    file.write(np.concatenate(lengths).astype("<i4").tobytes())
    n = len(starts) - 1
    index = {"n": n, "index_at": int(starts[-1]), "size": int(starts[-1]) + 8 * (n + 1) + 4 * n}
    index |= {"fields": fields or [], "n_left_out": n_left_out, "totals": totals}
    text = json.dumps(index).encode()
    file.write(text + len(text).to_bytes(8, "little") + MAGIC)


def encode_all(samples: Sequence[Any], encode: Encode, num_workers: int) -> Iterator[Chunk]:
    """Chunks of all samples in order, encoded here until it is clear that other processes pay."""
    done, start = 0, time.perf_counter()
    with tqdm(total=len(samples), desc="Tokenising", unit=" samples", leave=False, delay=1) as bar:
        while done < len(samples):
            seconds = time.perf_counter() - start
            pays = done > 0 and seconds > 1 and seconds / done * (len(samples) - done) > PAYS_SECONDS
            if num_workers > 1 and pays and can_pickle(encode):
                for chunk in encode_in_processes(samples, done, encode, num_workers):
                    done += chunk.n_samples
                    bar.update(chunk.n_samples)
                    yield chunk
                num_workers = 1  # if the processes have died, this one does the rest
                continue
            chunk = encode_chunk(encode, samples[done : done + CHUNK_SAMPLES // 4], done)
            done += chunk.n_samples
            bar.update(chunk.n_samples)
            yield chunk


def encode_in_processes(samples: Sequence[Any], first: int, encode: Encode, num_workers: int) -> Iterator[Chunk]:
    """Chunks of the samples from `first` on, in order; fewer than all if the processes die."""
    # a forked child would inherit the threads of torch and the tokenizer in any state
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), start_worker, (encode, num_workers))
    waiting: list[Future[Chunk]] = []
    try:
        for start in range(first, len(samples), CHUNK_SAMPLES):
            waiting.append(pool.submit(encode_chunk_here, list(samples[start : start + CHUNK_SAMPLES]), start))
            if len(waiting) > 4 * num_workers:  # what is ready but not written takes memory
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    except BrokenProcessPool:
        warnings.warn(
            "the processes that tokenise have died (out of memory, or the calling script lacks "
            "`if __name__ == '__main__':`); going on in this one",
            stacklevel=2,
        )
    finally:
        pool.shutdown(cancel_futures=True)


def can_pickle(encode: Encode) -> bool:
    """Whether another process can get `encode`."""
    try:
        pickle.dumps(encode)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def start_worker(encode: Encode, n_processes: int) -> None:
    """Keep what all jobs of this process need."""
    global _encode
    _encode = encode
    live_as_worker(n_processes)


def encode_chunk_here(samples: Sequence[Any], first: int) -> Chunk:
    """`encode_chunk` in a process that `start_worker` has set up."""
    return encode_chunk(_encode, samples, first)
