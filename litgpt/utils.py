"""Where version 0.5 had its helpers. This module only hands their names on; new code imports from the modules below."""

import importlib
from typing import Any

_MODULE_OF = {
    "CLI": "parser_config",
    "CheckpointValidationResult": "checkpoint.io",
    "CycleIterator": "training",
    "auto_download_checkpoint": "checkpoint.published",
    "capture_hparams": "parser_config",
    "check_file_size_on_cpu_and_warn": "checkpoint.published",
    "check_valid_checkpoint_dir": "checkpoint.folders",
    "choose_logger": "loggers",
    "chunked_cross_entropy": "losses",
    "copy_config_files": "checkpoint.folders",
    "estimate_flops": "plan",
    "estimate_model_memory": "plan",
    "extend_checkpoint_dir": "checkpoint.folders",
    "find_multiple": "config",
    "find_resume_path": "checkpoint.folders",
    "fix_and_load_json": "tokenizer",
    "flops_per_param": "plan",
    "get_default_supported_precision": "hardware",
    "incremental_save": "checkpoint.published",
    "init_out_dir": "preflight",
    "instantiate_bnb_optimizer": "optimizers",
    "instantiate_torch_optimizer": "optimizers",
    "load_checkpoint": "checkpoint.published",
    "load_checkpoint_update": "checkpoint.published",
    "map_old_state_dict_weights": "checkpoint.published",
    "num_parameters": "training",
    "parse_devices": "hardware",
    "save_config": "config",
    "save_hyperparameters": "parser_config",
    "validate_checkpoint": "checkpoint.io",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'litgpt.utils' has no attribute {name!r}")
    return getattr(importlib.import_module(f"litgpt.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
