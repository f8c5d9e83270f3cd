"""Weights into models: whatever lies on disk becomes the tensors of our model, read in place where that is possible."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from litgpt.checkpoint.folders import some
from litgpt.checkpoint.tensors import LazyTensor, open_weights


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
