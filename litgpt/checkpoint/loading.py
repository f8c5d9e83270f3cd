"""Weights into models: whatever lies on disk becomes the tensors of our model, read in place where that is possible."""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.checkpoint.adapter import StateDictAdapter, find_model_type, is_hf_names
from litgpt.checkpoint.folders import some
from litgpt.checkpoint.hf_config import read_hf_config
from litgpt.checkpoint.lazy import cast_all
from litgpt.checkpoint.tensors import LazyTensor, open_weights
from litgpt.checkpoint.weight_maps import WeightMap
from litgpt.config import Config

_BLOCK = re.compile(r"(.*?\.\d+)\.")


def open_model_weights(
    dir_or_file: Path | str,
    config: Config,
    hf_values: dict[str, Any] | None = None,
    weight_map: WeightMap | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint in our names and layout, whatever is on disk; nothing is read yet.

    Args:
        dir_or_file: See `open_weights`. Hugging Face weights are recognised by their names.
        config: Of the model that the weights belong to.
        hf_values: The `config.json` beside Hugging Face weights; None: it is read if it is there.
        weight_map: How a registered model calls its weights elsewhere, see `ModelSpec`.
        shapes: Of the weights by our names, where the model has others than a GPT of this config.

    Raises:
        ValueError: A tensor that such a model does not have, or one that is missing.
    """
    tensors = open_weights(dir_or_file)
    if weight_map is None and not is_hf_names(tensors):
        return tensors
    return _in_our_names(tensors, Path(dir_or_file), config, hf_values, weight_map, shapes)


def _in_our_names(
    tensors: dict[str, LazyTensor],
    path: Path,
    config: Config,
    hf_values: dict[str, Any] | None = None,
    weight_map: WeightMap | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, LazyTensor]:
    folder = path if path.is_dir() else path.parent
    if weight_map is None and hf_values is None and (folder / "config.json").is_file():
        hf_values = read_hf_config(folder, is_quiet=True)
    try:
        adapter = StateDictAdapter(config, weight_map or find_model_type(config, hf_values, tensors), shapes)
        if weight_map is not None and _n_known(tensors, adapter.shapes) > _n_known(tensors, adapter.hf_shapes()):
            return tensors  # some names may be the same on both sides
        return adapter.from_hf(tensors)
    except ValueError as error:
        raise ValueError(f"the weights in {path} do not fit the model: {error}") from None


def load_weights(dir_or_file: Path | str) -> dict[str, Tensor]:
    """The model part of a checkpoint as name -> memory-mapped tensor, without `_orig_mod.` of compiled modules.

    Args:
        dir_or_file: See `open_weights`. Names are those in the file.
    """
    return {name: _values(tensor) for name, tensor in open_weights(dir_or_file).items()}


def _values(tensor: LazyTensor) -> Tensor:
    return tensor.read() if tensor.view is None else tensor.view()


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
        parts = [f"{what}: {some(names)}" for what, names in found.items() if names]
        return "; ".join(parts) if parts else "every weight fits the model"


def validate_checkpoint(checkpoint_path: Path, model: nn.Module, verbose: bool = True) -> CheckpointValidationResult:
    """Compare names and shapes in a weights file or folder with `model` (also on the meta device); changes nothing."""
    try:
        result = _compare(model, _open_for(model, checkpoint_path))
    except (OSError, ValueError) as error:
        result = CheckpointValidationResult(is_valid=False, errors=[str(error)])
    if verbose:
        print(f"{checkpoint_path}: {result.summary()}")
    return result


def check_fit(model: nn.Module, tensors: Mapping[str, LazyTensor], source: Path | str) -> None:
    """Raise a `ValueError` if names or shapes differ from those of `model`, which may be on the meta device."""
    if not (found := _compare(model, tensors)).is_valid:
        raise _misfit(source, found.summary())


def load_model_weights(
    model: nn.Module, dir_or_file: Path | str, strict: bool = True, dtype: torch.dtype | None = None,
    weight_map: WeightMap | None = None
) -> None:  # fmt: skip
    """Load the model part of a checkpoint, ours or one of Hugging Face.

    Parameters on the meta device become views of the file, where its dtype is the wanted one and the layout is ours;
    everything else is read, and cast, once. Memory holds little beside the weights at any time.

    Args:
        model: Takes the weights in place. Parameters shared by two names stay shared, also when only one of the
            names is in the file (tied embeddings).
        dir_or_file: See `open_weights`.
        strict: Refuse missing and unexpected names. Wrong shapes are always refused.
        dtype: What floating point weights are cast to. None: on the meta device as in the file, otherwise as the
            parameters are.
        weight_map: How a registered model calls its weights elsewhere, see `ModelSpec`.
    """
    tensors, aliases = _open_for(model, dir_or_file, weight_map), _shared_parameters(model)
    state = model.state_dict(keep_vars=True)
    is_meta = any(tensor.is_meta for tensor in state.values() if isinstance(tensor, Tensor))
    if dtype is not None:
        tensors = cast_all(tensors, dtype)
        if not is_meta:
            model.to(dtype=dtype)
    try:
        missing, unexpected = _load_in_place(model, tensors) if is_meta else _copy_block_by_block(model, tensors)
    except RuntimeError as error:
        found = _compare(model, tensors)
        reason = found.summary() if found.shape_mismatches else " ".join(str(error).split())
        raise _misfit(dir_or_file, reason) from None
    for names in aliases:
        present = [name for name in names if name in tensors]
        if any(not _is_same(tensors[present[0]], tensors[name]) for name in present[1:]):
            if len({id(model.get_parameter(name)) for name in present}) == 1:
                raise _misfit(dir_or_file, f"{' and '.join(present)} differ in the file but are one in the model")
        elif is_meta and present:
            for name in names:
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, model.get_parameter(present[0]))
    missing = [name for name in missing if not _has_alias(name, aliases, tensors)]
    if strict and (missing or unexpected):
        raise _misfit(dir_or_file, CheckpointValidationResult(False, missing, unexpected).summary())


def _open_for(model: nn.Module, dir_or_file: Path | str, weight_map: WeightMap | None = None) -> dict[str, LazyTensor]:
    tensors, config = open_weights(dir_or_file), getattr(model, "config", None)
    is_own = tensors.keys() <= model.state_dict().keys()  # a model that is no GPT may use the same names
    if is_own or not isinstance(config, Config) or (weight_map is None and not is_hf_names(tensors)):
        return tensors
    if weight_map is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return _in_our_names(tensors, Path(dir_or_file), config, None, weight_map, shapes)
    return _in_our_names(tensors, Path(dir_or_file), config)


def _load_in_place(model: nn.Module, tensors: Mapping[str, LazyTensor]) -> tuple[list[str], list[str]]:
    values: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in values:
            values[id(tensor)] = _values(tensor)
    weights = {name: values[id(tensor)] for name, tensor in tensors.items()}
    keys = model.load_state_dict(weights, strict=False, assign=True)
    return list(keys.missing_keys), list(keys.unexpected_keys)


def _copy_block_by_block(model: nn.Module, tensors: Mapping[str, LazyTensor]) -> tuple[list[str], list[str]]:
    """Copy into the parameters what belongs to one block at a time, so that memory holds no second set of weights."""
    blocks: dict[str, dict[str, LazyTensor]] = {"": {}}
    for name, tensor in tensors.items():
        match = _BLOCK.match(name)
        blocks.setdefault(match[1] if match else "", {})[name] = tensor
    missing: dict[str, None] = dict.fromkeys(model.state_dict())
    unexpected: list[str] = []
    for block in blocks.values():
        keys = model.load_state_dict({name: tensor.read() for name, tensor in block.items()}, strict=False)
        missing = dict.fromkeys(name for name in missing if name in set(keys.missing_keys))
        unexpected += keys.unexpected_keys
    return list(missing), unexpected


def _is_same(one: LazyTensor, other: LazyTensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    return all(torch.equal(a, b) for a, b in zip(one.iter_pieces(), other.iter_pieces()))


def _compare(model: nn.Module, weights: Mapping[str, LazyTensor]) -> CheckpointValidationResult:
    weights = {_spelled(name): tensor for name, tensor in weights.items()}
    aliases, state = _shared_parameters(model), model.state_dict()
    missing = [name for name in state if name not in weights and not _has_alias(name, aliases, weights)]
    unexpected = [name for name in weights if name not in state]
    shapes = [
        f"{name} {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the model"
        for name, tensor in state.items()
        if name in weights and weights[name].shape != tuple(tensor.shape)
    ]
    return CheckpointValidationResult(not (missing or unexpected or shapes), missing, unexpected, shapes)


def _n_known(names: Iterable[str], known: Container[str]) -> int:
    return sum(_spelled(name) in known for name in names)


def _spelled(name: str) -> str:
    """A name of ours; `attn.attn` is the published old spelling that attention converts while loading."""
    return name.replace(".attn.attn.", ".attn.qkv.")


def _shared_parameters(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _has_alias(name: str, aliases: list[list[str]], weights: Mapping[str, LazyTensor]) -> bool:
    return any(name in group and any(other in weights for other in group) for group in aliases)


def _misfit(source: Path | str, reason: str) -> ValueError:
    return ValueError(
        f"the weights in {source} do not fit the model ({reason}): either the checkpoint's config does not fit its "
        "weights (compare model_config.yaml there) or they belong to another model"
    )
