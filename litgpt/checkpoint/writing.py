"""Weight files written tensor by tensor: memory holds one piece at a time, whatever the size of the model."""

import json
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.atomic import atomic_file, check_disk_space
from litgpt.checkpoint.crc import CHECKSUMS_NAME, SummingFile, crc_of_file, seal_zip, write_checksums
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.safetensors_file import DTYPES, sharded

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STORAGES = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage, torch.complex64: torch.ComplexFloatStorage,
}  # fmt: skip
"""How torch files name the dtype of their storages; newer dtypes have no name there."""
_ALIGNMENT = 64
_BYTES_A_TENSOR = 512
"""What a tensor takes in a file beside its values, at most."""
_ZIP64_FROM_BYTES = 1 << 30


def write_safetensors(
    folder: Path | str,
    tensors: Mapping[str, LazyTensor],
    max_shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `model.safetensors`, or shards with their index, and `checksums.json`, which `check_crc` compares.

    Args:
        folder: Exists. Files in it that have one of these names are replaced.
        tensors: Written in this order, grouped by the size of their dtype within a file.
        max_shard_bytes: Largest size of a shard; a single larger tensor gets a shard of its own.
        metadata: For the header; None: `{"format": "pt"}`, without which other libraries refuse the file.

    Returns:
        The files with tensors.

    Raises:
        OSError: The disk has too little space, which is checked before anything is written, or a write failed;
            nothing is left then.
    """
    folder, shards = Path(folder), sharded(tensors, max_shard_bytes)
    check_disk_space(folder / "model.safetensors", sum(_BYTES_A_TENSOR + tensor.n_bytes for tensor in tensors.values()))
    n = len(shards)
    names = ["model.safetensors"] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    crcs: dict[str, int] = {}
    try:
        for file_name, shard in zip(names, shards):
            crcs[file_name] = _write_shard(folder / file_name, shard, dict(metadata or {"format": "pt"}))
        if n > 1:
            index = {
                "metadata": {"total_size": sum(tensor.n_bytes for tensor in tensors.values())},
                "weight_map": {name: file_name for file_name, shard in zip(names, shards) for name in shard},
            }
            path = folder / "model.safetensors.index.json"
            with atomic_file(path) as file:
                file.write(json.dumps(index, indent=1).encode() + b"\n")
            crcs[path.name] = crc_of_file(path)
        write_checksums(folder, crcs)
    except BaseException:
        for file_name in (*names, "model.safetensors.index.json", CHECKSUMS_NAME):
            (folder / file_name).unlink(missing_ok=True)
        raise
    return [folder / file_name for file_name in names]


def _write_shard(path: Path, tensors: Mapping[str, LazyTensor], metadata: dict[str, str]) -> int:
    header: dict[str, Any] = {"__metadata__": metadata}
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each is aligned to its dtype
    position = 0
    for name, tensor in order:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(
                f"{path} is not written: safetensors have no dtype for `{name}`, a tensor of {tensor.dtype}"
            )
        end = position + tensor.n_bytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_file(path, 8 + len(text) + position) as file:
        target = SummingFile(file)
        target.write(len(text).to_bytes(8, "little"))
        target.write(text)
        for _, tensor in order:
            for piece in _byte_pieces(tensor):
                target.write(piece)
    return target.crc


def write_torch(path: Path | str, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a flat state dict that `torch.load(path, weights_only=True, mmap=True)` reads, one piece at a time.

    Names that have the same `LazyTensor` object share their storage in the file, as tied weights do.

    Raises:
        OSError: The disk has too little space, which is checked before anything is written, or a write failed; what
            stood at `path` before is untouched.
    """
    path = Path(path)
    keys: dict[int, str] = {}
    for tensor in tensors.values():
        keys.setdefault(id(tensor), str(len(keys)))
    stored = {keys[id(tensor)]: tensor for tensor in tensors.values()}
    n_bytes = sum(_BYTES_A_TENSOR + tensor.n_bytes for tensor in stored.values())
    check_disk_space(path, n_bytes)
    with atomic_file(path, n_bytes) as file:
        target = SummingFile(file)
        with zipfile.ZipFile(target, "w") as archive:  # type: ignore[arg-type]

            def add(name: str, n_bytes: int, parts: Iterator[memoryview] | list[bytes]) -> None:
                is_large = n_bytes >= _ZIP64_FROM_BYTES
                entry = zipfile.ZipInfo(f"{path.stem}/{name}")
                begin = target.n_bytes + 30 + len(entry.filename.encode()) + (20 if is_large else 0) + 4
                padding = -begin % _ALIGNMENT
                entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
                with archive.open(entry, "w", force_zip64=is_large) as record:
                    for part in parts:
                        record.write(part)

            for name, content in (
                ("data.pkl", _pickled({name: (keys[id(tensor)], tensor) for name, tensor in tensors.items()})),
                (".format_version", b"1"),
                (".storage_alignment", str(_ALIGNMENT).encode()),
                ("byteorder", sys.byteorder.encode()),
                ("version", b"3\n"),
            ):
                add(name, len(content), [content])
            for key, tensor in stored.items():
                add(f"data/{key}", tensor.n_bytes, _byte_pieces(tensor))
        seal_zip(file, target.crc)


def _byte_pieces(tensor: LazyTensor) -> Iterator[memoryview]:
    n_values = 0
    for piece in tensor.iter_pieces():
        assert piece.dtype == tensor.dtype, (piece.dtype, tensor.dtype)
        n_values += piece.numel()
        if piece.numel():
            yield memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy())
    assert n_values * tensor.dtype.itemsize == tensor.n_bytes, (n_values, tensor.shape)


class _Storage:
    def __init__(self, key: str, tensor: LazyTensor) -> None:
        self.key, self.tensor = key, tensor


class _StateDictPickler(pickle.Pickler):
    """Writes tensors as torch files have them: a function, the name of a record, shape and strides."""

    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        storage = _STORAGES.get(tensor.dtype, torch.UntypedStorage)
        n = tensor.n_bytes if storage is torch.UntypedStorage else tensor.n_bytes // tensor.dtype.itemsize
        return ("storage", storage, obj.key, "cpu", n)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Entry):
            return NotImplemented
        tensor = obj.storage.tensor
        arguments = (obj.storage, 0, tensor.shape, _strides(tensor.shape), False, OrderedDict())
        if tensor.dtype in _STORAGES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments, tensor.dtype)


class _Entry:
    def __init__(self, storage: _Storage) -> None:
        self.storage = storage


def _pickled(entries: Mapping[str, tuple[str, LazyTensor]]) -> bytes:
    buffer = BytesIO()
    pickler = _StateDictPickler(buffer, protocol=2)
    pickler.dump({name: _Entry(_Storage(key, tensor)) for name, (key, tensor) in entries.items()})
    return buffer.getvalue()


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
