"""Torch files: the one place of the project that calls `torch.load`; nothing is ever unpickled freely.

Every file of a checkpoint is untrusted, also optimizer and random state.
"""

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.checkpoint.atomic import atomic_file
from litgpt.checkpoint.crc import ZIP_MAGIC, SummingFile, seal_zip, zip_records
from litgpt.checkpoint.folders import damaged, existing_file
from litgpt.checkpoint.lazy import LazyTensor, gather, mapped_pieces


def load_torch(path: Path | str) -> Any:
    """What `save_torch` or `torch.save` wrote, on the CPU; tensors are views of the memory-mapped file.

    Raises:
        ValueError: The file is cut off, damaged, or asks for anything but tensors and plain Python values.
    """
    path = existing_file(path)
    if is_zip := _is_zip(path):
        zip_records(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} is refused: it asks for `{asked[1]}`, but a checkpoint may hold only tensors and plain values"
            ) from None
        raise damaged(path, f"{type(error).__name__} while reading it") from None


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == ZIP_MAGIC


def load_model_part(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a torch file by name, flat in it or under `model`, as views of the mapped file."""
    weights = load_torch(path)
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        weights = weights["model"]
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no model weights: expected tensors by name, or those under the key `model`")
    return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}


def open_torch(path: Path | str) -> dict[str, LazyTensor]:
    """The tensors of a torch file by name, flat in it or under `model`, unread; tied names share one object."""
    path = existing_file(path)
    weights, reader = load_model_part(path), _Reader(path)
    is_mapped, limit = _is_zip(path), path.stat().st_size
    tensors: dict[str, LazyTensor] = {}
    seen: dict[tuple, LazyTensor] = {}
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{path} is refused: `{name}` is sparse or quantized, only plain tensors can be read")
        if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > limit:
            raise damaged(path, f"`{name}` of {list(tensor.shape)} is larger than the file")
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if not is_mapped or not tensor.numel():
            lazy = LazyTensor.of(tensor)
        else:
            is_plain = tensor.is_contiguous()
            lazy = LazyTensor(
                tuple(tensor.shape),
                tensor.dtype,
                read=functools.partial(reader.read, name),
                view=functools.partial(tensor.detach),
                pieces=functools.partial(reader.pieces, name) if is_plain else None,
                cut=functools.partial(reader.cut, name, tensor.detach()) if is_plain else None,
            )
        tensors[name] = seen.setdefault(key, lazy) if tensor.numel() else lazy
    return tensors


class _Reader:
    """A second mapping of a file, which nobody else holds: its pages can be given back after each copy."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return load_model_part(self.path)

    def pieces(self, name: str) -> Iterator[Tensor]:
        return mapped_pieces(self._tensors[name])

    def cut(self, name: str, tensor: Tensor, begin: int, shape: tuple[int, ...]) -> LazyTensor:
        span = slice(begin, begin + math.prod(shape))

        def pieces() -> Iterator[Tensor]:
            return mapped_pieces(self._tensors[name].view(-1)[span])

        def read() -> Tensor:
            return gather(pieces(), shape, tensor.dtype)

        return LazyTensor(shape, tensor.dtype, read, view=lambda: tensor.view(-1)[span].view(shape), pieces=pieces)

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if not tensor.is_contiguous():
            return tensor.clone(memory_format=torch.contiguous_format)
        return gather(self.pieces(name), tuple(tensor.shape), tensor.dtype)


def save_torch(obj: Any, path: Path | str) -> None:
    """Write `obj` so that `path` is at any moment either what it was or the whole new file.

    Raises:
        OSError: The disk is full or not writable; what stood at `path` before is untouched.
        ValueError: `obj` holds something that `load_torch` would refuse to read back.
    """
    with atomic_file(path, _n_bytes(obj)) as file:  # torch's own writer would lose the reason of a failure
        target = SummingFile(file)
        torch.save(obj, target)
        file.flush()
        try:
            load_torch(file.name)
        except ValueError as error:
            reason = str(error).replace(file.name, "what should be saved")
            raise ValueError(f"{path} was not written: {reason}") from None
        seal_zip(file, target.crc)


def _n_bytes(obj: Any) -> int:
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(obj)
    return sum(storages.values())
