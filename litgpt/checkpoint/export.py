"""Weights and settings of a litgpt checkpoint for other programs: a Hugging Face folder, a state dict, a GGUF file."""

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint.adapter import StateDictAdapter, find_model_type
from litgpt.checkpoint.atomic import atomic_folder, remove_leftovers
from litgpt.checkpoint.folders import find_weights_file
from litgpt.checkpoint.gguf import GGUFType, write_gguf
from litgpt.checkpoint.hf_config import config_to_hf, read_hf_config
from litgpt.checkpoint.lazy import LazyTensor
from litgpt.checkpoint.loading import open_model_weights
from litgpt.checkpoint.tensors import open_weights
from litgpt.checkpoint.writing import write_safetensors, write_torch
from litgpt.config import Config, save_config
from litgpt.tokenizer import MissingTokenizerError, Tokenizer, fix_and_load_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_FOLDER_FILES = (
    *TOKENIZER_FILES, "config.json", "generation_config.json", "model_config.yaml", "prompt_style.yaml",
    "checksums.json", "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
)  # fmt: skip
"""All that an export writes; a folder with anything else in it is never replaced."""

_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_LORA = ("lora_A", "lora_B", ".lora_")
_ADAPTER = ("adapter_wte", "gating_factor", "adapter_scale", "adapter_bias")


@dataclass(frozen=True)
class Export:
    """A checkpoint that is opened for export; no weights are read yet."""

    folder: Path
    config: Config
    """With `tie_embeddings` as the weights have it."""
    model_type: str
    """As Hugging Face calls the kind of model."""
    weights: dict[str, LazyTensor]
    """In our names and layout."""
    weight_map: Any = None
    """Names that a registered model asks for, in place of those of `model_type`."""


def open_export(
    checkpoint_dir: Path, config: Config, dtype: torch.dtype | None = None, weight_map: Any = None
) -> Export:
    """The checkpoint in a litgpt or Hugging Face folder.

    Args:
        dtype: What floating point weights are cast to; None: they stay as they are.
        weight_map: See `ModelSpec`.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: They are not those of the model, or need to be merged first.
    """
    check_mergeable(checkpoint_dir)
    weights = open_model_weights(checkpoint_dir, config, weight_map=weight_map)
    if dtype is not None:
        weights = {name: t.to(dtype) if t.dtype.is_floating_point else t for name, t in weights.items()}
    if _HEAD in weights and config.tie_embeddings:
        if _is_same(weights[_HEAD], weights[_EMBEDDING]):
            weights.pop(_HEAD)
        else:
            config = replace(config, tie_embeddings=False)  # the head was trained apart
    return Export(checkpoint_dir, config, _find_type(checkpoint_dir, config), weights, weight_map)


def _find_type(checkpoint_dir: Path, config: Config) -> str:
    """The type that config.json says, unless model_config.yaml describes another model: a run may copy the config.json
    that lies beside a tokenizer.
    """
    if not (checkpoint_dir / "config.json").is_file():
        return find_model_type(config)
    is_ours = (checkpoint_dir / "model_config.yaml").is_file()
    try:
        model_type = find_model_type(config, read_hf_config(checkpoint_dir, is_quiet=True))
        if is_ours:
            config_to_hf(config, model_type)
    except ValueError:
        if not is_ours:
            raise
        return find_model_type(config)
    return model_type


def check_mergeable(checkpoint_dir: Path) -> None:
    """Raise where the weights have parts of finetuning beside them that no other program knows."""
    try:
        check_keys(open_weights(find_weights_file(checkpoint_dir)))
    except FileNotFoundError:
        if any(checkpoint_dir.glob("*.pth.lora")):
            raise _unmerged(f"{checkpoint_dir} holds LoRA weights only") from None
        if any(checkpoint_dir.glob("*.pth.adapter*")):
            raise _no_adapters(f"{checkpoint_dir} holds adapter weights only") from None
        raise


def check_keys(names: Iterable[str]) -> None:
    """Raise if there are weights of LoRA (ValueError) or of adapters (NotImplementedError) among the names."""
    for name in names:
        if any(part in name for part in _LORA):
            raise _unmerged(f"the weights hold LoRA's {name}")
        if any(part in name for part in _ADAPTER):
            raise _no_adapters(f"the weights hold an adapter's {name}")


def _unmerged(what: str) -> ValueError:
    return ValueError(f"{what}: merge them into the model first, with `litgpt merge_lora CHECKPOINT_DIR`")


def _no_adapters(what: str) -> NotImplementedError:
    return NotImplementedError(f"{what}: adapters change how the model computes, so that no other program can load it")


def write_hf_folder(export: Export, output_dir: Path, max_shard_bytes: int) -> list[Path]:
    """Write what `from_pretrained`, vLLM and TGI load, and all of our own commands; it appears when it is complete.

    Args:
        output_dir: Does not exist, is empty, or is an earlier export, which is replaced.

    Returns:
        The files with weights.

    Raises:
        ValueError: The folder holds other files, or Hugging Face has no such model.
    """
    check_replaceable(output_dir, export.folder)
    tensors = hf_tensors(export)
    token_ids = find_token_ids(export.folder)
    values = config_to_hf(export.config, export.model_type, dtype=_dtype(tensors), **token_ids)
    remove_leftovers(output_dir.absolute().parent)
    with atomic_folder(output_dir) as folder:
        written = write_safetensors(folder, tensors, max_shard_bytes)
        _write_json(folder / "config.json", values)
        save_config(export.config, folder)
        for name in (*TOKENIZER_FILES, "prompt_style.yaml"):
            if (export.folder / name).is_file():
                shutil.copyfile(export.folder / name, folder / name)
        if settings := _generation_settings(export.folder) or token_ids:
            _write_json(folder / "generation_config.json", settings)
    if not any((output_dir / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        warnings.warn(f"{export.folder} holds no tokenizer, and neither does {output_dir}", stacklevel=2)
    return [output_dir / path.name for path in written]


def write_hf_state_dict(export: Export, path: Path) -> Path:
    """Write one torch file for `from_pretrained(.., state_dict=torch.load(path))`."""
    tensors = hf_tensors(export)
    _check_is_no_file(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_torch(path, tensors)
    return path


def write_gguf_file(export: Export, output: Path, gguf_type: GGUFType) -> Path:
    """Write one file for llama.cpp: `output` if that ends in .gguf, else one in this folder, called after the model."""
    path = output
    if output.suffix.lower() != ".gguf" or output.is_dir():
        _check_is_no_file(output)
        name = export.config.name or export.folder.resolve().name
        path = output / f"{name.replace('/', '-')}-{gguf_type.upper()}.gguf"
    return write_gguf(path, export.weights, export.config, export.model_type, export.folder, gguf_type)


def _check_is_no_file(folder: Path) -> None:
    if folder.is_file():
        raise ValueError(f"{folder} is a file: name a folder")


def hf_tensors(export: Export) -> dict[str, LazyTensor]:
    """The weights by the names of Hugging Face, or those of the model's own weight map."""
    shapes = None if export.weight_map is None else {name: tensor.shape for name, tensor in export.weights.items()}
    return StateDictAdapter(export.config, export.weight_map or export.model_type, shapes).to_hf(export.weights)


def check_replaceable(output_dir: Path, source: Path) -> None:
    """Raise unless nothing is lost when `output_dir` is replaced."""
    _check_is_no_file(output_dir)
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    known = {path for pattern in _FOLDER_FILES for path in output_dir.glob(pattern)}
    others = sorted(path.name for path in output_dir.iterdir() if path not in known)
    if output_dir.resolve() == source.resolve():
        raise ValueError(f"{output_dir} is the checkpoint itself: name another folder")
    if others or not (output_dir / "checksums.json").is_file():
        raise ValueError(
            f"{output_dir} holds files that no export wrote ({', '.join(others[:3]) or 'no checksums.json'}): name a "
            "folder that does not exist yet, or an empty one"
        )


def find_token_ids(checkpoint_dir: Path) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, as far as tokenizer and generation_config.json tell."""
    values = _generation_settings(checkpoint_dir)
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values.get(key) is not None}
    try:
        tokenizer = Tokenizer(checkpoint_dir)
    except MissingTokenizerError:
        return ids
    found = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {key: value for key, value in found.items() if value is not None} | ids


def _generation_settings(checkpoint_dir: Path) -> dict[str, Any]:
    """The content of generation_config.json, with wrong commas put right."""
    file = checkpoint_dir / "generation_config.json"
    if not file.is_file():
        return {}
    text = file.read_text(encoding="utf-8-sig")
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        try:
            values = fix_and_load_json(text)
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON ({error}); fetch it again, or remove it") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, not a JSON object; fetch it again, or remove it")
    return values


def _is_same(one: LazyTensor, other: LazyTensor) -> bool:
    if one is other:
        return True
    return one.shape == other.shape and all(torch.equal(a, b) for a, b in zip(one.iter_pieces(), other.iter_pieces()))


def _dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype | None:
    """The dtype of most values."""
    n_bytes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            n_bytes[tensor.dtype] += tensor.n_bytes
    return n_bytes.most_common(1)[0][0] if n_bytes else None


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
