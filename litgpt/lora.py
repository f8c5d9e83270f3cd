"""LoRA: low-rank updates of frozen linear layers (arXiv 2106.09685), in any module tree.

`add_lora(model, settings)` wraps the layers that the settings name; `GPT`, `Block` and the other published classes are
those of `model.py` with that done. rsLoRA (arXiv 2312.03732) and DoRA (arXiv 2402.09353) are switches of the layers.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

import litgpt.model
from litgpt.config import Config as BaseConfig
from litgpt.low_rank import LoRALayer, LoRALinear, LoRAQKVLinear  # noqa: F401  (published here)
from litgpt.surgery import (
    describe_linears,
    find_linears,
    freeze,
    is_match,
    keep,
    linear_names,
    replace_layers,
)  # fmt: skip

_LAYERS = {
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

    @property
    def scaling(self) -> float:
        """Factor on the updates."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def from_flags(cls, values: Mapping[str, Any] | object) -> "LoRASettings":
        """Settings from the `lora_*` entries of a mapping, such as hyperparameters.yaml, or attributes of a config."""
        values = values if isinstance(values, Mapping) else vars(values)
        known = {"use_rslora": "lora_rslora", "use_dora": "lora_dora"}
        found = {f.name: values.get(known.get(f.name, f"lora_{f.name}")) for f in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})


def add_lora(model: nn.Module, settings: LoRASettings) -> nn.Module:
    """Wraps the layers that the settings name; returns the model, which computes what it did before.

    Weights should be in the model already: DoRA starts from their lengths.

    Raises:
        ValueError: A target, or a switch that is on, means no layer of this model.
    """
    found = _find_layers(model, settings)
    if missed := [switch for switch, names in found.items() if not names]:
        raise ValueError(
            f"{type(model).__name__} has no layers for {', '.join(missed)}; switch that off, or name layers as targets "
            f"(--lora_targets): {describe_linears(model)}"
        )
    _wrap(model, settings, {name for names in found.values() for name in names})
    return model


def _find_layers(model: nn.Module, settings: LoRASettings, prefix: str = "") -> dict[str, list[str]]:
    """Paths of the layers for each switch that is on, or for the targets; `prefix` is where `model` itself stands."""
    if settings.targets is not None:
        return {"targets": find_linears(model, settings.targets)}
    there, on = linear_names(model), [switch for switch in _LAYERS if getattr(settings, switch)]
    return {f"lora_{switch}": [name for name in there if switch in switches_for(prefix + name)] for switch in on}


def switches_for(name: str) -> list[str]:
    """The switches of `LoRASettings` that mean the layer of a GPT called so."""
    return [switch for switch, layers in _LAYERS.items() if any(is_match(name, layer) for layer in layers)]


def _wrap(model: nn.Module, settings: LoRASettings, names: set[str], prefix: str = "") -> None:
    how = {"r": settings.r, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    how |= {"use_rslora": settings.use_rslora, "use_dora": settings.use_dora}

    def build(name: str, linear: nn.Module) -> nn.Module:
        config = getattr(model.get_submodule(name.rpartition(".")[0]), "config", None)
        size = linear.in_features, linear.out_features
        if settings.targets is None and is_match(prefix + name, "attn.qkv") and isinstance(config, BaseConfig):
            hs, nh, G = config.head_size, config.n_head, config.n_query_groups
            if size[1] == (nh + 2 * G) * hs:  # else a variant with a projection of its own
                enable = settings.query, settings.key, settings.value
                return LoRAQKVLinear(*size, hs, nh, G, enable_lora=enable, linear=linear, **how)
        return LoRALinear(*size, linear=linear, **how)

    replace_layers(model, [name for name in linear_names(model) if name in names], build)


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
            settings, prefix = LoRASettings.from_flags(config), self.lora_prefix
            found = _find_layers(self, settings, prefix)
            _wrap(self, settings, {name for names in found.values() for name in names}, prefix)


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
