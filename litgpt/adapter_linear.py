"""The linear layer of LLaMA-Adapter v2 (arXiv 2304.15010), around a layer of any kind."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from litgpt.surgery import WrappedLinear


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
