"""Functions of `litgpt.utils` in 0.5 about weights, for scripts that call them; thin faces of what lies beside."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, device, nn

from litgpt.checkpoint.hub import find_checkpoint
from litgpt.checkpoint.loading import load_model_weights, load_weights
from litgpt.checkpoint.torch_file import save_torch


def load_checkpoint(fabric: Any, model: nn.Module, checkpoint_path: Path, strict: bool = True) -> None:
    """Load the weights of a file or folder into `model`, which Fabric may have wrapped.

    Args:
        fabric: Not needed any more.
        model: Takes the weights in place.
        checkpoint_path: See `open_weights`.
        strict: Refuse missing and unexpected names.
    """
    load_model_weights(_unwrapped(model), checkpoint_path, strict=strict)


def load_checkpoint_update(
    fabric: Any, adapter_path: Path, model: nn.Module, checkpoint_path: Path, strict: bool = True
) -> None:
    """Load the weights of a file, and over them those of `adapter_path`, which may hold a few only.

    Raises:
        ValueError: With `strict`, the two together are not the weights of the model.
    """
    state = {**load_weights(checkpoint_path), **load_weights(adapter_path)}
    try:
        _unwrapped(model).load_state_dict(state, strict=strict)
    except RuntimeError as error:
        both = f"{checkpoint_path} and {adapter_path}"
        raise ValueError(f"{both} do not fit the model: {' '.join(str(error).split())}") from None


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if hasattr(model, "_forward_module") else model


def map_old_state_dict_weights(state_dict: dict, mapping: Mapping[str, str], prefix: str) -> dict:
    """Rename keys in place: `prefix` + old becomes `prefix` + new, for each old -> new of `mapping` that is there."""
    for old, new in mapping.items():
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)
    return state_dict


def auto_download_checkpoint(
    model_name: Path | str, access_token: str | None = None, ignore_tokenizer_files: bool = False
) -> Path:
    """The folder of a checkpoint, downloaded if it is not there; see `find_checkpoint`."""
    return find_checkpoint(model_name, access_token=access_token)


def check_file_size_on_cpu_and_warn(
    checkpoint_path: Path | str, device: "device | str", size_limit: int = 4_509_715_660
) -> int:
    """The size of a weights file in bytes; a warning if that is much for a CPU.

    Args:
        checkpoint_path: The file.
        device: Where the model will run; on others than the CPU nothing is said.
        size_limit: In bytes.
    """
    size = Path(checkpoint_path).stat().st_size
    if size > size_limit and str(device) == "cpu":
        warnings.warn(f"{checkpoint_path} has {size / 1e9:.1f} GB: on a CPU this model will be slow", stacklevel=2)
    return size


class incremental_save:
    """`with incremental_save(path) as saver: saver.save(state_dict)`; the file appears when it is complete."""

    def __init__(self, name: Path | str) -> None:
        self.name, self.has_saved = Path(name), False

    def __enter__(self) -> "incremental_save":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def store_early(self, tensor: Tensor) -> Tensor:
        """`tensor` itself: it is written with the rest. `write_torch` writes models that exceed the memory."""
        return tensor

    def save(self, obj: Any) -> None:
        """Write the file, once."""
        if self.has_saved:
            raise RuntimeError(f"{self.name} has been saved already")
        save_torch(obj, self.name)
        self.has_saved = True
