"""LLaMA-Adapter (arXiv 2303.16199): a frozen model learns from prompts that its attention looks at besides the text.

`prompted_attention.py` has the attention that does so.
"""

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from litgpt import model as base
from litgpt.config import Config as BaseConfig
from litgpt.prompted_attention import PromptedAttention, prompt_attention, prompted
from litgpt.surgery import freeze, keep


@dataclass
class Config(BaseConfig):
    """A config whose GPT has adaption prompts from the start."""

    adapter_prompt_length: int = 10
    """Learned prompts of each adapted layer."""
    adapter_start_layer: int = 2
    """First layer with prompts; a model that has no such layer gets them in all."""


class CausalSelfAttention(prompted(base.CausalSelfAttention)):
    """Attention with the prompts that its config asks for."""

    def __init__(self, config: Config, block_idx: int = 0) -> None:
        super().__init__(config, block_idx)
        if block_idx >= first_layer(config.n_layer, config.adapter_start_layer):
            self.add_prompts(config.adapter_prompt_length)


class Block(base.Block):
    """Block whose attention, of whatever kind, has the prompts that its config asks for."""

    def __init__(self, config: Config, block_idx: int = 0) -> None:
        super().__init__(config, block_idx)
        if block_idx >= first_layer(config.n_layer, config.adapter_start_layer):
            prompt_attention(self.attn, config.adapter_prompt_length)


class GPT(base.GPT):
    """The GPT of a `Config` with its prompts; `add_adapter` does the same to a model that stands already."""

    block_class = Block

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> "GPT":
        """Builds the model of a named config; `kwargs` override its fields."""
        return cls(Config.from_name(name, **kwargs))


def add_adapter(model: nn.Module, prompt_length: int = 10, start_layer: int = 2) -> nn.Module:
    """Gives each attention from `start_layer` on its prompts, in place. The model computes what it did before.

    Args:
        model: Any module tree with litgpt's attention or subclasses of it, also quantised or on the meta device.
        prompt_length: Prompts of each layer.
        start_layer: First layer with prompts; where the model has no such layer, all get them.
    """
    if prompt_length < 1 or start_layer < 0:
        raise ValueError(f"prompt_length {prompt_length} must be 1 or more, start_layer {start_layer} 0 or more")
    attentions = [module for module in model.modules() if isinstance(module, base.CausalSelfAttention)]
    if not attentions:
        raise ValueError(
            f"{type(model).__name__} has no attention that is a litgpt.model.CausalSelfAttention, where adaption "
            "prompts go in; finetune_lora and finetune_adapter_v2 work on any linear layer"
        )
    if any(isinstance(attention, PromptedAttention) and attention.has_prompts for attention in attentions):
        raise ValueError(f"{type(model).__name__} has adaption prompts already")
    if (first := first_layer(len(attentions), start_layer)) != start_layer:
        what = f"prompts from layer {start_layer} on, but the model has {len(attentions)} layers"
        warnings.warn(f"{what}: all of them get prompts", stacklevel=2)
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    for attention in attentions[first:]:
        prompt_attention(attention, prompt_length, like)
    return model


def first_layer(n_layer: int, start_layer: int) -> int:
    """The first of `n_layer` layers that gets prompts: `start_layer`, or 0 where the model ends before it."""
    return start_layer if start_layer < n_layer else 0


def mark_only_adapter_as_trainable(model: nn.Module) -> None:
    """Freezes everything but prompts and gates."""
    freeze(model)
    keep(model, lambda name: adapter_filter(name, None))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no adaption prompts to be trained: call add_adapter first")


def adapter_filter(key: str, value: Any) -> bool:
    """Whether the entry `key` of a state dict belongs to the adapter."""
    return "adapter_wte" in key or "gating_factor" in key
