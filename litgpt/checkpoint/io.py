"""Reading and writing checkpoints; nothing is ever unpickled freely.

Every file of a checkpoint is untrusted, also optimizer and random state. `load_torch` is the one place of the project
that calls `torch.load`. The names of `atomic` and `folders` can be imported from here too.
"""

import json
import mmap
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.checkpoint.atomic import atomic_file, atomic_folder, remove_leftovers
from litgpt.checkpoint.folders import (
    WEIGHTS_NAME,
    check_valid_checkpoint_dir,
    copy_config_files,
    extend_checkpoint_dir,
    find_resume_path,
    find_weights_file,
    is_complete,
    step_files,
)

__all__ = [
    "WEIGHTS_NAME", "CheckpointValidationResult", "atomic_folder", "check_crc", "check_valid_checkpoint_dir",
    "copy_config_files", "extend_checkpoint_dir", "find_resume_path", "find_weights_file", "load_model_weights",
    "load_torch", "load_weights", "remove_leftovers", "save_torch", "validate_checkpoint",
]  # fmt: skip

_ZIP_MAGIC = b"PK\x03\x04"


def load_torch(path: Path | str) -> Any:
    """What `save_torch` or `torch.save` wrote, on the CPU; tensors are views of the memory-mapped file.

    Raises:
        ValueError: The file is cut off, damaged, or asks for anything but tensors and plain Python values.
    """
    path = _existing_file(path)
    with open(path, "rb") as file:
        is_zip = file.read(4) == _ZIP_MAGIC
    if is_zip:
        _zip_records(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} is refused: it asks for `{asked[1]}`, but a checkpoint may hold only tensors and plain values"
            ) from None
        raise _damaged(path, f"{type(error).__name__} while reading it") from None


def load_weights(dir_or_file: Path | str) -> dict[str, Tensor]:
    """The model part of a checkpoint as name -> memory-mapped tensor, without `_orig_mod.` of compiled modules.

    Args:
        dir_or_file: A `.pth` (flat or with the weights under `model`), a `.safetensors`, an index of shards, or a
            folder that holds `lit_model.pth` or safetensors.
    """
    path = Path(dir_or_file)
    if path.is_dir():
        path = find_weights_file(path)
    if path.name.endswith(".safetensors.index.json"):
        weights = _load_shards(path)
    elif path.suffix == ".safetensors":
        weights = _load_safetensors(path)
    else:
        weights = load_torch(path)
        if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
            weights = weights["model"]
        if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError(f"{path} holds no model weights: expected tensors by name, or those under the key `model`")
    return {str(name).replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(_existing_file(path))
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, str(error).splitlines()[0]) from None


def _load_shards(index: Path) -> dict[str, Tensor]:
    try:
        files = json.loads(_existing_file(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(index, "it is no JSON with a `weight_map`") from None
    weights: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or name == "..":
            raise ValueError(f"{index} points to `{name}`: shards must lie in the same folder")
        weights.update(_load_safetensors(index.parent / name))
    if missing := sorted(files.keys() - weights.keys()):
        raise ValueError(f"{index} names tensors that its shards lack ({_some(missing)}); download or copy them again")
    return weights


def check_crc(path: Path | str) -> None:
    """Compare each record of a torch file with the checksum written beside it; torch itself never does.

    Costs about as much as reading the file once. Files in torch's old format carry no checksums and pass.

    Raises:
        ValueError: Some bits differ; names the file, the record and another checkpoint if there is one.
    """
    path = _existing_file(path)
    with open(path, "rb") as file:
        if file.read(2) == b"\x80\x02":
            return
        records = _zip_records(path)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            for record in records:
                begin = record.header_offset
                header = bytes(data[begin : begin + 30])
                n_name, n_extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
                name = bytes(data[begin + 30 : begin + 30 + n_name])
                begin += 30 + n_name + n_extra
                is_intact = header[:4] == _ZIP_MAGIC and name == record.filename.encode()
                if not is_intact or _crc32(data[begin : begin + record.file_size]) != record.CRC:
                    raise _damaged(path, f"the checksum of its record `{record.filename}` is wrong")


def _crc32(data: memoryview, chunk_bytes: int = 1 << 26) -> int:
    crc = 0
    for begin in range(0, len(data), chunk_bytes):  # short slices, so that Ctrl-C works on files of many GB
        crc = zlib.crc32(data[begin : begin + chunk_bytes], crc)
    return crc


def _zip_records(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OverflowError):
        raise _damaged(path, "the table of contents at its end is missing") from None
    if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"{path} is refused: its record `{packed[0]}` is compressed, which torch never does")
    return records


def _existing_file(path: Path | str) -> Path:
    if not (path := Path(path)).is_file():
        raise FileNotFoundError(f"{path} is {'a folder, not a file' if path.is_dir() else 'not there'}")
    return path


def _damaged(path: Path, reason: str) -> ValueError:
    others = [file for file in step_files(path.parent.parent) if file.parent != path.parent and is_complete(file)]
    advice = f"another checkpoint is {others[-1]}" if others else "use another copy of it"
    return ValueError(f"{path} is cut off or damaged ({reason}); {advice}")


def save_torch(obj: Any, path: Path | str) -> None:
    """Write `obj` so that `path` is at any moment either what it was or the whole new file.

    Raises:
        OSError: The disk is full or not writable; what stood at `path` before is untouched.
        ValueError: `obj` holds something that `load_torch` would refuse to read back.
    """
    with atomic_file(path, _n_bytes(obj)) as file:  # torch's own writer would lose the reason of a failure
        torch.save(obj, file)
        file.flush()
        try:
            load_torch(file.name)
        except ValueError as error:
            reason = str(error).replace(file.name, "what should be saved")
            raise ValueError(f"{path} was not written: {reason}") from None


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


@dataclass
class CheckpointValidationResult:
    """How the weights of a checkpoint fit a model."""

    is_valid: bool = True
    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    shape_mismatches: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line: that all is well, or what does not fit."""
        found = {
            "missing": self.missing_keys, "unexpected": self.unexpected_keys, "wrong shape": self.shape_mismatches,
            "errors": self.errors,
        }  # fmt: skip
        parts = [f"{what}: {_some(names)}" for what, names in found.items() if names]
        return "; ".join(parts) if parts else "every weight fits the model"


def validate_checkpoint(checkpoint_path: Path, model: nn.Module, verbose: bool = True) -> CheckpointValidationResult:
    """Compare names and shapes in a weights file or folder with `model` (also on the meta device); changes nothing."""
    try:
        result = _compare(model, load_weights(checkpoint_path))
    except (OSError, ValueError) as error:
        result = CheckpointValidationResult(is_valid=False, errors=[str(error)])
    if verbose:
        print(f"{checkpoint_path}: {result.summary()}")
    return result


def load_model_weights(model: nn.Module, dir_or_file: Path | str, strict: bool = True) -> None:
    """Load the model part of a checkpoint; parameters on the meta device become views of the file.

    Args:
        model: Takes the weights in place. Parameters shared by two names stay shared, also when only one of the
            names is in the file (tied embeddings).
        dir_or_file: See `load_weights`.
        strict: Refuse missing and unexpected names. Wrong shapes are always refused.
    """
    weights, aliases = load_weights(dir_or_file), _shared_parameters(model)
    state = model.state_dict(keep_vars=True)
    is_meta = any(tensor.is_meta for tensor in state.values() if isinstance(tensor, Tensor))
    try:
        keys = model.load_state_dict(weights, strict=False, assign=is_meta)
    except RuntimeError as error:
        found = _compare(model, weights)
        reason = found.summary() if found.shape_mismatches else " ".join(str(error).split())
        raise _misfit(dir_or_file, reason) from None
    for names in aliases:
        present = [name for name in names if name in weights]
        if any(not torch.equal(weights[present[0]], weights[name]) for name in present[1:]):
            if len({id(model.get_parameter(name)) for name in present}) == 1:
                raise _misfit(dir_or_file, f"{' and '.join(present)} differ in the file but are one in the model")
        elif is_meta and present:
            for name in names:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, model.get_parameter(present[0]))
    missing = [name for name in keys.missing_keys if not _has_alias(name, aliases, weights)]
    if strict and (missing or keys.unexpected_keys):
        raise _misfit(dir_or_file, CheckpointValidationResult(False, missing, list(keys.unexpected_keys)).summary())


def _compare(model: nn.Module, weights: dict[str, Tensor]) -> CheckpointValidationResult:
    # "attn.attn" is the published old spelling that attention converts while loading
    weights = {name.replace(".attn.attn.", ".attn.qkv."): tensor for name, tensor in weights.items()}
    aliases, state = _shared_parameters(model), model.state_dict()
    missing = [name for name in state if name not in weights and not _has_alias(name, aliases, weights)]
    unexpected = [name for name in weights if name not in state]
    shapes = [
        f"{name} {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in state.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    return CheckpointValidationResult(not (missing or unexpected or shapes), missing, unexpected, shapes)


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _has_alias(name: str, aliases: list[list[str]], weights: dict[str, Tensor]) -> bool:
    return any(name in group and any(other in weights for other in group) for group in aliases)


def _misfit(source: Path | str, reason: str) -> ValueError:
    return ValueError(
        f"the weights in {source} do not fit the model ({reason}): either the checkpoint's config does not fit its "
        "weights (compare model_config.yaml there) or they belong to another model"
    )


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
