"""Weight files as names of tensors that are still on disk, whatever format they are in."""

import re
from pathlib import Path

from litgpt.checkpoint.folders import find_weights_file, some
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.safetensors_file import open_index, open_safetensors
from litgpt.checkpoint.torch_file import open_torch
from litgpt.checkpoint.writing import write_safetensors, write_torch

__all__ = ["LazyTensor", "files_of", "open_weights", "write_safetensors", "write_torch"]

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")


def open_weights(dir_or_file: Path | str) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint by name, without reading any of them.

    Args:
        dir_or_file: A `.pth` (flat or with the weights under `model`; `_orig_mod.` of compiled modules is left out), a
            `.safetensors`, a Hugging Face `.bin`, an index of shards, one of several shards, or a folder that holds
            `lit_model.pth`, safetensors or `pytorch_model*.bin`, looked for in this order.

    Raises:
        FileNotFoundError: There are no weights, or shards are missing.
        ValueError: A file is damaged or refused.
    """
    path = Path(dir_or_file)
    if path.is_dir():
        path = find_weights_file(path)
    if path.name.endswith(".index.json"):
        files = open_index(path)
        shards = {name: _open_file(path.parent / name) for name in sorted(set(files.values()))}
        if lacking := sorted(name for name, file in files.items() if name not in shards[file]):
            raise ValueError(
                f"{path} names tensors that its shards lack ({some(lacking)}); download or copy them again"
            )
        tensors = {name: shards[file][name] for name, file in files.items()}
    elif match := _SHARD.fullmatch(path.name):
        tensors = _open_numbered(path.parent, match)
    else:
        tensors = _open_file(path)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}


def _open_file(path: Path) -> dict[str, LazyTensor]:
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def _open_numbered(folder: Path, shard: re.Match[str]) -> dict[str, LazyTensor]:
    """All shards of a set that has lost its index, which the numbers in their names tell."""
    paths = _numbered(folder, shard)
    if lacking := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {len(lacking)} of {len(paths)} shards ({some(lacking)}); download or copy them again"
        )
    tensors: dict[str, LazyTensor] = {}
    for path in paths:
        tensors |= _open_file(path)
    return tensors


def _numbered(folder: Path, shard: re.Match[str]) -> list[Path]:
    count = min(int(shard["count"]), 10_000)
    return [folder / f"{shard['stem']}-{i:05d}-of-{shard['count']}{shard['suffix']}" for i in range(1, count + 1)]


def files_of(weights_file: Path) -> list[Path]:
    """All files that `open_weights(weights_file)` reads, an index last; they need not be there."""
    folder = weights_file.parent
    if weights_file.name.endswith(".index.json"):
        shards = sorted(set(open_index(weights_file, is_whole=False).values()))
        return [*(folder / name for name in shards), weights_file]
    match = _SHARD.fullmatch(weights_file.name)
    return _numbered(folder, match) if match else [weights_file]
