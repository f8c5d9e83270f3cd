"""Linear layers with a low-rank update beside their frozen weight: the layers of LoRA (arXiv 2106.09685).

rsLoRA (arXiv 2312.03732) is another scale of the update; DoRA (arXiv 2402.09353) learns the length of each row of the
weight apart from its direction. `lora.py` puts these layers into models.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.model import compute_dtype
from litgpt.surgery import WrappedLinear

Parts = tuple[tuple[int, int], ...]
"""First row and end of each part of a weight that has an update of its own."""


class LoRALayer(WrappedLinear):
    """Rank, scale and dropout of an update."""

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float) -> None:
        super().__init__()
        self.r, self.lora_alpha, self.merged, self.is_enabled = r, lora_alpha, False, True
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()


class LoRALinear(LoRALayer):
    """`W x + b + scaling B A x`: A starts random and B at zero, so that the layer starts as it was."""

    def __init__(
        self, in_features: int, out_features: int, r: int = 0, lora_alpha: float = 1, lora_dropout: float = 0.0, *,
        linear: nn.Module | None = None, use_rslora: bool = False, use_dora: bool = False, **kwargs: Any
    ) -> None:  # fmt: skip
        """`linear` is the layer to wrap; without it a new one is made, for which `kwargs` are."""
        super().__init__(r, lora_alpha, lora_dropout)
        self.linear = nn.Linear(in_features, out_features, **kwargs) if linear is None else linear
        self.parts: Parts = self._find_parts()
        self.use_rslora, self.use_dora = use_rslora, use_dora
        if r < 1 or not self.parts:
            return
        weight = self.linear.weight
        plain = weight.is_floating_point() and getattr(weight, "quant_state", None) is None
        where = {"device": weight.device, "dtype": weight.dtype if plain else torch.get_default_dtype()}
        self.lora_A = nn.Parameter(torch.empty(r * len(self.parts), in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(sum(self.part_sizes), r, **where))
        if use_dora:
            self.lora_magnitude = nn.Parameter(torch.empty(sum(self.part_sizes), **where))
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.reset_parameters()

    def _find_parts(self) -> Parts:
        return ((0, self.linear.out_features),)

    @property
    def part_sizes(self) -> list[int]:
        """Rows of each part."""
        return [stop - start for start, stop in self.parts]

    def reset_parameters(self) -> None:
        """Draws A anew, sets B to zero and the lengths of DoRA to those of the weight's rows."""
        if not hasattr(self, "lora_A"):
            return
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.use_dora and not self.lora_magnitude.is_meta:
            with torch.no_grad():
                self.lora_magnitude.copy_(self.of_parts(row_norms(plain_weight(self.linear))))

    def of_parts(self, values: Tensor) -> Tensor:
        """Those of the parts, of something that has one row for each row of the weight."""
        return torch.cat([values[start:stop] for start, stop in self.parts])

    def factors(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, A `(r, in)` and B `(rows, r)` of each part."""
        for (start, stop), a, b in zip(self.parts, self.lora_A.split(self.r), self.lora_B.split(self.part_sizes)):
            yield slice(start, stop), a, b

    def get_lora_AB(self) -> Tensor:
        """The update as a matrix `(out, in)`, scaled."""
        update = self.lora_A.new_zeros(self.linear.out_features, self.linear.in_features)
        for rows, a, b in self.factors():
            update[rows] = b @ a * self.scaling
        return update

    @property
    def weight(self) -> Tensor:
        """The weight `(out, in)` that the layer computes with, for code that reads it instead of calling the layer."""
        weight = plain_weight(self.linear)
        if not self._is_active():
            return weight
        whole = weight.float() + self.get_lora_AB().float()
        if self.use_dora:
            whole = whole * self._dora_factor(weight).unsqueeze(1)
        return whole.to(weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into the weight, also into one of 4 bits, which is quantised again."""
        if hasattr(self, "lora_A") and not self.merged:
            set_plain_weight(self.linear, self.weight)
            self.merged = True

    def _is_active(self) -> bool:
        return self.is_enabled and not self.merged and hasattr(self, "lora_A")

    def forward(self, x: Tensor) -> Tensor:
        """`(.., in)` to `(.., out)`."""
        if not self._is_active():
            return self.linear(x)
        shape, x = x.shape, x.to(compute_dtype(x)).reshape(-1, x.size(-1))  # (N, in); one cast for both products
        y = self._forward_dora(x) if self.use_dora else self._add_update(self.linear(x), self.lora_dropout(x))
        return y.view(*shape[:-1], y.size(-1))

    def _add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds the update for `x` `(N, in)` to `y` `(N, out)`, in place where autograd allows it."""
        if not (torch.compiler.is_compiling() or y._is_view()):
            return AddUpdate.apply(y, x, self.lora_A, self.lora_B, self.scaling, self.parts)
        end, columns, h = 0, [], F.linear(x, self.lora_A.to(x.dtype)) * self.scaling
        for (rows, _, b), h_part in zip(self.factors(), h.split(self.r, dim=1)):
            columns += [y[:, end : rows.start], y[:, rows] + F.linear(h_part, b.to(x.dtype))]
            end = rows.stop
        return torch.cat([*columns, y[:, end:]], dim=1)

    def _forward_dora(self, x: Tensor) -> Tensor:
        weight, bias, dropped = plain_weight(self.linear).to(x.dtype), self.linear.bias, self.lora_dropout(x)
        factor = self._dora_factor(weight).to(x.dtype)  # (out,)
        y = self._add_update(F.linear(dropped, weight), dropped) * factor  # (N, out)
        if dropped is not x:  # the frozen part sees the whole input
            y = y + F.linear(x - dropped, weight)
        return y if bias is None else y + bias.to(y.dtype)

    def _dora_factor(self, weight: Tensor) -> Tensor:
        """`(out,)`: the learned length of a row over the one it has now, taken for constant; 1 outside of the parts.
        |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b, so that no matrix as large as the weight is made."""
        factor = torch.ones(len(weight), device=weight.device)
        for (rows, a, b), length in zip(self.factors(), self.lora_magnitude.split(self.part_sizes)):
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                w, a, b = weight[rows], a.float(), b.float() * self.scaling
                cross = (w @ a.to(w.dtype).t()).float()  # (rows, r)
                squares = row_norms(w).square() + ((2 * cross + b @ (a @ a.t())) * b).sum(dim=1)
            part = length.float() / squares.sqrt()
            factor = torch.cat((factor[: rows.start], part, factor[rows.stop :]))
        return factor

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        weight = state_dict.get(f"{prefix}weight", state_dict.get(f"{prefix}linear.weight"))
        is_plain = weight is not None and weight.shape == self.linear.weight.shape
        if hasattr(self, "lora_magnitude") and is_plain and (self.lora_B.is_meta or not self.lora_B.any()):
            lengths = self.of_parts(row_norms(weight)).to(self.lora_magnitude.dtype)
            state_dict.setdefault(f"{prefix}lora_magnitude", lengths)  # those of other weights until now
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LoRAQKVLinear(LoRALinear):
    """The fused projection, whose queries, keys and values each have an update of their own, or none."""

    def __init__(
        self, in_features: int, out_features: int, head_size: int, n_head: int, n_query_groups: int, r: int = 0,
        lora_alpha: float = 1, lora_dropout: float = 0.0, enable_lora: bool | tuple[bool, bool, bool] = False,
        **kwargs: Any
    ) -> None:  # fmt: skip
        self.enable_lora = (enable_lora,) * 3 if isinstance(enable_lora, bool) else tuple(enable_lora)
        self.qkv_shapes = [n * head_size for n in (n_head, n_query_groups, n_query_groups)]
        super().__init__(in_features, out_features, r, lora_alpha, lora_dropout, **kwargs)

    def _find_parts(self) -> Parts:
        return qkv_parts(self.qkv_shapes, self.enable_lora)

    @property
    def lora_ind(self) -> Tensor:
        """The rows of the weight that have an update."""
        return torch.cat([torch.arange(start, stop, device=self.lora_A.device) for start, stop in self.parts])

    def zero_pad(self, x: Tensor) -> Tensor:
        """Spreads `(.., rows with an update)` over all rows, `(.., out)`, with zeros between."""
        return x.new_zeros(*x.shape[:-1], self.linear.out_features).index_copy(-1, self.lora_ind, x)

    def conv1d(self, input: Tensor, weight: Tensor) -> Tensor:
        """Multiplies each part of `input` `(B, r * parts, T)` by its rows of `weight` `(rows, r, 1)`."""
        inputs, weights = input.split(self.r, dim=1), weight.split(self.part_sizes)
        return torch.cat([F.conv1d(x, w) for x, w in zip(inputs, weights)], dim=1)


class AddUpdate(torch.autograd.Function):
    """Adds `scaling * x A^T B^T` to `y` in place, part by part; the backward pass keeps nothing as wide as `y`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, parts: Parts) -> Tensor:
        """`y` `(N, out)`, `x` `(N, in)`, `A` `(r * parts, in)`, `B` `(rows, r)`."""
        h = x @ A.to(x.dtype).t()  # (N, r * parts)
        ctx.scaling, ctx.parts = scaling, parts
        ctx.save_for_backward(x, h, A, B)
        ctx.mark_dirty(y)
        b = (B * scaling).to(x.dtype).split([stop - start for start, stop in parts])
        for (start, stop), h_part, b_part in zip(parts, h.split(B.size(1), dim=1), b):
            y[:, start:stop].addmm_(h_part, b_part.t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B = ctx.saved_tensors
        r, sizes = B.size(1), [stop - start for start, stop in ctx.parts]
        grads = [grad[:, start:stop] for start, stop in ctx.parts]
        b = (B * ctx.scaling).to(x.dtype).split(sizes)
        grad_h = torch.cat([g @ b_part for g, b_part in zip(grads, b)], dim=1)  # (N, r * parts)
        grad_b = torch.cat([(h_part.t() @ g).t() for g, h_part in zip(grads, h.split(r, dim=1))])  # (rows, r)
        grad_x = grad_h @ A.to(x.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, (grad_h.t() @ x).to(A.dtype), grad_b.to(B.dtype) * ctx.scaling, None, None


def qkv_parts(sizes: list[int], enabled: tuple[bool, ...]) -> Parts:
    """The parts of a fused projection that are enabled; `sizes` are the rows of queries, keys and values."""
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    return tuple((end - size, end) for size, end, is_on in zip(sizes, ends, enabled) if is_on)


def row_norms(weight: Tensor) -> Tensor:
    """Length of each row, in float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def plain_weight(linear: nn.Module) -> Tensor:
    """The weight `(out, in)` as numbers, also of a layer that bitsandbytes keeps in 4 bits."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(linear.weight.data, state)


def set_plain_weight(linear: nn.Module, weight: Tensor) -> None:
    """Gives the layer a new weight; one of 4 bits is quantised again, one that was shared is shared no more."""
    old = linear.weight
    if getattr(old, "quant_state", None) is None:
        linear.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        return
    import bitsandbytes as bnb

    options = {"quant_type": old.quant_type, "compress_statistics": old.compress_statistics, "blocksize": old.blocksize}
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(weight.device)
