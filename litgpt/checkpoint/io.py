"""Reading and writing checkpoints: the names that the rest of the project, and users, import.

Nothing is ever unpickled freely (`torch_file`), reading copies nothing that need not be copied (`tensors`, `loading`),
and writing leaves no fragments (`atomic`).
"""

from litgpt.checkpoint.atomic import atomic_file, atomic_folder, remove_leftovers
from litgpt.checkpoint.crc import check_crc
from litgpt.checkpoint.folders import (
    WEIGHTS_NAME,
    check_valid_checkpoint_dir,
    copy_config_files,
    extend_checkpoint_dir,
    find_resume_path,
    find_weights_file,
)
from litgpt.checkpoint.loading import CheckpointValidationResult, load_model_weights, load_weights, validate_checkpoint
from litgpt.checkpoint.torch_file import load_torch, save_torch

__all__ = [
    "WEIGHTS_NAME", "CheckpointValidationResult", "atomic_file", "atomic_folder", "check_crc",
    "check_valid_checkpoint_dir", "copy_config_files", "extend_checkpoint_dir", "find_resume_path", "find_weights_file",
    "load_model_weights", "load_torch", "load_weights", "remove_leftovers", "save_torch", "validate_checkpoint",
]  # fmt: skip
