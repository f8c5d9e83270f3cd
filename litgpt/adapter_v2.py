"""LLaMA-Adapter v2 (arXiv 2304.15010): scales and biases of all linear layers learn, norms, and adaption prompts."""

from dataclasses import dataclass
from typing import Any

from torch import nn

import litgpt.adapter
import litgpt.model
from litgpt.adapter import add_adapter
from litgpt.adapter_linear import AdapterV2Linear
from litgpt.surgery import freeze, keep, linear_names, swap_linears

NORMS = ("norm_1", "norm_2", "ln_f", "post_attention_norm", "post_mlp_norm")
"""Norms that are trained and saved, by name."""


def add_adapter_v2(model: nn.Module, prompt_length: int = 10, start_layer: int = 2) -> nn.Module:
    """Puts a scale and a bias on every linear layer of `model`, in place, and adds prompts to attention of ours.

    Args:
        model: Any module tree, also quantised or on the meta device.
        prompt_length: Prompts of each layer, see `add_adapter`.
        start_layer: First layer with prompts.
    """
    if any(isinstance(module, litgpt.model.CausalSelfAttention) for module in model.modules()):
        add_adapter(model, prompt_length, start_layer)
    if not linear_names(model):
        raise ValueError(f"{type(model).__name__} has no linear layers to adapt, or all are wrapped already")
    _wrap(model)
    return model


def merge_adapter_v2(model: nn.Module) -> None:
    """Folds scales and biases into plain linear layers, which makes the model as fast as without them.

    Left as they are: quantised layers, and a head whose weight the embedding shares. Prompts stay what they are.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            is_plain = isinstance(child, AdapterV2Linear) and type(child.linear) is nn.Linear
            if is_plain and id(child.linear.weight) not in embeddings:
                setattr(parent, name, child.merged())


def mark_only_adapter_v2_as_trainable(model: nn.Module) -> None:
    """Freezes everything but prompts, gates, scales, biases and norms."""
    freeze(model)
    keep(model, lambda name: adapter_filter(name, None))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no adapter to be trained: call add_adapter_v2 first")


def adapter_filter(key: str, value: Any) -> bool:
    """Whether the entry `key` of a state dict belongs to the adapter."""
    parts = key.split(".")
    return litgpt.adapter.adapter_filter(key, value) or (
        parts[-1] in ("adapter_scale", "adapter_bias") or any(part in NORMS for part in parts)
    )


def _wrap(module: nn.Module) -> None:
    if linear_names(module):
        like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
        size = lambda linear: (linear.in_features, linear.out_features)  # noqa: E731
        swap_linears(module, "*", lambda name, linear: AdapterV2Linear(*size(linear), linear=linear, dtype=like.dtype))


# ---------------------------------------------------------------- published in 0.5


@dataclass
class Config(litgpt.adapter.Config):
    """A config whose GPT has adapters v2 from the start."""


class _WithAdapter(nn.Module):
    """Adds scales and biases to the class that stands beside this one among the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _wrap(self)


class GPT(_WithAdapter, litgpt.adapter.GPT):
    """The GPT of a `Config` with its adapters; `add_adapter_v2` does the same to a model that stands already."""

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> "GPT":
        """Builds the model of a named config; `kwargs` override its fields."""
        return cls(Config.from_name(name, **kwargs))


class Block(_WithAdapter, litgpt.adapter.Block):
    """A block with its adapters."""


class CausalSelfAttention(_WithAdapter, litgpt.adapter.CausalSelfAttention):
    """`adapter.CausalSelfAttention` with scales and biases."""


class GptNeoxMLP(_WithAdapter, litgpt.model.GptNeoxMLP):
    """`model.GptNeoxMLP` with scales and biases."""


class LLaMAMLP(_WithAdapter, litgpt.model.LLaMAMLP):
    """`model.LLaMAMLP` with scales and biases."""


class GemmaMLP(_WithAdapter, litgpt.model.GemmaMLP):
    """`model.GemmaMLP` with scales and biases."""


class LLaMAMoE(_WithAdapter, litgpt.model.LLaMAMoE):
    """`model.LLaMAMoE` with scales and biases."""


GPT.block_class = Block
