"""Low-rank updates in files: read with what their settings say, and folded into the weights they belong to.

Merging is lazy like all that happens to weights on their way: the merged checkpoint is written tensor by tensor.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.checkpoint.atomic import atomic_file
from litgpt.checkpoint.crc import check_crc, crc_of_file
from litgpt.checkpoint.folders import SEAL_BYTES, WEIGHTS_NAME, some
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.loading import open_model_weights
from litgpt.checkpoint.tensors import open_weights, write_torch
from litgpt.config import Config, save_config
from litgpt.lora import LoRASettings, is_lora
from litgpt.low_rank import Parts, qkv_parts, row_norms

LORA_NAME = f"{WEIGHTS_NAME}.lora"
RECORD_NAME = "merged_lora.json"
"""Says which LoRA file the `lit_model.pth` beside it was merged from."""
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one weight `(out, in)`."""

    A: Tensor
    """`(r * parts, in)`"""
    B: Tensor
    """`(rows, r)`, the rows of all parts one below the other."""
    parts: Parts
    """Which rows of the weight those are."""
    scaling: float
    magnitude: Tensor | None = None
    """`(rows,)`: their lengths, with DoRA."""

    def split(self) -> list["Update"]:
        """One update for each part, whose rows then count from 0."""
        r, sizes = self.B.size(1), [stop - start for start, stop in self.parts]
        lengths = [None] * len(sizes) if self.magnitude is None else self.magnitude.split(sizes)
        found = zip(self.A.split(r), self.B.split(sizes), sizes, lengths)
        return [Update(a, b, ((0, size),), self.scaling, length) for a, b, size, length in found]

    def apply(self, weight: Tensor) -> Tensor:
        """The weight with the update, in float32."""
        merged = weight.float()
        merged = merged.clone() if merged is weight else merged
        for (start, stop), part in zip(self.parts, self.split()):
            rows = merged[start:stop]
            rows.addmm_(part.B.float(), part.A.float(), alpha=self.scaling)
            if part.magnitude is not None:
                rows.mul_((part.magnitude.float() / row_norms(rows)).unsqueeze(1))
        return merged


def read_updates(
    tensors: Mapping[str, LazyTensor], settings: LoRASettings, config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Update]:
    """The updates in a LoRA file, by the name of the weight that each belongs to.

    Args:
        tensors: Of the file.
        settings: That it was trained with; they say which parts of a fused projection there are.
        config: Of the model.
        shapes: Of the weights of the model.

    Raises:
        ValueError: The file does not fit the model or the settings.
    """
    if unknown := [name for name in tensors if not is_lora(name)]:
        raise ValueError(f"it holds more than LoRA's weights: {some(unknown, 3)}")
    updates = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        found = {leaf: tensors.get(f"{module}.{leaf}") for leaf in ("lora_A", "lora_B", "lora_magnitude")}
        shape = shapes.get(f"{module}.weight")
        if shape is None or found["lora_A"] is None or found["lora_B"] is None:
            reason = "the model has no such layer" if shape is None else "lora_A or lora_B is missing"
            raise ValueError(f"`{module}`: {reason}")
        a, b, magnitude = (None if tensor is None else tensor.read() for tensor in found.values())
        parts: Parts = ((0, shape[0]),)
        if settings.targets is None and module.endswith("attn.qkv"):
            sizes = [n * config.head_size for n in (config.n_head, config.n_query_groups, config.n_query_groups)]
            parts = qkv_parts(sizes, (settings.query, settings.key, settings.value))
        rows = sum(stop - start for start, stop in parts)
        if a.shape != (settings.r * len(parts), shape[1]) or b.shape != (rows, settings.r):
            raise ValueError(
                f"`{module}` has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}; for a weight of {shape} and the "
                f"settings (r {settings.r}) that is {(settings.r * len(parts), shape[1])} and {(rows, settings.r)}"
            )
        updates[f"{module}.weight"] = Update(a, b, parts, settings.scaling, magnitude)
    if not updates:
        raise ValueError("it holds no weights of LoRA")
    return updates


def merge_updates(
    base: Mapping[str, LazyTensor], updates: Mapping[str, Update], dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The weights of `base` with the updates; everything is worked out when it is read.

    Args:
        base: A tied head may be missing; one with an update is a weight of its own afterwards.
        updates: By the name of the weight.
        dtype: Of the outcome; None: as in `base`.
    """
    base = {**base, HEAD: base[EMBEDDING]} if HEAD in updates and HEAD not in base else base
    once = {id(tensor): tensor.to(dtype) if dtype and tensor.dtype.is_floating_point else tensor
            for tensor in base.values()}  # fmt: skip
    merged = {name: once[id(tensor)] for name, tensor in base.items()}
    for name, update in updates.items():
        merged[name] = _merged(base[name], update, dtype or base[name].dtype)
    return merged


def _merged(weight: LazyTensor, update: Update, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(weight.shape, dtype, read=lambda: update.apply(weight.read()).to(dtype))


def open_merged(
    lora_dir: Path, base_dir: Path, config: Config, settings: LoRASettings, dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The weights of the model in `base_dir` with the updates in `lora_dir`.

    Args:
        lora_dir: Holds `lit_model.pth.lora`.
        base_dir: A litgpt or Hugging Face folder.
        config: Of the model.
        settings: That the updates were trained with.
        dtype: Of the outcome; None: that of the updates.
    """
    base, file = open_model_weights(base_dir, config), lora_dir / LORA_NAME
    tensors, shapes = open_weights(file), {name: tensor.shape for name, tensor in base.items()}
    shapes.setdefault(HEAD, shapes.get(EMBEDDING, ()))
    try:
        updates = read_updates(tensors, settings, config, shapes)
    except ValueError as error:
        raise ValueError(f"{file} does not fit the model in {base_dir} and its settings: {error}") from None
    return merge_updates(base, updates, dtype or next(iter(tensors.values())).dtype)


def merge_folder(
    lora_dir: Path, base_dir: Path, config: Config, settings: LoRASettings, dtype: torch.dtype | None = None
) -> Path:
    """Write `lit_model.pth`, the merged model, beside the LoRA file; arguments as in `open_merged`.

    A kill leaves either no `lit_model.pth` or a whole one, and the record always says which LoRA file it is from.

    Raises:
        ValueError: The files do not fit, or there is a `lit_model.pth` that no merge has written.
    """
    check_crc(lora_dir / LORA_NAME)
    tensors, target = open_merged(lora_dir, base_dir, config, settings, dtype), lora_dir / WEIGHTS_NAME
    record = _read_record(lora_dir)
    if target.exists() and not _is_recorded(target, record):
        raise ValueError(
            f"{target} is there, and {RECORD_NAME} beside it does not say that it is a merged model: move it away "
            "or delete it to merge"
        )
    target.unlink(missing_ok=True)
    record = {"lora": _checksum(lora_dir / LORA_NAME)}
    _write_record(lora_dir, record)
    write_torch(target, tensors)
    if (
        HEAD in tensors
        and config.tie_embeddings
        and HEAD.removesuffix("weight") + "lora_A" in open_weights(lora_dir / LORA_NAME)
    ):
        save_config(replace(config, tie_embeddings=False), lora_dir)
    _write_record(lora_dir, record | {"model": _seal(target)})
    return target


def is_merged(lora_dir: Path) -> bool:
    """Whether `lit_model.pth` is there and was merged from the very LoRA file beside it."""
    target, record = lora_dir / WEIGHTS_NAME, _read_record(lora_dir)
    if not target.is_file() or not _is_recorded(target, record):
        return False
    return record["lora"] == _checksum(lora_dir / LORA_NAME)


def _is_recorded(target: Path, record: Mapping[str, Any]) -> bool:
    """Whether a merge wrote this file; one whose end is not in the record was written just before a kill."""
    return "lora" in record and record.get("model", _seal(target)) == _seal(target)


def _checksum(path: Path) -> str:
    return f"{path.stat().st_size} bytes, crc32 {crc_of_file(path):08x}"


def _seal(path: Path) -> str:
    """Length and end of a weights file of ours, which is its checksum, so that nobody has to read the whole."""
    with open(path, "rb") as file:
        n_bytes = file.seek(0, 2)
        file.seek(max(0, n_bytes - SEAL_BYTES))
        return f"{n_bytes} bytes, {file.read().decode('ascii', 'replace').strip()}"


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    with atomic_file(folder / RECORD_NAME) as file:
        file.write(json.dumps(record, indent=1).encode() + b"\n")
