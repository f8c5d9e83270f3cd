"""LitGPT: language models to read, train, use and change.

Every name is imported when it is first touched, so that `import litgpt` itself costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt.api import LLM
    from litgpt.checkpoint.io import CheckpointValidationResult, validate_checkpoint
    from litgpt.config import Config
    from litgpt.model import GPT, MLP, Block, CausalSelfAttention, GptNeoxMLP, LLaMAMLP
    from litgpt.objective import NextToken, Objective
    from litgpt.plan import estimate_model_memory
    from litgpt.prompts import PromptStyle
    from litgpt.registry import ModelSpec, register_data, register_model, register_objective
    from litgpt.tokenizer import Tokenizer

_MODULE_OF = {
    "LLM": "api",
    "GPT": "model",
    "Config": "config",
    "PromptStyle": "prompts",
    "Tokenizer": "tokenizer",
    "CheckpointValidationResult": "checkpoint.io",
    "validate_checkpoint": "checkpoint.io",
    "estimate_model_memory": "plan",
    "Block": "model",
    "CausalSelfAttention": "model",
    "MLP": "model",
    "LLaMAMLP": "model",
    "GptNeoxMLP": "model",
    "register_model": "registry",
    "register_objective": "registry",
    "register_data": "registry",
    "ModelSpec": "registry",
    "Objective": "objective",
    "NextToken": "objective",
}

__all__ = [
    "GPT",
    "LLM",
    "MLP",
    "Block",
    "CausalSelfAttention",
    "CheckpointValidationResult",
    "Config",
    "GptNeoxMLP",
    "LLaMAMLP",
    "ModelSpec",
    "NextToken",
    "Objective",
    "PromptStyle",
    "Tokenizer",
    "estimate_model_memory",
    "register_data",
    "register_model",
    "register_objective",
    "validate_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'litgpt' has no attribute {name!r}")
    module_name = f"litgpt.{_MODULE_OF[name]}"
    try:
        value = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        # An ImportError, because `from litgpt import x` would replace the message of an AttributeError.
        raise ImportError(f"litgpt.{name} is not in this version yet: {module_name} does not exist.") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("litgpt")
    except PackageNotFoundError:
        return "0+unknown"
