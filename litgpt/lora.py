"""LoRA: low-rank updates of frozen linear layers (arXiv 2106.09685), in any module tree.

`add_lora(model, settings)` wraps the layers that the settings name; `GPT`, `Block` and the other published classes are
those of `model.py` with that done. rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353) are switches of the layers.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import litgpt.model
from litgpt.config import Config as BaseConfig
from litgpt.model import compute_dtype
from litgpt.surgery import (
    WrappedLinear,
    describe_linears,
    find_linears,
    freeze,
    is_match,
    keep,
    linear_names,
    swap_linears,
)  # fmt: skip

_PARTS = {
    "query": ("attn.qkv", "attn.q_proj", "attn.q_a_proj", "attn.q_b_proj"),
    "key": ("attn.qkv", "attn.kv_a_proj_with_mqa", "attn.kv_b_proj"),
    "value": ("attn.qkv", "attn.kv_a_proj_with_mqa", "attn.kv_b_proj"),
    "projection": ("attn.proj",),
    "mlp": ("mlp.*",),
    "head": ("lm_head",),
}
"""Switch -> the layers of a GPT that it means; the keys and values of latent attention come from the same layers."""


@dataclass
class LoRASettings:
    """Which layers get LoRA, and how."""

    r: int = 8
    """Rank of the updates."""
    alpha: float = 16
    """The updates are scaled by alpha / r (with rsLoRA by alpha / sqrt(r))."""
    dropout: float = 0.05
    """Probability of dropping an input of an update in training."""
    targets: str | list[str] | None = None
    """Layers by name, glob or regular expression, in any model; replaces the switches below."""
    query: bool = True
    """Update the query projections."""
    key: bool = False
    """Update the key projections."""
    value: bool = True
    """Update the value projections."""
    projection: bool = False
    """Update the output projections of the attention."""
    mlp: bool = False
    """Update the MLPs, with all experts and their router."""
    head: bool = False
    """Update the output head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps large ranks learning."""
    use_dora: bool = False
    """Learn the length of each row of the weights apart from its direction."""

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA needs r >= 1 and 0 <= dropout < 1, not r {self.r} and dropout {self.dropout}")

    @classmethod
    def from_flags(cls, values: Mapping[str, Any] | object) -> "LoRASettings":
        """Settings from the `lora_*` entries of a mapping, such as hyperparameters.yaml, or attributes of a config."""
        values = values if isinstance(values, Mapping) else vars(values)
        known = {"use_rslora": "lora_rslora", "use_dora": "lora_dora"}
        found = {f.name: values.get(known.get(f.name, f"lora_{f.name}")) for f in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})


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
        self.parts: tuple[tuple[int, int], ...] = ((0, out_features),)  # rows that have an update of their own
        self.use_rslora, self.use_dora = use_rslora, use_dora
        self._add_parameters()

    def _add_parameters(self) -> None:
        if self.r < 1 or not self.parts:
            return
        weight, rows = self.linear.weight, sum(stop - start for start, stop in self.parts)
        is_plain = weight.is_floating_point() and not hasattr(weight, "quant_state")
        where = {"device": weight.device, "dtype": weight.dtype if is_plain else torch.get_default_dtype()}
        self.lora_A = nn.Parameter(torch.empty(self.r * len(self.parts), self.linear.in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(rows, self.r, **where))
        if self.use_dora:
            self.lora_magnitude = nn.Parameter(torch.empty(rows, **where))
        self.scaling = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws A anew, sets B to zero and the lengths of DoRA to those of the weight."""
        if hasattr(self, "lora_A"):
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            nn.init.zeros_(self.lora_B)
        if hasattr(self, "lora_magnitude") and not self.lora_magnitude.is_meta:
            with torch.no_grad():
                self.lora_magnitude.copy_(self._rows(row_norms(plain_weight(self.linear))))

    def _rows(self, values: Tensor) -> Tensor:
        """Of one value a row of the weight those of the parts."""
        return torch.cat([values[start:stop] for start, stop in self.parts])

    def get_lora_AB(self) -> Tensor:
        """The update as a matrix `(out, in)`, scaled."""
        update = self.lora_A.new_zeros(self.linear.out_features, self.linear.in_features)
        for rows, a, b in self._factors():
            update[rows] = b @ a * self.scaling
        return update

    def _factors(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        sizes = [stop - start for start, stop in self.parts]
        for (start, stop), a, b in zip(self.parts, self.lora_A.split(self.r), self.lora_B.split(sizes)):
            yield slice(start, stop), a, b

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into the weight, also into one of 4 bits, which is quantised again."""
        if not hasattr(self, "lora_A") or self.merged:
            return
        weight = plain_weight(self.linear)
        merged = weight.float() + self.get_lora_AB().float()
        if self.use_dora:
            for (start, stop), m in zip(self.parts, self.lora_magnitude.float().split([b - a for a, b in self.parts])):
                rows = merged[start:stop]
                rows.mul_((m / row_norms(rows)).unsqueeze(1))
        set_plain_weight(self.linear, merged.to(weight.dtype))
        self.merged = True

    def forward(self, x: Tensor) -> Tensor:
        """`(.., in)` to `(.., out)`."""
        if self.merged or not self.is_enabled or not hasattr(self, "lora_A"):
            return self.linear(x)
        shape, x = x.shape, x.to(compute_dtype(x)).reshape(-1, x.size(-1))  # (N, in); one cast for both products
        y = self._forward_dora(x) if self.use_dora else self._add_update(self.linear(x), self.lora_dropout(x))
        return y.view(*shape[:-1], -1)

    def _add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds the update for `x` `(N, in)` to `y` `(N, out)`, in place where autograd allows it."""
        if torch.compiler.is_compiling() or y._is_view():
            end, columns, h = 0, [], F.linear(x, self.lora_A.to(x.dtype)) * self.scaling
            for (rows, _, b), h_part in zip(self._factors(), h.split(self.r, dim=1)):
                columns += [y[:, end : rows.start], y[:, rows] + F.linear(h_part, b.to(x.dtype))]
                end = rows.stop
            return torch.cat([*columns, y[:, end:]], dim=1)
        return AddUpdate.apply(y, x, self.lora_A, self.lora_B, self.scaling, self.parts)

    def _forward_dora(self, x: Tensor) -> Tensor:
        weight, bias, dropped = plain_weight(self.linear).to(x.dtype), self.linear.bias, self.lora_dropout(x)
        factor = self._dora_factor(weight).to(x.dtype)  # (out,)
        y = self._add_update(F.linear(dropped, weight), dropped) * factor  # (N, out)
        if dropped is not x:  # the frozen part sees the whole input
            y = y + F.linear(x, weight) - F.linear(dropped, weight)
        return y if bias is None else y + bias.to(y.dtype)

    def _dora_factor(self, weight: Tensor) -> Tensor:
        """Learned length of each row over the length it has now, which is taken for constant; 1 in other rows."""
        with torch.no_grad():
            norms = row_norms(weight.float() + self.get_lora_AB().float())
        factor = torch.ones_like(norms)
        index = torch.cat([torch.arange(start, stop, device=norms.device) for start, stop in self.parts])
        return factor.index_copy(0, index, self.lora_magnitude.float() / norms[index])

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        weight = state_dict.get(f"{prefix}weight", state_dict.get(f"{prefix}linear.weight"))
        is_new = weight is not None and f"{prefix}lora_magnitude" not in state_dict
        if hasattr(self, "lora_magnitude") and is_new and (self.lora_B.is_meta or not self.lora_B.any()):
            lengths = self._rows(row_norms(weight.to(self.lora_magnitude.dtype)))
            state_dict[f"{prefix}lora_magnitude"] = lengths
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

    def _add_parameters(self) -> None:
        ends = [sum(self.qkv_shapes[: i + 1]) for i in range(3)]
        parts = [(end - n, end) for end, n in zip(ends, self.qkv_shapes)]
        self.parts = tuple(part for part, is_on in zip(parts, self.enable_lora) if is_on)
        super()._add_parameters()

    @property
    def lora_ind(self) -> Tensor:
        """The rows of the weight that have an update."""
        return torch.cat([torch.arange(start, stop, device=self.lora_A.device) for start, stop in self.parts])

    def zero_pad(self, x: Tensor) -> Tensor:
        """Spreads `(.., rows with an update)` over all rows, `(.., out)`, with zeros between."""
        return x.new_zeros(*x.shape[:-1], self.linear.out_features).index_copy(-1, self.lora_ind, x)

    def conv1d(self, input: Tensor, weight: Tensor) -> Tensor:
        """Multiplies each part of `input` `(B, r * parts, T)` by its rows of `weight` `(rows, r, 1)`."""
        inputs, weights = input.split(self.r, dim=1), weight.split([stop - start for start, stop in self.parts])
        return torch.cat([F.conv1d(x, w) for x, w in zip(inputs, weights)], dim=1)


class AddUpdate(torch.autograd.Function):
    """Adds `scaling * x A^T B^T` to `y` in place, part by part; nothing as wide as `y` is made or kept."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, parts: tuple[tuple[int, int], ...]
    ) -> Tensor:
        """`y` `(N, out)`, `x` `(N, in)`, `A` `(r * parts, in)`, `B` `(rows, r)`."""
        h = x @ A.to(x.dtype).t()  # (N, r * parts)
        ctx.scaling, ctx.parts = scaling, parts
        ctx.save_for_backward(x, h, A, B)
        ctx.mark_dirty(y)
        sizes = [stop - start for start, stop in parts]
        for (start, stop), h_part, b in zip(parts, h.split(B.size(1), dim=1), B.to(x.dtype).split(sizes)):
            y[:, start:stop] += (h_part @ b.t()) * scaling
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B = ctx.saved_tensors
        a, sizes = A.to(x.dtype), [stop - start for start, stop in ctx.parts]
        grad_h, grad_B = torch.empty_like(h), torch.empty_like(B)
        columns = zip(ctx.parts, h.split(B.size(1), dim=1), grad_h.split(B.size(1), dim=1))
        rows = zip(B.to(x.dtype).split(sizes), grad_B.split(sizes))
        for ((start, stop), h_part, grad_part), (b, grad_b) in zip(columns, rows):
            g = grad[:, start:stop]
            grad_part.copy_((g @ b) * ctx.scaling)
            grad_b.copy_((g.t() @ h_part) * ctx.scaling)
        grad_x = grad_h @ a if ctx.needs_input_grad[1] else None
        return grad, grad_x, (grad_h.t() @ x).to(A.dtype), grad_B, None, None


def row_norms(weight: Tensor) -> Tensor:
    """Length of each row, in float32."""
    return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)


def plain_weight(linear: nn.Module) -> Tensor:
    """The weight `(out, in)` as numbers, also of a layer that bitsandbytes keeps in 4 bits."""
    weight = linear.weight
    if getattr(weight, "quant_state", None) is None:
        return weight
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def set_plain_weight(linear: nn.Module, weight: Tensor) -> None:
    """Gives the layer a new weight; a layer of 4 bits quantises it again. One that was shared is shared no more."""
    old = linear.weight
    if getattr(old, "quant_state", None) is None:
        linear.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        return
    import bitsandbytes as bnb

    options = {"quant_type": old.quant_type, "compress_statistics": old.compress_statistics, "blocksize": old.blocksize}
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(weight.device)


def add_lora(model: nn.Module, settings: LoRASettings) -> nn.Module:
    """Wraps the layers that the settings name; returns the model, which computes what it did before.

    Weights should be in the model already: DoRA starts from their lengths.

    Raises:
        ValueError: A target or a switch that is on means no layer of this model.
    """
    return _add(model, settings)


def _add(model: nn.Module, settings: LoRASettings, prefix: str = "", is_strict: bool = True) -> nn.Module:
    switches = [name for name in _PARTS if getattr(settings, name)]
    if settings.targets is not None:
        names = find_linears(model, settings.targets)
    else:
        there = linear_names(model)
        found = {s: [n for n in there if any(is_match(prefix + n, t) for t in _PARTS[s])] for s in switches}
        if missed := [f"lora_{switch}" for switch, matches in found.items() if is_strict and not matches]:
            raise ValueError(
                f"{type(model).__name__} has no layers that {', '.join(missed)} stands for; switch that off, or name "
                f"layers as targets (--lora_targets): {describe_linears(model)}"
            )
        names = [name for name in there if any(name in matches for matches in found.values())]

    def build(name: str, linear: nn.Module) -> nn.Module:
        config = getattr(model.get_submodule(name.rpartition(".")[0]), "config", None)
        how = {"lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "linear": linear}
        how |= {"r": settings.r, "use_rslora": settings.use_rslora, "use_dora": settings.use_dora}
        size = linear.in_features, linear.out_features
        if settings.targets is None and is_match(prefix + name, "attn.qkv") and isinstance(config, BaseConfig):
            heads = config.head_size, config.n_head, config.n_query_groups
            if (heads[1] + 2 * heads[2]) * heads[0] == size[1]:
                enable = settings.query, settings.key, settings.value
                return LoRAQKVLinear(*size, *heads, enable_lora=enable, **how)
        return LoRALinear(*size, **how)

    if names:
        swap_linears(model, [*names], build)
    return model


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to an update."""
    return name.rpartition(".")[2].startswith("lora_")


def lora_filter(key: str, value: Any) -> bool:
    """Whether an entry of a state dict belongs into a LoRA file."""
    return is_lora(key)


def lora_layers(model: nn.Module) -> Iterator[LoRALinear]:
    """The layers with an update."""
    return (module for module in model.modules() if isinstance(module, LoRALinear) and hasattr(module, "lora_A"))


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Trains the updates alone, or with them all biases ("all") or those of the layers they belong to ("lora_only")."""
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias {bias!r} is not known: choose none, all or lora_only")
    freeze(model)
    keep(model, lambda name: is_lora(name) or (bias == "all" and name.rpartition(".")[2] == "bias"))
    for layer in lora_layers(model) if bias == "lora_only" else ():
        keep(layer.linear, lambda name: name == "bias")


def merge_lora_weights(model: nn.Module) -> None:
    """Folds all updates into the weights; the layers stay wrapped (`surgery.unwrap` takes the wrapping off)."""
    for layer in lora_layers(model):
        layer.merge()
    config = getattr(model, "config", None)
    if getattr(config, "tie_embeddings", False) and isinstance(model.lm_head, LoRALinear):
        config.tie_embeddings = False  # the head is another matrix than the embedding now


def lora_plus_groups(model: nn.Module, lr: float, ratio: float) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ (arXiv 2402.12354): B learns `ratio` times as fast as all else that is trained."""
    groups: dict[bool, list[Tensor]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.endswith("lora_B")].append(parameter)
    return [{"params": found, "lr": lr * (ratio if is_b else 1)} for is_b, found in groups.items() if found]


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before the updates, for as long as the block runs."""
    was = {layer: layer.is_enabled for layer in lora_layers(model)}
    try:
        for layer in was:
            layer.is_enabled = False
        yield model
    finally:
        for layer, is_enabled in was.items():
            layer.is_enabled = is_enabled


# ---------------------------------------------------------------- published in 0.5


@dataclass
class Config(BaseConfig):
    """The config of a model that is built with LoRA."""

    lora_r: int = 0
    lora_alpha: int = 1
    lora_dropout: float = 0.0
    lora_query: bool = False
    lora_key: bool = False
    lora_value: bool = False
    lora_projection: bool = False
    lora_mlp: bool = False
    lora_head: bool = False


class _WithLoRA(nn.Module):
    """Adds LoRA, as the config says, to the class that stands beside this one among the bases."""

    lora_prefix = ""

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.lora_r > 0:
            _add(self, LoRASettings.from_flags(config), self.lora_prefix, is_strict=False)


class CausalSelfAttention(_WithLoRA, litgpt.model.CausalSelfAttention):
    """`model.CausalSelfAttention` with LoRA."""

    lora_prefix = "attn."


class GptNeoxMLP(_WithLoRA, litgpt.model.GptNeoxMLP):
    """`model.GptNeoxMLP` with LoRA."""

    lora_prefix = "mlp."


class LLaMAMLP(_WithLoRA, litgpt.model.LLaMAMLP):
    """`model.LLaMAMLP` with LoRA."""

    lora_prefix = "mlp."


class GemmaMLP(LLaMAMLP, litgpt.model.GemmaMLP):
    """`model.GemmaMLP` with LoRA."""

    act = litgpt.model.GemmaMLP.act


class LLaMAMoE(_WithLoRA, litgpt.model.LLaMAMoE):
    """`model.LLaMAMoE` with LoRA in router, experts and shared experts."""

    lora_prefix = "mlp."


class Block(_WithLoRA, litgpt.model.Block):
    """`model.Block` with LoRA in all its parts."""


class GPT(_WithLoRA, litgpt.model.GPT):
    """`model.GPT` with LoRA; loads plain checkpoints and those of 0.5, where each layer is called `.linear`."""

    block_class = Block

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> "GPT":
        """Builds the model of a named config; `kwargs` override its fields and those of LoRA."""
        return cls(Config.from_name(name, **kwargs))

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; layers may be called by their plain names or as `.linear`."""
        plain = {name.replace(".linear.", "."): value for name, value in state_dict.items()}
        return super().load_state_dict(plain, strict=strict, assign=assign)


def create_lora_linear(
    config: Config, in_size: int, out_size: int, bias: float | bool | None = None, use_r: bool | None = None
) -> LoRALinear:
    """A new layer with LoRA, if `use_r` (default: `config.lora_mlp`) says so; `bias` defaults to `config.bias`."""
    r = config.lora_r if (config.lora_mlp if use_r is None else use_r) else 0
    bias = config.bias if bias is None else bias
    return LoRALinear(in_size, out_size, r, config.lora_alpha, config.lora_dropout, bias=bool(bias))
