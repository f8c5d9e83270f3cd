"""`Config` describes a model; the table below it names the published ones.

This file needs nothing of ours: copied beside `model.py` into an empty folder it works with torch and pyyaml alone.
First comes logic: fields, how they resolve, where a config comes from. Then data: family defaults as subclasses of
`Config` (`LlamaConfig(n_layer=2, n_embd=64)` is a Llama) and one row a size.
"""

import difflib
import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml

try:
    from typing import Self
except ImportError:  # Python 3.10
    Self = TypeVar("Self")


@dataclass
class Config:
    """Everything that decides the shape and the maths of a model; what is left at `None` is resolved on creation."""

    model_type: ClassVar[str] = "gpt"
    """Name under which the model was registered; written into `model_config.yaml` when it is not "gpt"."""
    window_period: ClassVar[int | None] = None
    """Default of `sliding_window_indices` and `rope_indices`: every such layer is global, `None` = no layer is."""
    fills_intermediate_size: ClassVar[bool] = False
    """Whether a gated MLP without `intermediate_size` gets 8/3 of `n_embd` (family classes) or is an error."""

    name: str = ""
    """Name of the model; empty takes the one in `hf_config`."""
    hf_config: dict = field(default_factory=dict)
    """Where the weights live on the Hugging Face hub: `{org: ..., name: ...}`."""
    block_size: int = 4096
    """Longest context in tokens."""
    n_layer: int = 16
    """Number of transformer blocks."""
    n_embd: int = 4096
    """Width of the residual stream."""
    vocab_size: int = 50254
    """Number of token ids that the tokenizer can produce."""
    padding_multiple: int = 512
    """The vocabulary is padded to a multiple of this, for faster matrix products."""
    padded_vocab_size: int | None = None
    """Rows of the embedding and of the head; default: `vocab_size` rounded up to `padding_multiple`."""
    norm_class_name: str = "LayerNorm"
    """Normalisation: LayerNorm, RMSNorm, or a name given to `register_norm`."""
    norm_eps: float = 1e-5
    """Constant added to the variance in the normalisation."""
    norm_qk: bool = False
    """Normalise queries and keys before the rotary embedding."""
    norm_qk_type: Literal["default", "olmo2"] = "default"
    """Normalise each head by itself ("default") or the full width before it is split into heads ("olmo2")."""
    post_attention_norm: bool = False
    """Normalise the output of the attention before it is added to the residual stream."""
    post_mlp_norm: bool = False
    """Normalise the output of the MLP before it is added to the residual stream."""
    parallel_residual: bool = True
    """Attention and MLP read the same input and are added together, instead of one after the other."""
    shared_attention_norm: bool = False
    """One normalisation for attention and MLP; only with `parallel_residual`."""
    n_head: int = 32
    """Number of query heads."""
    head_size: int | None = None
    """Width of a head; default: n_embd / n_head."""
    n_query_groups: int | None = None
    """Number of key/value heads: `n_head` = multi-head (default), 1 = multi-query, between = grouped-query."""
    attn_bias: bool = False
    """Bias in the query, key and value projection even where `bias` is false."""
    attention_scores_scalar: float | None = None
    """Scores are divided by the square root of this; default: the head size."""
    sliding_window_size: int | None = None
    """A token attends to at most this many tokens, itself included; default: to all before it."""
    sliding_window_indices: list[int] | None = None
    """One number a layer: 1 = windowed, 0 = full attention; default: all windowed where a size is set."""
    attention_logit_softcapping: float | None = None
    """Scores are squeezed into +-this by tanh."""
    rope_base: int = 10000
    """Base of the rotary frequencies."""
    rotary_percentage: float = 0.25
    """Share of each head that is rotated."""
    rope_condense_ratio: int = 1
    """Positions are divided by this."""
    rope_adjustments: dict | None = None
    """Change of the rotary frequencies for long contexts; its keys decide the kind, see `rope_kind`."""
    rope_interleave: bool = False
    """Rotate neighbouring pairs instead of halves."""
    intermediate_size: int | None = None
    """Inner width of the MLP; default: 4 * n_embd; LLaMAMLP needs it."""
    moe_intermediate_size: int | None = None
    """Inner width of one expert; default: `intermediate_size`."""
    bias: bool = True
    """Bias in all linear layers of the blocks."""
    mlp_class_name: str = "GptNeoxMLP"
    """MLP: GptNeoxMLP, LLaMAMLP, GemmaMLP, LLaMAMoE, or a name given to `register_mlp`."""
    gelu_approximate: str = "none"
    """GELU by "tanh" or exact ("none")."""
    n_expert: int = 0
    """Number of experts of a mixture-of-experts layer."""
    n_shared_expert: int | None = None
    """Number of experts that see every token."""
    n_expert_groups: int | None = None
    """Number of groups of experts; setting it selects the grouped sigmoid router."""
    n_topk_groups: int | None = None
    """Number of groups that a token may choose experts from."""
    n_topk_scores_per_group: int | None = None
    """A group is scored by the sum of this many of its best experts."""
    n_expert_per_token: int = 0
    """Number of experts chosen for a token."""
    first_k_dense_replace: int | None = None
    """The first so many layers have a plain MLP instead of experts."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of the chosen experts (grouped router)."""
    norm_topk_prob: bool = False
    """Weights of the chosen experts sum to 1 (grouped router; the softmax router always does that)."""
    scale_embeddings: bool = False
    """Multiply embeddings by the square root of `n_embd`."""
    lm_head_bias: bool = False
    """Bias in the output head."""
    final_logit_softcapping: float | None = None
    """Logits are squeezed into +-this by tanh."""
    norm_1: bool = True
    """Normalise the input of the attention."""
    norm_2: bool = True
    """Normalise the input of the MLP."""
    latent_attention: dict | None = None
    """Multi-head latent attention: q_lora_rank, kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim."""
    rope_local_base_freq: float | None = None
    """Base of the rotary frequencies in the layers that `rope_indices` marks as local."""
    rope_indices: list[int] | None = None
    """One number a layer: 1 = local rotary base, 0 = `rope_base`; default: all local where a local base is set."""
    causal: bool = True
    """A token attends only to those before it; false = to all."""
    dropout: float = 0.0
    """Probability of dropping an activation in training (attention, MLP and embedding)."""
    tie_embeddings: bool = False
    """The output head shares its weight with the embedding."""
    norm_unit_offset: bool | None = None
    """RMSNorm weights are stored minus one; default: as in 0.5, whether the name says Gemma."""
    norm_affine: bool | None = None
    """Norms have a weight; default: as in 0.5, true but for a LayerNorm where the name says OLMo."""
    embedding_multiplier: float | None = None
    """Embeddings are multiplied by this."""
    residual_multiplier: float | None = None
    """Outputs of attention and MLP are multiplied by this before they are added to the residual stream."""
    logits_scaling: float | None = None
    """Logits are divided by this; a bias of the head is not."""
    nope_indices: list[int] | None = None
    """One number a layer: 1 = no rotary embedding in this layer; default: all layers have it."""
    router_scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    """How the grouped router turns logits into the weights of the experts."""

    def __post_init__(self) -> None:
        self.name = self.name or self.hf_config.get("name", "")
        # Files and calls written for 0.5.x say these two by the model's name. Saved files hold the outcome.
        if self.norm_unit_offset is None:
            self.norm_unit_offset = self.norm_class_name == "RMSNorm" and "Gemma" in self.name
        if self.norm_affine is None:
            self.norm_affine = not (self.norm_class_name == "LayerNorm" and "OLMo" in self.name)
        clash = {"LayerNorm": self.norm_unit_offset, "RMSNorm": not self.norm_affine}
        if clash.get(self.norm_class_name):
            raise ValueError("norm_unit_offset goes with RMSNorm, norm_affine: false with LayerNorm; not the other way")
        self._resolve_sizes()
        self._resolve_attention()
        self._resolve_rope()
        self._check_experts()

    def _resolve_sizes(self) -> None:
        sizes = (
            "block_size n_layer n_embd vocab_size padding_multiple padded_vocab_size n_head head_size n_query_groups"
        )
        for key in (*sizes.split(), "sliding_window_size", "intermediate_size", "moe_intermediate_size"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key} is {value}; it must be at least 1")
        for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_scores_scalar"):
            if (value := getattr(self, key)) is not None and not value > 0:
                raise ValueError(f"{key} is {value}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.padded_vocab_size is None:
            self.padded_vocab_size = find_multiple(self.vocab_size, self.padding_multiple)
        else:  # ids that have no row in the embedding cannot be used
            self.vocab_size = min(self.vocab_size, self.padded_vocab_size)
        if self.intermediate_size is None:
            if self.mlp_class_name == "LLaMAMLP" and not self.fills_intermediate_size:
                raise ValueError("mlp_class_name LLaMAMLP needs intermediate_size; 8/3 of n_embd is usual")
            self.intermediate_size = 4 * self.n_embd
            if self.mlp_class_name in ("LLaMAMLP", "LLaMAMoE") and self.fills_intermediate_size:
                self.intermediate_size = find_multiple(8 * self.n_embd // 3, 256 if self.n_embd >= 1024 else 32)

    def _resolve_attention(self) -> None:
        if self.head_size is None:
            if self.n_embd % self.n_head:
                raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}; or set head_size")
            self.head_size = self.n_embd // self.n_head
        if self.n_query_groups is None:
            self.n_query_groups = self.n_head
        if self.n_head % self.n_query_groups:
            raise ValueError(f"n_query_groups is {self.n_query_groups}; it must divide n_head {self.n_head}")
        if self.sliding_window_size is not None:
            self.sliding_window_indices = self._layer_flags("sliding_window_indices")
        if self.latent_attention is not None:
            _check_keys(self.latent_attention, "latent_attention", _LATENT_KEYS[1:], optional=_LATENT_KEYS[:1])
            if self.n_query_groups != self.n_head:
                raise ValueError(f"latent_attention needs n_query_groups {self.n_query_groups} = n_head {self.n_head}")
            for key in _LATENT_KEYS:
                setattr(self, key, self.latent_attention.get(key))
            self.qk_head_dim = self.qk_rope_head_dim + self.qk_nope_head_dim

    def _resolve_rope(self) -> None:
        if not 0 <= self.rotary_percentage <= 1:
            raise ValueError(f"rotary_percentage is {self.rotary_percentage}; it must be between 0 and 1")
        is_latent = self.latent_attention is not None
        self.rope_n_elem = self.qk_rope_head_dim if is_latent else int(self.rotary_percentage * self.head_size)
        if self.rope_local_base_freq is not None:
            self.rope_indices = self._layer_flags("rope_indices")
        if self.nope_indices is not None:
            self.nope_indices = check_indicator_and_length(self.nope_indices, "nope_indices", self.n_layer)
        if rope_kind(self.rope_adjustments) == "longrope":
            for key in ("short_factor", "long_factor"):
                n, pairs = len(self.rope_adjustments[key]), self.rope_n_elem // 2
                if n != pairs:
                    raise ValueError(f"rope_adjustments.{key} has {n} numbers; it needs one a rotated pair: {pairs}")

    def _layer_flags(self, key: str) -> list[int]:
        flags = getattr(self, key)
        if flags is None and self.window_period:
            flags = _local_layers(self.n_layer, self.window_period)
        return check_indicator_and_length(flags, key, self.n_layer)

    def _check_experts(self) -> None:
        name, per_token, groups = self.mlp_class_name, self.n_expert_per_token, self.n_expert_groups
        if self.first_k_dense_replace is not None and name in ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP"):
            raise ValueError(f"first_k_dense_replace needs a class with experts, such as LLaMAMoE, not {name}")
        if name == "LLaMAMoE" and not 1 <= per_token <= self.n_expert:
            raise ValueError(f"n_expert_per_token is {per_token}; it must be between 1 and n_expert {self.n_expert}")
        if groups is None:
            return
        if groups < 1 or self.n_expert % groups:
            raise ValueError(f"n_expert_groups is {groups}; it must divide n_expert {self.n_expert}")
        for key, limit in (("n_topk_groups", groups), ("n_topk_scores_per_group", self.n_expert // groups)):
            if (value := getattr(self, key)) is not None and not 1 <= value <= limit:
                of = f"{self.n_expert} experts in {groups} groups"
                raise ValueError(f"{key} is {value}; with {of} it must be between 1 and {limit}")

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> Self:
        """The config called `name` here or on the Hugging Face hub, or `org/name`; `kwargs` replace single fields."""
        row = _find_row(name)
        if row is None:
            hint = _or(nearest(name.rsplit("/", 1)[-1], name_to_config))
            raise ValueError(f"{name!r} is not a supported config name{hint} (`litgpt models` lists all)")
        config = cls(**cls._row_over_defaults(row) | cls._checked(kwargs, f"overrides of {name}"))
        if row["name"] in LONGROPE_CONTEXT and not {"block_size", "rope_adjustments"} & kwargs.keys():
            warnings.warn(
                f"{row['name']} by name alone has a context of {config.block_size:,} tokens instead of "
                f"{LONGROPE_CONTEXT[row['name']]:,}: LongRoPE factors come with its weights (in config.json), or as "
                "rope_adjustments together with block_size",
                stacklevel=2,
            )
        return config

    @classmethod
    def from_file(cls, path: str | Path, **kwargs: Any) -> Self:
        """The config in a YAML file such as `model_config.yaml`, single fields replaced by `kwargs`.

        Fields that the file lacks come from the table if its `name` is there, else from the defaults.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as ex:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(ex).split())}") from ex
        if not isinstance(values, dict) or not values:
            raise ValueError(f"{path} holds no model config; expected lines such as `n_layer: 12`")
        kind = values.pop("model_type", "gpt")
        if kind not in ("gpt", cls.model_type):
            raise ValueError(
                f"{path} holds a {kind!r} model, not {cls.model_type!r}; --extend the file that defines it"
            )
        values = cls._checked(values, str(path)) | cls._checked(kwargs, f"overrides of {path}")
        row = name_to_config.get(values.get("name"))
        return cls(**(cls._row_over_defaults(row) if row else {}) | values)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **kwargs: Any) -> Self:
        """The config of a checkpoint folder: its `model_config.yaml`, else the named config that it is called after."""
        path = Path(path)
        if (path / "model_config.yaml").is_file():
            return cls.from_file(path / "model_config.yaml", **kwargs)
        if path.name in name_to_config:
            return cls.from_name(path.name, **kwargs)
        raise FileNotFoundError(
            f"no model config for {str(path)!r}: it holds no model_config.yaml and is not called like a model that "
            "`litgpt models` lists"
        )

    @classmethod
    def _row_over_defaults(cls, row: dict[str, Any]) -> dict[str, Any]:
        """`row`, completed where `cls` is a family class: rows say what differs from `Config`, not from that family."""
        plain = {}
        for f in fields(Config):
            owner = next((c for c in cls.__mro__ if f.name in vars(c)), Config)
            if owner is not Config and owner.__module__ == Config.__module__:
                plain[f.name] = f.default
        return deepcopy(plain | row)

    @classmethod
    def _checked(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """`values` with numbers in the type of their field; unknown names and wrong types are errors."""
        known = {f.name: f.type for f in fields(cls) if f.init}
        for key in values:
            if key not in known:
                raise ValueError(f"{where}: unknown config field {key!r}{_or(nearest(str(key), known))}")
        return {key: _as_type(value, known[key], f"{where}: {key}") for key, value in values.items()}

    def update_from_run(self, run: Any) -> Self:
        """Hook: the config for this run; a model whose shape depends on run settings returns an adapted one."""
        return self

    @property
    def mlp_class(self) -> type:
        """The class registered under `mlp_class_name`."""
        return _MLPS.get(self.mlp_class_name)

    @property
    def norm_class(self) -> Callable[..., Any]:
        """Builds a norm as `norm_class(size, eps=...)`, with unit offset or without weights if the config says so."""
        norm = _NORMS.get(self.norm_class_name)
        options = {"add_unit_offset": True} if self.norm_unit_offset else {}
        options |= {} if self.norm_affine else {"elementwise_affine": False}
        return partial(norm, **options) if options else norm


def save_config(config: Config, checkpoint_dir: str | Path) -> None:
    """Write all fields of `config` to `model_config.yaml` in `checkpoint_dir`, which is made if it is not there."""
    values = asdict(config)
    if config.model_type != "gpt":
        values = {"model_type": config.model_type} | values
    path = Path(checkpoint_dir) / "model_config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def rope_kind(adjustments: dict[str, Any] | None) -> Literal["linear", "llama3", "yarn", "longrope"] | None:
    """Which change of the rotary frequencies `adjustments` describes, by its keys; partial and mixed sets are errors.

    All kinds have `factor`; llama3, yarn and longrope have `original_max_seq_len`, and each has keys of its own.
    """
    if adjustments is None:
        return None
    marked = {kind for kind, own in _ROPE_KEYS.items() if own & adjustments.keys()}
    if len(marked) > 1:
        mixed = ", ".join(sorted(adjustments))
        raise ValueError(f"rope_adjustments mixes the keys of {' and '.join(sorted(marked))}: {mixed}; keep one kind")
    kind = next(iter(marked), "linear")
    required = {"factor", *_ROPE_KEYS.get(kind, ())} | ({"original_max_seq_len"} if marked else set())
    _check_keys(adjustments, f"rope_adjustments ({kind})", required, _ROPE_OPTIONS.get(kind, set()))
    if adjustments["factor"] <= 0:
        raise ValueError(f"rope_adjustments.factor is {adjustments['factor']}; it must be above 0")
    return kind


_ROPE_KEYS = {
    "llama3": {"low_freq_factor", "high_freq_factor"},
    "yarn": {"beta_fast", "beta_slow"},
    "longrope": {"short_factor", "long_factor"},
}
_ROPE_OPTIONS = {"yarn": {"mscale", "mscale_all_dim", "truncate", "attention_factor"}, "longrope": {"attention_factor"}}
_SIZES = (
    "block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple", "padded_vocab_size", "n_head", "head_size",
    "n_query_groups", "sliding_window_size", "intermediate_size", "moe_intermediate_size",
)  # fmt: skip
_LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


def _check_keys(values: dict[str, Any], where: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    known = [*required, *optional]
    missing = [key for key in required if values.get(key) is None]
    extra = [f"{key!r}{_or(nearest(str(key), missing or known))}" for key in values if key not in known]
    faults = [f"lacks {', '.join(sorted(missing))}"] if missing else []
    faults += [f"has unknown {', '.join(extra)}"] if extra else []
    if faults:
        raise ValueError(f"{where} {' and '.join(faults)}; it takes {', '.join(sorted(known))}")


def check_indicator_and_length(
    params: list[int] | None, name: str, required_length: int, use_initial_part: bool = True, def_val: int = 1
) -> list[int]:
    """`params` as one 0 or 1 for each layer: `def_val` everywhere if it is `None`, cut if it is longer."""
    if params is None:
        return [def_val] * required_length
    if len(params) < required_length or (len(params) > required_length and not use_initial_part):
        raise ValueError(f"{name} has {len(params)} numbers; it needs one for each of the {required_length} layers")
    if bad := [value for value in params if value not in (0, 1)]:
        raise ValueError(f"{name} holds {bad[0]!r}; only 0 and 1 are allowed")
    return list(params[:required_length])


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of `k` that is not below `n`."""
    return -(-n // k) * k


def nearest(word: str, words: Iterable[str]) -> list[str]:
    """Up to three of `words` that look like `word`, best first, whatever their case; for error messages."""
    lower = {other.lower(): other for other in reversed([*words])}
    return [lower[match] for match in difflib.get_close_matches(word.lower(), lower, n=3, cutoff=0.5)]


def _or(words: list[str]) -> str:
    return f"; did you mean {' or '.join(words)}?" if words else ""


def _as_type(value: Any, kind: Any, where: str) -> Any:
    """`value` as the annotated type `kind`: for YAML, `1e-6` is text and `1e6` no integer, so numbers are converted."""
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(f"{where} is {value!r}; choose one of {', '.join(map(str, get_args(kind)))}")
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    kinds = {get_origin(k) or k: _YAML_NAMES.get(get_origin(k) or k) for k in members}
    if None in kinds.values() or type(value) in kinds:  # what YAML has no word for is left to the class
        return value
    for number in (k for k in (int, float) if k in kinds and type(value) is not bool):
        try:
            if number is float or float(value).is_integer():
                return number(float(value))
        except (TypeError, ValueError):
            break
    raise ValueError(f"{where} is {value!r}; it must be {' or '.join(kinds.values())}")


_YAML_NAMES = {
    bool: "true or false", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a map of keys",
    type(None): "null",
}  # fmt: skip


class _Registry:
    """Classes by name, so that a config file can say them."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self.classes: dict[str, type] = {}

    def add(self, cls: type | str | None, name: str | None) -> Any:
        if cls is None or isinstance(cls, str):  # used as `@register(...)`: the class comes in the second call
            return lambda decorated: self.add(decorated, name or cls)
        name = name or cls.__name__
        old = self.classes.setdefault(name, cls)
        if old is not cls and old.__module__ != cls.__module__:
            both = " and ".join(f"{c.__module__}.{c.__qualname__}" for c in (old, cls))
            raise ValueError(f"two {self.noun} classes claim the name {name!r}: {both}; rename one")
        self.classes[name] = cls
        return cls

    def get(self, name: str) -> type:
        if name not in self.classes:
            known = ", ".join(sorted(self.classes)) or "none yet: import the module with the model first"
            raise ValueError(f"{self.noun}_class_name is {name!r}; registered are {known}")
        return self.classes[name]


_MLPS, _NORMS = _Registry("mlp"), _Registry("norm")


def register_mlp(cls: Any = None, name: str | None = None) -> Any:
    """Class decorator: makes an MLP, built as `cls(config)`, known to `mlp_class_name` by its class name or by `name`.

    As `@register_mlp`, `@register_mlp("name")` or `register_mlp(cls, name)`. A module may replace only its own class.
    """
    return _MLPS.add(cls, name)


def register_norm(cls: Any = None, name: str | None = None) -> Any:
    """As `register_mlp`, for norms: built as `cls(size, eps=...)`, plus what `Config.norm_class` adds."""
    return _NORMS.add(cls, name)


# ---------------------------------------------------------------------------------------------------------------------
# Families: what their models have in common


@dataclass
class LlamaConfig(Config):
    """Llama, and what is built like it: RMSNorm, gated SiLU MLP, rotary embedding of the whole head, no biases."""

    fills_intermediate_size: ClassVar[bool] = True

    norm_class_name: str = "RMSNorm"
    parallel_residual: bool = False
    rotary_percentage: float = 1.0
    bias: bool = False
    mlp_class_name: str = "LLaMAMLP"


@dataclass
class MistralConfig(LlamaConfig):
    """Mistral from version 0.2 on; version 0.1 has a sliding window of 4,096 and a rotary base of 10,000."""

    block_size: int = 32768
    rope_base: int = 1000000


@dataclass
class MixtralConfig(MistralConfig):
    """Mistral with eight experts, two for each token."""

    mlp_class_name: str = "LLaMAMoE"
    n_expert: int = 8
    n_expert_per_token: int = 2


@dataclass
class PhiConfig(Config):
    """Phi-1.5 and Phi-2; the later ones are built like Llama."""

    block_size: int = 2048
    shared_attention_norm: bool = True
    rotary_percentage: float = 0.5
    gelu_approximate: str = "tanh"
    lm_head_bias: bool = True


@dataclass
class GemmaConfig(LlamaConfig):
    """Gemma 1: tanh-GELU gate, scaled and tied embeddings, RMSNorm weights stored minus one."""

    norm_eps: float = 1e-6
    mlp_class_name: str = "GemmaMLP"
    gelu_approximate: str = "tanh"
    scale_embeddings: bool = True
    tie_embeddings: bool = True
    norm_unit_offset: bool | None = True


@dataclass
class Gemma2Config(GemmaConfig):
    """Gemma 2: norms around both parts of a block, every second layer windowed, scores and logits soft-capped."""

    window_period: ClassVar[int | None] = 2

    block_size: int = 8192
    post_attention_norm: bool = True
    post_mlp_norm: bool = True
    sliding_window_size: int | None = 4096
    attention_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0


@dataclass
class Gemma3Config(GemmaConfig):
    """Gemma 3: as Gemma 2 with normalised queries and keys instead of soft-caps; five windowed layers to one global."""

    window_period: ClassVar[int | None] = 6

    block_size: int = 131072
    norm_qk: bool = True
    post_attention_norm: bool = True
    post_mlp_norm: bool = True
    sliding_window_size: int | None = 1024
    rope_base: int = 1000000
    rope_local_base_freq: float | None = 10000


@dataclass
class QwenConfig(LlamaConfig):
    """Qwen2.5: Llama with biases in the query, key and value projection."""

    block_size: int = 32768
    norm_eps: float = 1e-6
    attn_bias: bool = True
    rope_base: int = 1000000


@dataclass
class Qwen3Config(LlamaConfig):
    """Qwen3: Llama with normalised queries and keys."""

    block_size: int = 40960
    norm_eps: float = 1e-6
    norm_qk: bool = True
    rope_base: int = 1000000


@dataclass
class PythiaConfig(Config):
    """Pythia (GPT-NeoX): LayerNorm, biases, attention and MLP in parallel, a quarter of each head rotated."""

    block_size: int = 2048
    padding_multiple: int = 128


@dataclass
class FalconConfig(Config):
    """Falcon 1: GPT-NeoX without biases, with few key/value heads and the whole head rotated."""

    block_size: int = 2048
    rotary_percentage: float = 1.0
    bias: bool = False
    tie_embeddings: bool = True


@dataclass
class OLMoConfig(LlamaConfig):
    """OLMo 1: Llama with a LayerNorm that has no weights."""

    block_size: int = 2048
    norm_class_name: str = "LayerNorm"
    norm_affine: bool | None = False


@dataclass
class OLMo2Config(LlamaConfig):
    """OLMo 2: norms behind attention and MLP instead of before, queries and keys normalised over the full width."""

    norm_eps: float = 1e-6
    norm_qk: bool = True
    norm_qk_type: Literal["default", "olmo2"] = "olmo2"
    post_attention_norm: bool = True
    post_mlp_norm: bool = True
    rope_base: int = 500000
    norm_1: bool = False
    norm_2: bool = False


@dataclass
class SmolLM2Config(LlamaConfig):
    """SmolLM2: a small Llama with tied embeddings."""

    block_size: int = 8192
    rope_base: int = 100000
    tie_embeddings: bool = True


@dataclass
class DeepseekConfig(LlamaConfig):
    """DeepSeek-V3 in kind, sizes in proportion to `n_embd`: latent attention, grouped sigmoid router, shared expert."""

    norm_eps: float = 1e-6
    rope_interleave: bool = True
    mlp_class_name: str = "LLaMAMoE"
    n_expert: int = 32
    n_shared_expert: int | None = 1
    n_expert_groups: int | None = 4
    n_topk_groups: int | None = 2
    n_topk_scores_per_group: int | None = 2
    n_expert_per_token: int = 4
    first_k_dense_replace: int | None = 1
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        if self.latent_attention is None:
            size = self.head_size or max(self.n_embd // self.n_head, 2)
            self.latent_attention = {
                "q_lora_rank": max(self.n_embd // 4, size),
                "kv_lora_rank": max(self.n_embd // 8, size),
                "qk_rope_head_dim": find_multiple(size // 2, 2),
                "qk_nope_head_dim": size,
                "v_head_dim": size,
            }
        super().__post_init__()
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = max(self.intermediate_size // 8, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The table: one row a size, in published order


def _local_layers(n_layer: int, period: int) -> list[int]:
    """1 for a windowed (local) layer, 0 for each `period`-th one, which is global."""
    return [int((i + 1) % period != 0) for i in range(n_layer)]


def _family(cls: type[Config], **common: Any) -> dict[str, Any]:
    """What the models of a family share: the defaults of `cls` that are not those of `Config`, and `common`."""
    plain = {f.name: f.default for f in fields(Config)}
    return {f.name: f.default for f in fields(cls) if f.default != plain[f.name]} | common


def _rows(family: dict[str, Any], org: str, *sizes: dict[str, Any], kinds: tuple[str, ...] = ("",)) -> list[dict]:
    """A row for each size and kind: `{}` in `name` stands for the kind; `hf` is the name on the hub if it differs.

    `window_period` becomes the layer flags of windows and, if the family has a local rotary base, of that.
    """
    rows = []
    for size in sizes:
        for kind in kinds:
            row = deepcopy(family | size)
            name = row.pop("name")
            hf_config = {"org": org, "name": row.pop("hf", name).format(kind)}
            if period := row.pop("window_period", None):
                row["sliding_window_indices"] = _local_layers(row["n_layer"], period)
                if "rope_local_base_freq" in row:
                    row["rope_indices"] = _local_layers(row["n_layer"], period)
            rows.append({"name": name.format(kind), "hf_config": hf_config} | row)
    return rows


# fmt: off
_LLAMA = _family(LlamaConfig)
_LLAMA_32K = _family(LlamaConfig, vocab_size=32000, padding_multiple=64)
_INSTRUCT = ("", "-Instruct")

# --- Stability AI ---
_ALPHA_7B = dict(n_head=48, n_embd=6144, padding_multiple=256)
_STABLELM_3B = dict(
    n_layer=32, n_embd=2560, padded_vocab_size=50304, parallel_residual=False, bias=False, mlp_class_name="LLaMAMLP",
    intermediate_size=6912)
_stablelm = [
    *_rows({}, "stabilityai", dict(name="stablelm-base-alpha-3b"), dict(name="stablelm-base-alpha-7b", **_ALPHA_7B)),
    *_rows({}, "stabilityai", dict(name="stablelm-tuned-alpha-3b"), dict(name="stablelm-tuned-alpha-7b", **_ALPHA_7B)),
    *_rows(_STABLELM_3B, "stabilityai", dict(name="stablelm-3b-4e1t"), dict(name="stablelm-zephyr-3b")),
]
stablecode = [
    *_rows(dict(n_layer=32, n_embd=2560, vocab_size=49152), "stabilityai",
        dict(name="stablecode-completion-alpha-3b", block_size=16384),
        dict(name="stablecode-completion-alpha-3b-4k"),
        dict(name="stablecode-instruct-alpha-3b")),
    *_rows(_STABLELM_3B, "stabilityai", dict(name="stable-code-3b", block_size=16384)),
]
freewilly_2 = _rows(_LLAMA_32K, "stabilityai",
    dict(name="FreeWilly2", n_layer=80, n_head=64, n_embd=8192, n_query_groups=8, intermediate_size=28672))

# --- EleutherAI ---
_PYTHIA = _family(PythiaConfig)
_pythia_sizes = [
    dict(name="pythia-70m{}", n_layer=6, n_head=8, n_embd=512),
    dict(name="pythia-160m{}", n_layer=12, n_head=12, n_embd=768),
    dict(name="pythia-410m{}", n_layer=24, n_head=16, n_embd=1024),
    dict(name="pythia-1b{}", n_layer=16, n_head=8, n_embd=2048),
    dict(name="pythia-1.4b{}", n_layer=24, n_head=16, n_embd=2048),
    dict(name="pythia-2.8b{}", n_layer=32, n_head=32, n_embd=2560),
    dict(name="pythia-6.9b{}", n_layer=32, n_head=32, n_embd=4096, padding_multiple=256),
    dict(name="pythia-12b{}", n_layer=36, n_head=40, n_embd=5120, padding_multiple=512),
]
pythia = [
    *_rows(_PYTHIA, "EleutherAI",
        dict(name="pythia-14m", n_layer=6, n_head=4, n_embd=128, block_size=512),
        dict(name="pythia-31m", n_layer=6, n_head=8, n_embd=256, block_size=1024)),
    *_rows(_PYTHIA, "EleutherAI", *_pythia_sizes),
    *_rows(_PYTHIA, "EleutherAI", *_pythia_sizes, kinds=("-deduped",)),
]

# --- TII ---
_FALCON = _family(FalconConfig, vocab_size=65024)
falcon = _rows(_FALCON, "tiiuae",
    dict(name="falcon-7b{}", n_layer=32, n_head=71, n_embd=4544, n_query_groups=1, shared_attention_norm=True),
    dict(name="falcon-40b{}", n_layer=60, n_head=128, n_embd=8192, n_query_groups=8), kinds=("", "-instruct"))
falcon180b = _rows(_FALCON, "tiiuae",
    dict(name="falcon-180B{}", n_layer=80, n_head=232, n_embd=14848, n_query_groups=8), kinds=("", "-chat"))
falcon3 = _rows(_LLAMA | dict(vocab_size=131072, norm_eps=1e-6, n_query_groups=4, rope_base=1000042), "tiiuae",
    dict(name="Falcon3-1B-{}", n_layer=18, n_head=8, n_embd=2048, intermediate_size=8192),
    dict(name="Falcon3-3B-{}", n_layer=22, n_head=12, n_embd=3072, intermediate_size=9216, block_size=32768),
    dict(name="Falcon3-7B-{}", n_layer=28, n_head=12, n_embd=3072, intermediate_size=23040, block_size=32768),
    dict(name="Falcon3-10B-{}", n_layer=40, n_head=12, n_embd=3072, intermediate_size=23040, block_size=32768),
    kinds=("Base", "Instruct"))

# --- Llama 1 and 2, and what was trained from them ---
_7B = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=11008)
_13B = dict(n_layer=40, n_head=40, n_embd=5120, intermediate_size=13824)
_70B = dict(n_layer=80, n_head=64, n_embd=8192, n_query_groups=8, intermediate_size=28672)
open_LLaMA = _rows(_LLAMA_32K | dict(block_size=2048, norm_eps=1e-6), "openlm-research",
    dict(name="open_llama_3b", n_layer=26, n_head=32, n_embd=3200, intermediate_size=8640),
    dict(name="open_llama_7b", **_7B), dict(name="open_llama_13b", **_13B))
llama_2 = _rows(_LLAMA_32K, "meta-llama",
    dict(name="Llama-2-7b{}-hf", **_7B), dict(name="Llama-2-13b{}-hf", **_13B), dict(name="Llama-2-70b{}-hf", **_70B),
    kinds=("", "-chat"))
together_llama2_32k = _rows(_LLAMA_32K, "togethercomputer", dict(name="LLaMA-2-7B-32K", rope_condense_ratio=8, **_7B))
llama_2_function_calling = _rows(_LLAMA_32K, "Trelis",
    dict(name="Llama-2-7b-chat-hf-function-calling-v2", norm_eps=1e-6, **_7B))
_V16 = dict(vocab_size=32016, padding_multiple=16)  # with the four infilling tokens
_V0 = dict(vocab_size=32000, padded_vocab_size=32000)
_34B = dict(n_layer=48, n_head=64, n_embd=8192, n_query_groups=8, intermediate_size=22016)
code_llama = _rows(_LLAMA | dict(block_size=16384, rope_base=1000000), "codellama",
    dict(name="CodeLlama-7b-hf", **_7B, **_V16), dict(name="CodeLlama-13b-hf", **_13B, **_V16),
    dict(name="CodeLlama-34b-hf", **_34B, **_V0), dict(name="CodeLlama-70b-hf", **_70B, **_V16),
    dict(name="CodeLlama-7b-Python-hf", **_7B, **_V0), dict(name="CodeLlama-13b-Python-hf", **_13B, **_V0),
    dict(name="CodeLlama-34b-Python-hf", **_34B, **_V0), dict(name="CodeLlama-70b-Python-hf", **_70B, **_V16),
    dict(name="CodeLlama-7b-Instruct-hf", **_7B, **_V16),
    dict(name="CodeLlama-13b-Instruct-hf", **_13B, **_V16, block_size=2048),
    dict(name="CodeLlama-34b-Instruct-hf", **_34B, **_V0),
    dict(name="CodeLlama-70b-Instruct-hf", **_70B, vocab_size=32015, padding_multiple=16))
_30B = dict(n_layer=60, n_head=52, n_embd=6656, intermediate_size=17920)
platypus = _rows(_LLAMA | _V0, "garage-bAInd",
    dict(name="Platypus-30B", **_30B, block_size=2048, norm_eps=1e-6),
    dict(name="Platypus2-7B", **_7B), dict(name="Platypus2-13B", **_13B),
    dict(name="Platypus2-70B", **_70B | dict(n_query_groups=None)),
    dict(name="Camel-Platypus2-13B", **_13B), dict(name="Camel-Platypus2-70B", **_70B),
    dict(name="Stable-Platypus2-13B", **_13B), dict(name="Platypus2-70B-instruct", **_70B))
_TINY = _LLAMA_32K | dict(block_size=2048, n_query_groups=4, intermediate_size=5632)
tiny_llama = _rows(_TINY | dict(n_layer=22, n_head=32, n_embd=2048), "TinyLlama",
    dict(name="tiny-llama-1.1b", hf="TinyLlama-1.1B-intermediate-step-1431k-3T"),
    dict(name="tiny-llama-1.1b-chat", hf="TinyLlama-1.1B-Chat-v1.0"))
micro_llama = _rows(_TINY, "keeeeenw",
    dict(name="micro-llama-300M", hf="MicroLlama", n_layer=12, n_head=16, n_embd=1024))

# --- Llama 3 ---
_LLAMA_3 = _family(LlamaConfig, block_size=8192, vocab_size=128000, padded_vocab_size=128256, n_query_groups=8,
    rope_base=500000)
_ROPE_31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
_LLAMA_31 = _LLAMA_3 | dict(block_size=131072, rope_adjustments=_ROPE_31)
_LLAMA_32 = _LLAMA_31 | dict(tie_embeddings=True, rope_adjustments=_ROPE_31 | dict(factor=32.0))
_8B = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=14336)
llama_3 = [
    *_rows(_LLAMA_3, "meta-llama", dict(name="Llama-3-8B{}", hf="Meta-Llama-3-8B{}", **_8B), kinds=_INSTRUCT),
    *_rows(_LLAMA_31, "meta-llama", dict(name="Llama-3.1-8B{}", hf="Meta-Llama-3.1-8B{}", **_8B), kinds=_INSTRUCT),
    *_rows(_LLAMA_3, "meta-llama", dict(name="Llama-3-70B{}", hf="Meta-Llama-3-70B{}", **_70B), kinds=_INSTRUCT),
    *_rows(_LLAMA_31, "meta-llama",
        dict(name="Llama-3.1-70B{}", hf="Meta-Llama-3.1-70B{}", **_70B),
        dict(name="Llama-3.1-405B{}", hf="Meta-Llama-3.1-405B{}", n_layer=126, n_head=128, n_embd=16384,
             intermediate_size=53248), kinds=_INSTRUCT),
    *_rows(_LLAMA_32, "meta-llama",
        dict(name="Llama-3.2-1B{}", n_layer=16, n_head=32, n_embd=2048, intermediate_size=8192),
        dict(name="Llama-3.2-3B{}", n_layer=28, n_head=24, n_embd=3072, intermediate_size=8192), kinds=_INSTRUCT),
    *_rows(_LLAMA_31, "meta-llama", dict(name="Llama-3.3-70B-Instruct", **_70B)),
    *_rows(_LLAMA_31, "nvidia", dict(name="Llama-3.1-Nemotron-70B-Instruct-HF", **_70B)),
]
r1_distill_llama = _rows(_LLAMA_31, "deepseek-ai",
    dict(name="R1-Distill-Llama-8B", hf="DeepSeek-R1-Distill-Llama-8B", **_8B),
    dict(name="R1-Distill-Llama-70B", hf="DeepSeek-R1-Distill-Llama-70B", **_70B))

# --- Allen AI ---
_OLMO = _family(OLMoConfig, vocab_size=50280, padded_vocab_size=50304)
olmo = _rows(_OLMO, "allenai",
    dict(name="OLMo-1B-hf", n_layer=16, n_head=16, n_embd=2048, intermediate_size=8192, tie_embeddings=True),
    dict(name="OLMo-7B-hf", **_7B), dict(name="OLMo-7B-Instruct-hf", **_7B))
olmo2 = _rows(_family(OLMo2Config, vocab_size=100278), "allenai",
    dict(name="OLMo-2-1124-7B{}", **_7B),
    dict(name="OLMo-2-1124-13B{}", **_13B), kinds=("", "-SFT", "-DPO", "-Instruct"))

# --- Google ---
_GEMMA = _family(GemmaConfig, vocab_size=256000, padding_multiple=64)
_GEMMA_2 = _family(Gemma2Config, window_period=2, vocab_size=256000, head_size=256, attention_scores_scalar=256)
_GEMMA_3 = _family(
    Gemma3Config, window_period=6, vocab_size=262144, head_size=256, attention_scores_scalar=256,
    rope_adjustments=dict(factor=8.0))
_gemma_7b = dict(n_layer=28, n_head=16, n_embd=3072, head_size=256, intermediate_size=24576)
_gemma_sizes = [
    dict(name="Gemma-2b{}", hf="gemma-2b{}", n_layer=18, n_head=8, n_embd=2048, n_query_groups=1,
         intermediate_size=16384),
    dict(name="Gemma-7b{}", hf="gemma-7b{}", **_gemma_7b),
]
_gemma_2_sizes = [
    dict(name="Gemma-2-2b{}", hf="gemma-2-2b{}", n_layer=26, n_head=8, n_embd=2304, n_query_groups=4,
         intermediate_size=9216),
    dict(name="Gemma-2-9b{}", hf="gemma-2-9b{}", n_layer=42, n_head=16, n_embd=3584, n_query_groups=8,
         intermediate_size=14336),
    dict(name="Gemma-2-27b{}", hf="gemma-2-27b{}", n_layer=46, n_head=32, n_embd=4608, n_query_groups=16,
         head_size=128, attention_scores_scalar=144, intermediate_size=36864),
]
gemma = [
    *_rows(_GEMMA, "google", *_gemma_sizes),
    *_rows(_GEMMA_2, "google", *_gemma_2_sizes),
    *_rows(_GEMMA, "google", *_gemma_sizes, kinds=("-it",)),
    *_rows(_GEMMA_2, "google", *_gemma_2_sizes, kinds=("-it",)),
]
gemma3 = _rows(_GEMMA_3, "google",
    dict(name="Gemma-3-1b-it", hf="gemma-3-1b-it", n_layer=26, n_head=4, n_embd=1152, n_query_groups=1,
         intermediate_size=6912, sliding_window_size=512, rope_adjustments=None),
    dict(name="Gemma-3-4b-it", hf="gemma-3-4b-it", n_layer=34, n_head=8, n_embd=2560, n_query_groups=4,
         intermediate_size=10240),
    dict(name="Gemma-3-12b-it", hf="gemma-3-12b-it", n_layer=48, n_head=16, n_embd=3840, n_query_groups=8,
         intermediate_size=15360),
    dict(name="Gemma-3-27b-it", hf="gemma-3-27b-it", n_layer=62, n_head=32, n_embd=5376, n_query_groups=16,
         head_size=128, attention_scores_scalar=168, intermediate_size=21504))
codegemma = _rows(_GEMMA, "google", dict(name="CodeGemma-7b-it", hf="codegemma-7b-it", **_gemma_7b))

# --- Microsoft ---
_PHI = _family(PhiConfig, vocab_size=50257, padded_vocab_size=51200)
_PHI_3 = _LLAMA | dict(n_layer=32, n_embd=3072, intermediate_size=8192, vocab_size=32000, padded_vocab_size=32064)
_PHI_4 = _LLAMA | dict(n_layer=40, n_head=40, n_embd=5120, n_query_groups=10, intermediate_size=17920,
    vocab_size=100352)
_PHI_4_MINI = _PHI_3 | dict(vocab_size=200019, padded_vocab_size=200064, n_head=24, n_query_groups=8,
    rotary_percentage=0.75, sliding_window_size=262145, tie_embeddings=True)
# Context of the models that reach it by LongRoPE. The factors are in the config.json of the weights, one list a model;
# without them the rows keep the context of the original positions.
LONGROPE_CONTEXT = {"Phi-3-mini-128k-instruct": 131072, "Phi-3.5-mini-instruct": 131072,
    "Phi-4-mini-instruct": 131072, "Phi-4-mini-reasoning": 131072}
phi = [
    *_rows(_PHI, "microsoft",
        dict(name="phi-1_5", n_layer=24, n_embd=2048),
        dict(name="phi-2", n_layer=32, n_embd=2560, rotary_percentage=0.4)),
    *_rows(_PHI_3, "microsoft",
        dict(name="Phi-3-mini-4k-instruct", sliding_window_size=2048),
        dict(name="Phi-3-mini-128k-instruct", sliding_window_size=262145),
        dict(name="Phi-3.5-mini-instruct")),
    *_rows(_PHI_4, "microsoft",
        dict(name="phi-4", block_size=16384, rope_base=250000),
        dict(name="Phi-4-reasoning", block_size=32768, rope_base=500000),
        dict(name="Phi-4-reasoning-plus", block_size=32768, rope_base=500000)),
    *_rows(_PHI_4_MINI, "microsoft", dict(name="Phi-4-mini-instruct"), dict(name="Phi-4-mini-reasoning")),
]

# --- Mistral AI ---
_MISTRAL, _MIXTRAL = _family(MistralConfig, n_query_groups=8), _family(MixtralConfig, n_query_groups=8)
_MISTRAL_V1 = dict(sliding_window_size=4096, block_size=4096, rope_base=10000, **_8B, **_V0)
_123B = dict(n_layer=88, n_head=96, n_embd=12288, intermediate_size=28672, vocab_size=32768)
_8X22B = dict(n_layer=56, n_head=48, n_embd=6144, intermediate_size=16384, vocab_size=32768, block_size=65536)
mistral = [
    *_rows(_MISTRAL, "mistralai",
        dict(name="Mathstral-7B-v0.1", hf="mathstral-7B-v0.1", vocab_size=32768, sliding_window_size=4096, **_8B),
        dict(name="Mistral-7B-v0.1", **_MISTRAL_V1),
        dict(name="Mistral-7B-Instruct-v0.1", **_MISTRAL_V1)),
    *_rows(_MIXTRAL, "mistralai",
        dict(name="Mixtral-8x7B-{}v0.1", **_8B, **_V0),
        dict(name="Mixtral-8x22B-{}v0.1", **_8X22B), kinds=("", "Instruct-")),
    *_rows(_MISTRAL, "unsloth", dict(name="Mistral-7B-v0.2", **_8B, **_V0)),
    *_rows(_MISTRAL, "mistralai",
        dict(name="Mistral-7B-Instruct-v0.2", **_8B, **_V0),
        dict(name="Mistral-7B-v0.3", vocab_size=32768, **_8B),
        dict(name="Mistral-7B-Instruct-v0.3", vocab_size=32768, **_8B),
        dict(name="Mistral-Large-Instruct-2407", **_123B), dict(name="Mistral-Large-Instruct-2411", **_123B)),
]

# --- Alibaba ---
_QWEN = _family(QwenConfig, vocab_size=151643)
_TIED = dict(padded_vocab_size=151936, tie_embeddings=True)
_QWEN_SIZES = {
    "0.5B": dict(n_layer=24, n_head=14, n_embd=896, n_query_groups=2, intermediate_size=4864, **_TIED),
    "1.5B": dict(n_layer=28, n_head=12, n_embd=1536, n_query_groups=2, intermediate_size=8960, **_TIED),
    "3B": dict(n_layer=36, n_head=16, n_embd=2048, n_query_groups=2, intermediate_size=11008, **_TIED),
    "7B": dict(n_layer=28, n_head=28, n_embd=3584, n_query_groups=4, intermediate_size=18944),
    "14B": dict(n_layer=48, n_head=40, n_embd=5120, n_query_groups=8, intermediate_size=13824, norm_eps=1e-5),
    "32B": dict(n_layer=64, n_head=40, n_embd=5120, n_query_groups=8, intermediate_size=27648, norm_eps=1e-5),
    "72B": dict(n_layer=80, n_head=64, n_embd=8192, n_query_groups=8, intermediate_size=29568, norm_eps=1e-5),
}
qwen_2_5 = _rows(_QWEN, "Qwen",
    *(dict(name=f"Qwen2.5-{size}{{}}", **values, block_size=32768 if size in ("0.5B", "3B") else 131072)
      for size, values in _QWEN_SIZES.items()), kinds=_INSTRUCT)
qwen_2_5_coder = _rows(_QWEN, "Qwen",
    *(dict(name=f"Qwen2.5-Coder-{size}{{}}", **values) for size, values in _QWEN_SIZES.items() if size != "72B"),
    kinds=_INSTRUCT)
qwen_2_5_math = _rows(_QWEN | dict(block_size=4096, rope_base=10000), "Qwen",
    *(dict(name=f"Qwen2.5-Math-{size}{{}}", **_QWEN_SIZES[size]) for size in ("1.5B", "7B", "72B")), kinds=_INSTRUCT)
qwen_2_5_1m = _rows(_QWEN | dict(block_size=1010000, rope_base=10000000), "Qwen",
    *(dict(name=f"Qwen2.5-{size}-Instruct-1M", **_QWEN_SIZES[size] | dict(norm_eps=1e-5)) for size in ("7B", "14B")))
qwq = _rows(_QWEN | _QWEN_SIZES["32B"], "Qwen", dict(name="QwQ-32B", block_size=131072), dict(name="QwQ-32B-Preview"))
_QWEN_3 = _family(Qwen3Config, vocab_size=151643, padded_vocab_size=151936, n_query_groups=8, head_size=128)
_QWEN_3_MOE = _QWEN_3 | dict(mlp_class_name="LLaMAMoE", n_query_groups=4, n_expert=128, n_expert_per_token=8)
_Q3_4B = dict(n_layer=36, n_head=32, n_embd=2560, intermediate_size=9728, tie_embeddings=True)
_Q3_30B = dict(n_layer=48, n_head=32, n_embd=2048, intermediate_size=6144, moe_intermediate_size=768)
_Q3_235B = dict(n_layer=94, n_head=64, n_embd=4096, intermediate_size=12288, moe_intermediate_size=1536)
_2507 = ("-Thinking-2507", "-Instruct-2507")
qwen_3 = _rows(_QWEN_3, "Qwen",
    dict(name="Qwen3-0.6B{}", n_layer=28, n_head=16, n_embd=1024, intermediate_size=3072, tie_embeddings=True),
    dict(name="Qwen3-1.7B{}", n_layer=28, n_head=16, n_embd=2048, intermediate_size=6144, tie_embeddings=True),
    dict(name="Qwen3-4B{}", **_Q3_4B),
    dict(name="Qwen3-8B{}", n_layer=36, n_head=32, n_embd=4096, intermediate_size=12288),
    dict(name="Qwen3-14B{}", n_layer=40, n_head=40, n_embd=5120, intermediate_size=17408), kinds=("", "-Base"))
qwen_3_32b = _rows(_QWEN_3, "Qwen", dict(name="Qwen3-32B", n_layer=64, n_head=64, n_embd=5120, intermediate_size=25600))
qwen_3_moe = _rows(_QWEN_3_MOE, "Qwen",
    dict(name="Qwen3-30B-A3B", **_Q3_30B),
    dict(name="Qwen3-30B-A3B-Base", **_Q3_30B),
    dict(name="Qwen3-235B-A22B", **_Q3_235B))
qwen_3_2507_thinking_instruct = [
    *_rows(_QWEN_3_MOE | dict(block_size=262144), "Qwen",
        dict(name="Qwen3-235B-A22B{}", rope_base=5000000, **_Q3_235B),
        dict(name="Qwen3-30B-A3B{}", rope_base=10000000, **_Q3_30B), kinds=_2507),
    *_rows(_QWEN_3 | dict(block_size=262144), "Qwen",
        dict(name="Qwen3-4B{}", rope_base=5000000, **_Q3_4B), kinds=_2507),
]

# --- Others ---
salamandra = _rows(_LLAMA | dict(block_size=8192, vocab_size=256000), "BSC-LT",
    dict(name="salamandra-2b{}", n_layer=24, n_head=16, n_embd=2048, intermediate_size=5440),
    dict(name="salamandra-7b{}", n_query_groups=8, norm_eps=1e-6, **_7B), kinds=("", "-instruct"))
smollm2 = _rows(_family(SmolLM2Config, vocab_size=49152), "HuggingFaceTB",
    dict(name="SmolLM2-135M{}", n_layer=30, n_head=9, n_embd=576, n_query_groups=3, intermediate_size=1536),
    dict(name="SmolLM2-360M{}", n_layer=32, n_head=15, n_embd=960, n_query_groups=5, intermediate_size=2560),
    dict(name="SmolLM2-1.7B{}", n_layer=24, n_head=32, n_embd=2048, intermediate_size=8192, rope_base=130000),
    kinds=_INSTRUCT)

# In published order.
configs: list[dict[str, Any]] = [
    *_stablelm, *stablecode, *pythia, *falcon, *falcon180b, *falcon3, *open_LLaMA, *llama_2, *llama_3, *olmo, *olmo2,
    *gemma, *gemma3, *codegemma, *freewilly_2, *code_llama, *platypus, *together_llama2_32k, *phi, *mistral,
    *tiny_llama, *micro_llama, *llama_2_function_calling, *qwen_2_5, *qwen_2_5_coder, *qwen_2_5_math, *qwen_2_5_1m,
    *qwq, *qwen_3, *qwen_3_32b, *qwen_3_moe, *qwen_3_2507_thinking_instruct, *salamandra, *smollm2, *r1_distill_llama,
]
name_to_config: dict[str, dict[str, Any]] = {config["name"]: config for config in configs}
# fmt: on


def _find_row(name: str) -> dict[str, Any] | None:
    """The row for a config name, a name on the hub, or `org/name`."""
    if name in name_to_config:
        return name_to_config[name]
    org, _, short = name.rpartition("/")
    for row in configs:
        if short in (row["name"], row["hf_config"]["name"]) and org in ("", row["hf_config"]["org"]):
            return row
    return None
