"""Torch files: the one place of the project that calls `torch.load`; nothing is ever unpickled freely.

Every file of a checkpoint is untrusted, also optimizer and random state.
"""

import contextlib
import os
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.checkpoint.atomic import atomic_file
from litgpt.checkpoint.crc import ZIP_MAGIC, Refused, SummingFile, seal_zip, zip_records
from litgpt.checkpoint.folders import damaged, existing_file, some
from litgpt.checkpoint.lazy import LazyTensor, OpenFile, on_disk

_FREE_OPS = 500_000
_N_OLD_PICKLES = 5


def load_torch(path: Path | str) -> Any:
    """What `save_torch` or `torch.save` wrote, on the CPU; tensors are views of the memory-mapped file.

    Raises:
        ValueError: The file is cut off, damaged, or asks for anything but tensors and plain Python values.
    """
    path = existing_file(path)
    if is_zip := _is_zip(path):
        _check_pickle(path)
    else:
        _check_old_pickles(path)
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


def _check_pickle(path: Path) -> None:
    """Refuse what torch would run although it takes memory without end: the making of an empty `bytearray`."""
    names = [record.filename for record in zip_records(path) if record.filename.endswith(".pkl")]
    try:
        with zipfile.ZipFile(path) as archive:
            asks = [name for name in names if b"\nbytearray\n" in archive.read(name)]
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise damaged(path, " ".join(str(error).split())) from None
    if asks:
        raise Refused(f"{path} is refused: it asks for `bytearray`, which no weights need")


def _check_old_pickles(path: Path) -> None:
    """The same for torch's old format, where values may also be many times larger in memory: a list takes one byte."""
    limit, n_ops = max(_FREE_OPS, path.stat().st_size // 48), 0
    with open(path, "rb") as file:
        try:
            for _ in range(_N_OLD_PICKLES):
                for _, argument, _ in pickletools.genops(file):
                    n_ops += 1
                    if n_ops > limit:
                        raise Refused(f"{path} is refused: it holds more than {limit:,} values beside its tensors")
                    if isinstance(argument, str) and argument.endswith(" bytearray"):
                        raise Refused(f"{path} is refused: it asks for `bytearray`, which no weights need")
        except Refused:
            raise
        except ValueError:
            return  # torch says what is wrong


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
    weights, limit = load_model_part(path), path.stat().st_size
    mappings, file = _mappings_of(path) if _is_zip(path) else [], OpenFile(path)
    tensors: dict[str, LazyTensor] = {}
    seen: dict[tuple, LazyTensor] = {}
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(
                f"{path} is refused: `{some([name])}` is sparse or quantized, only plain tensors can be read"
            )
        if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > limit:
            raise damaged(path, f"`{some([name])}` of {list(tensor.shape)} is larger than the file")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.numel() or key not in seen:
            seen[key] = _lazily(file, tensor.detach(), mappings)
        tensors[name] = seen[key]
    return tensors


def _lazily(file: OpenFile, tensor: Tensor, mappings: list[tuple[int, int, int]]) -> LazyTensor:
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    for first, last, offset in mappings:
        if first <= begin and end <= last and tensor.is_contiguous() and tensor.numel():
            return on_disk(file, tuple(tensor.shape), tensor.dtype, offset + begin - first, view=lambda: tensor)
    return LazyTensor.of(tensor)


def _mappings_of(path: Path) -> list[tuple[int, int, int]]:
    """Where the file is mapped: first and last address, and offset in the file. Nothing where Linux does not say it."""
    found, wanted = [], os.path.realpath(path)
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            address, _, offset, _, _, *name = line.rstrip("\n").split(maxsplit=5)
            if name == [wanted]:
                first, last = (int(number, 16) for number in address.split("-"))
                found.append((first, last, int(offset, 16)))
    return found


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
