"""Safetensors as they lie on disk: reading by our own hands, so that no page stays in memory unasked."""

import functools
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.checkpoint.crc import Refused
from litgpt.checkpoint.folders import damaged, existing_file, some
from litgpt.checkpoint.lazy import LazyTensor, OpenFile, on_disk

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_FREE_JSON_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 25


def open_safetensors(path: Path | str) -> dict[str, LazyTensor]:
    """The tensors of one `.safetensors` file, unread.

    Raises:
        ValueError: The file is cut off or damaged, or its header is not what it must be.
    """
    path = existing_file(path)
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    n_data, file = path.stat().st_size - start, OpenFile(path)
    mapping = _Mapping(file)
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype_name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            is_sound = all(type(number) is int and 0 <= number < 2**62 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            is_sound = False
        if not is_sound:
            raise damaged(path, f"its header says nothing sensible about `{some([name])}`")
        if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
            raise ValueError(
                f"{path} is refused: `{some([name])}` has the dtype {some([str(dtype_name)])[:20]}, known are "
                f"{', '.join(DTYPES)}"
            )
        dtype = DTYPES[dtype_name]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise damaged(path, f"`{some([name])}` of {dtype_name} {list(shape[:8])} does not take {end - begin} bytes")
        is_aligned = (start + begin) % dtype.itemsize == 0
        view = functools.partial(mapping.view, shape, dtype, start + begin) if is_aligned else None
        tensors[name] = on_disk(file, shape, dtype, start + begin, view)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise damaged(path, "its tensors overlap or leave gaps")
        position = end
    if position != n_data:
        raise damaged(path, f"it should hold {start + position:,} bytes, but holds {start + n_data:,}")
    return tensors


def open_index(index: Path | str, is_whole: bool = True) -> dict[str, str]:
    """Tensor name -> file name beside the index, from a `*.index.json`.

    Args:
        index: The file.
        is_whole: Whether all files that it names have to be there.

    Raises:
        ValueError: It is no such index, or names a file in another folder.
        FileNotFoundError: Some of the files are not there.
    """
    index = existing_file(index)
    try:
        files = _read_index(index)["weight_map"]
        names = sorted(set(files.values()))
    except Refused:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(index, "it is no JSON with a `weight_map`") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or name in ("..", ""):
            raise ValueError(f"{index} points to `{some([str(name)])}`: shards must lie in the same folder")
    if is_whole and (lacking := [name for name in names if not (index.parent / name).is_file()]):
        raise FileNotFoundError(
            f"{index.parent} lacks {len(lacking)} of the {len(names)} files that {index.name} names "
            f"({some(lacking)}); download or copy them again"
        )
    return files


def _read_index(path: Path) -> Any:
    """JSON that is small beside the files around it: parsed it can take twenty times its bytes."""
    size = path.stat().st_size
    around = sum(file.stat().st_size for file in path.parent.iterdir() if file.is_file())
    if size > _FREE_JSON_BYTES and (size > _MAX_JSON_BYTES or size > around // 16):
        raise Refused(f"{path} is refused: an index of {size:,} bytes in a folder of {around:,}")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        start = 8 + n_header
        if size < 8 or start > size:
            raise damaged(path, "its header reaches beyond its end")
        # parsed JSON can take twenty times its bytes
        if n_header > _FREE_JSON_BYTES and (n_header > _MAX_JSON_BYTES or n_header > size // 16):
            raise Refused(f"{path} is refused: a header of {n_header:,} bytes in a file of {size:,}")
        try:
            header = json.loads(file.read(n_header).decode("utf-8"))
        except (ValueError, RecursionError):
            raise damaged(path, "its header is no JSON") from None
    if not isinstance(header, dict):
        raise damaged(path, "its header is no JSON object")
    return header, start


class _Mapping:
    """One file, mapped when the first view of it is asked for."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file

    @functools.cached_property
    def _bytes(self) -> Tensor:
        if os.name == "nt":
            mapped = mmap.mmap(self.file.descriptor, 0, access=mmap.ACCESS_COPY)
        else:  # without a reserve, so that a file larger than the memory can be mapped too
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            mapped = mmap.mmap(self.file.descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def view(self, shape: tuple[int, ...], dtype: torch.dtype, begin: int) -> Tensor:
        n_bytes = math.prod(shape) * dtype.itemsize
        if not n_bytes:
            return torch.empty(shape, dtype=dtype)
        return self._bytes[begin : begin + n_bytes].view(dtype).view(shape)


def sharded(tensors: Mapping[str, LazyTensor], max_shard_bytes: int) -> list[dict[str, LazyTensor]]:
    """Groups of tensors, in order, of at most `max_shard_bytes` each unless a single one is larger."""
    shards: list[dict[str, LazyTensor]] = [{}]
    n_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and n_bytes + tensor.n_bytes > max_shard_bytes:
            shards.append({})
            n_bytes = 0
        shards[-1][name] = tensor
        n_bytes += tensor.n_bytes
    return shards
