"""LLaMA-Adapter v2 (arXiv 2304.15010): a scale and a bias learn on every linear layer, of any module tree; the norms of
the blocks learn too, and the prompts of `adapter.py` where there is attention of ours.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import litgpt.adapter
import litgpt.model
from litgpt.adapter import add_adapter
from litgpt.surgery import WrappedLinear, freeze, keep, linear_names, swap_linears

NORMS = ("norm_1", "norm_2", "ln_f", "post_attention_norm", "post_mlp_norm")
"""Norms that are trained and saved, by name."""


class AdapterV2Linear(WrappedLinear):
    """`scale * (W x + b + bias)` with a scale and a bias for each output; it starts as the layer was."""

    def __init__(
        self, in_features: int, out_features: int, *, linear: nn.Module | None = None, dtype: torch.dtype | None = None,
        **kwargs: Any
    ) -> None:  # fmt: skip
        """`linear` is the layer to wrap; without it a new one is made, for which `kwargs` are."""
        super().__init__(nn.Linear(in_features, out_features, dtype=dtype, **kwargs) if linear is None else linear)
        where = dict(device=next(chain(self.linear.parameters(), self.linear.buffers())).device, dtype=dtype)
        self.adapter_bias = nn.Parameter(torch.zeros(out_features, **where))
        self.adapter_scale = nn.Parameter(torch.ones(out_features, **where))

    def forward(self, x: Tensor) -> Tensor:
        """`(.., in)` to `(.., out)`."""
        y = self.linear(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))

    def reset_parameters(self) -> None:
        """Makes the layer what it was."""
        nn.init.zeros_(self.adapter_bias)
        nn.init.ones_(self.adapter_scale)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same, up to rounding; it has a bias of its own."""
        linear = self.linear
        merged = nn.Linear(linear.in_features, linear.out_features, device="meta").train(self.training)
        bias = self.adapter_bias if linear.bias is None else self.adapter_bias + linear.bias
        merged.weight = nn.Parameter((self.adapter_scale[:, None].float() * linear.weight).to(linear.weight.dtype))
        merged.bias = nn.Parameter((self.adapter_scale.float() * bias).to(linear.weight.dtype))
        return merged


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
