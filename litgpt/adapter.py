"""LLaMA-Adapter (arXiv 2303.16199): a frozen model learns from prompts that its attention looks at besides the text.

Letters in shapes are those of `model.py`; P is the number of prompts of a layer.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from litgpt import model as base
from litgpt.config import Config as BaseConfig
from litgpt.surgery import freeze, keep


@dataclass
class Config(BaseConfig):
    """A config whose GPT has adaption prompts from the start."""

    adapter_prompt_length: int = 10
    """Learned prompts of each adapted layer."""
    adapter_start_layer: int = 2
    """First layer with prompts; a model that has no such layer gets them in all."""


class PromptedAttention:
    """Stands before an attention class among the bases of a class: queries look at P prompts too, in a softmax of their
    own, whose result comes in through a gate for each head. Gates start at zero, so that nothing changes at first."""

    has_prompts = False
    prompt_kv: tuple[Tensor, Tensor] | None = None  # of the pass that runs, or of the text in the KV cache
    is_reached = True  # False until the kernel has run, for an attention that may never call it

    def add_prompts(self, prompt_length: int, like: Tensor | None = None) -> None:
        """Gives the layer its prompts and gates, in the dtype of `like`, on the device of the layer."""
        device = next(chain(self.parameters(), self.buffers())).device  # quantised layers have buffers only
        where = dict(device=device, dtype=None if like is None else like.dtype)
        self.adapter_wte = nn.Embedding(prompt_length, self.config.n_embd, **where)
        self.gating_factor = nn.Parameter(torch.zeros(1, 1, self.config.n_head, 1, **where))
        self.has_prompts = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the attention class; `(B, T, C)` to `(B, T, C)`."""
        if not self.has_prompts:
            return super().forward(x, *args, **kwargs)
        given = dict(zip(("cos", "sin", "mask", "input_pos", "input_pos_maxp1"), args)) | kwargs
        has_cache, has_grad = given.get("input_pos") is not None, torch.is_grad_enabled()
        goes_on = has_cache and x.size(1) == 1 and given.get("input_pos_maxp1") != 1  # the first tokens came before
        if has_grad or not goes_on or self.prompt_kv is None:
            self.prompt_kv = self.project_prompts(x)
        y = super().forward(x, *args, **kwargs)
        if has_grad or not has_cache:
            self.prompt_kv = None
        if not self.is_reached:
            name = type(self).__mro__[2].__name__
            raise NotImplementedError(f"{name} never calls self.scaled_dot_product_attention: prompts have no effect")
        return y

    def project_prompts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompts, `(1, G, P, hs)`: projected as those of the text `x`, but not rotated."""
        prompts = self.adapter_wte.weight.to(x.dtype).unsqueeze(0)  # (1, P, C)
        cos = torch.ones(1, 1, self.config.rope_n_elem, dtype=base.compute_dtype(x), device=x.device)
        return self.project(prompts, cos, torch.zeros_like(cos))[1:]

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The kernel over the text plus, through the gates, the kernel over the prompts: `(B, T, nh, hs)`."""
        y = super().scaled_dot_product_attention(q, k, v, mask, *args, **kwargs)
        if self.prompt_kv is None:
            return y
        self.is_reached = True
        keys, values = (z.expand(len(q), -1, -1, -1) for z in self.prompt_kv)  # (B, G, P, hs)
        all_seen = torch.ones(q.size(2), keys.size(2), dtype=torch.bool, device=q.device)
        return y + self.gating_factor.to(y.dtype) * super().scaled_dot_product_attention(q, keys, values, all_seen)

    def reset_parameters(self) -> None:
        """Draws new prompts and closes the gates."""
        if self.has_prompts:
            self.adapter_wte.reset_parameters()
            nn.init.zeros_(self.gating_factor)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        gate = state_dict.get(name := f"{prefix}gating_factor")
        if gate is not None and gate.shape == (1, self.config.n_head, 1, 1):  # as checkpoints of old have it
            state_dict[name] = gate.transpose(1, 2)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class CausalSelfAttention(PromptedAttention, base.CausalSelfAttention):
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
            _prompt(self.attn, config.adapter_prompt_length)


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
        _prompt(attention, prompt_length, like)
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


def _prompt(attention: base.CausalSelfAttention, prompt_length: int, like: Tensor | None = None) -> None:
    kind = type(attention)
    if not issubclass(kind, PromptedAttention):
        attention.__class__ = _prompted(kind)
        attention.is_reached = kind.forward is base.CausalSelfAttention.forward
    if not attention.has_prompts:
        attention.add_prompts(prompt_length, like)


@cache
def _prompted(kind: type[base.CausalSelfAttention]) -> type[base.CausalSelfAttention]:
    if kind is base.CausalSelfAttention:
        return CausalSelfAttention
    return type(f"Prompted{kind.__name__}", (PromptedAttention, kind), {"__module__": __name__})
