"""Attention that looks at learned prompts besides the text (LLaMA-Adapter, arXiv 2303.16199).

Letters in shapes are those of `model.py`; P is the number of prompts of a layer.
"""

from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.model import CausalSelfAttention, compute_dtype


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
        cos = torch.ones(1, 1, self.config.rope_n_elem, dtype=compute_dtype(x), device=x.device)
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


def prompt_attention(attention: CausalSelfAttention, prompt_length: int, like: Tensor | None = None) -> None:
    """Gives an attention of any class prompts, in place; it becomes one of a subclass of its class."""
    kind = type(attention)
    if not issubclass(kind, PromptedAttention):
        attention.__class__ = prompted(kind)
        attention.is_reached = kind.forward is CausalSelfAttention.forward
    if not attention.has_prompts:
        attention.add_prompts(prompt_length, like)


@cache
def prompted(kind: type[CausalSelfAttention]) -> type[CausalSelfAttention]:
    """The attention class `kind` with `PromptedAttention` before it."""
    return type(f"Prompted{kind.__name__}", (PromptedAttention, kind), {"__module__": __name__})
