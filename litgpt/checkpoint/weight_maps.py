"""How the weights of each Hugging Face model type are named and laid out: one table a family, read in both directions.

A table says for each module of ours where its tensors stand in the file; the last part of a name (`weight`, `bias`) is
the same on both sides. `{}` stands for the number of a layer, a second one for that of an expert. A family states only
what differs from the one that it is built on, which in the end is `llama`. `adapter.py` applies the tables.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from litgpt.config import Config, mistral, nearest, phi


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours stands in the file."""

    names: tuple[str, ...]
    """The modules that hold it; the rows of several follow each other in ours (query, key, value)."""
    part: int = 0
    """Which of the equal parts, by rows, of the file's tensor it is."""
    of: int = 1
    """Into how many parts the file's tensor is cut."""
    grouped: bool = False
    """The file keeps the rows of query, key and value group by group: `q..q k v`, `q..q k v`, ..."""


@dataclass(frozen=True)
class Skip:
    """Tensors in the file that the model has no use for."""

    pattern: str
    """Regular expression for the whole name."""
    notice: str = ""
    """What a warning calls them; empty = nothing is lost, so nothing is said."""


@dataclass(frozen=True)
class WeightMap:
    """The table of one family."""

    outer: Mapping[str, str | Source]
    """Modules outside of the blocks."""
    block: Mapping[str, str | Source]
    """Modules of a block, named within the block on both sides."""
    layers: str = "model.layers.{}."
    """What the names of a block begin with in the file."""
    block_where: Mapping[str, Mapping[str, str | Source]] = field(default_factory=dict)
    """Rows that replace those of `block` where this field of the config is true."""
    skip: tuple[Skip, ...] = ()
    """Beside what every family skips."""
    spellings: tuple[tuple[str, str], ...] = ()
    """Regular expressions that turn other names, which are read too, into those of the table."""
    has_next_token_layers: bool = False
    """Layers behind the last one may be there to predict several tokens at once; they are skipped with a notice."""

    def rows(self, config: Config) -> dict[str, Source]:
        """Our module -> where it stands in a file of this config, with `{}` for numbers on both sides."""
        rows = {name: _source(row) for name, row in self.outer.items()}
        for block in (self.block, *(block for key, block in self.block_where.items() if getattr(config, key))):
            for name, row in block.items():
                source = _source(row)
                rows[OURS + name] = replace(source, names=tuple(self.layers + n for n in source.names))
        return rows

    def modules(self) -> set[str]:
        """All modules that a file of this family may have, with `{}` for numbers."""
        blocks = [self.block, *self.block_where.values()]
        names = [name for source in self.outer.values() for name in _source(source).names]
        return {*names} | {self.layers + n for block in blocks for row in block.values() for n in _source(row).names}

    def skips(self, name: str) -> Skip | None:
        """The rule by which this tensor of a file is left out, if there is one."""
        return next((s for s in (*self.skip, *SKIPPED_EVERYWHERE) if re.fullmatch(s.pattern, name)), None)


OURS = "transformer.h.{}."
SKIPPED_EVERYWHERE = (
    Skip(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"),
    Skip(r"(model\.)?(vision_tower|vision_model|visual|multi_modal_projector)\..*", "the vision part of the model"),
    Skip(r"(model\.)?(audio_tower|audio_model|embed_audio)\..*", "the audio part of the model"),
)
# Transformers 4 and 5 put the text part of a multimodal model into different places.
TEXT_PART = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _source(row: str | Source) -> Source:
    return Source((row,)) if isinstance(row, str) else row


def _like(base: WeightMap, block: Mapping[str, str | Source] = {}, outer: Mapping = {}, **changes: object) -> WeightMap:
    return replace(base, block={**base.block, **block}, outer={**base.outer, **outer}, **changes)


def module_pattern(name: str) -> str:
    """The module of a tensor, with `{}` for numbers: `h.3.norm_1.weight` -> `h.{}.norm_1`."""
    return NUMBER.sub("{}", name.rpartition(".")[0])


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that several families have

_QK_NORM = {"attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm"}
_FUSED_GATE = {
    "mlp.fc_1": Source(("mlp.gate_up_proj",), part=0, of=2),
    "mlp.fc_2": Source(("mlp.gate_up_proj",), part=1, of=2),
}
_EXPERTS = {
    "mlp.gate": "mlp.gate",
    "mlp.experts.{}.fc_1": "mlp.experts.{}.gate_proj",
    "mlp.experts.{}.fc_2": "mlp.experts.{}.up_proj",
    "mlp.experts.{}.proj": "mlp.experts.{}.down_proj",
}
_NORMS_AROUND = {  # before and behind both parts of a block
    "post_attention_norm": "post_attention_layernorm",
    "norm_2": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}

# ---------------------------------------------------------------------------------------------------------------------
# The families

# fmt: off
_LLAMA = WeightMap(
    outer={"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"},
    block={
        "norm_1": "input_layernorm",
        "attn.qkv": Source(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        "attn.proj": "self_attn.o_proj",
        "norm_2": "post_attention_layernorm",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    },
)
_QWEN_3 = _like(_LLAMA, _QK_NORM)
_GEMMA_2 = _like(_LLAMA, _NORMS_AROUND)
_OLMO_2 = _like(_LLAMA, _QK_NORM | _NORMS_AROUND)
_MIXTRAL = _like(
    _LLAMA,
    {
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.{}.fc_1": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.{}.fc_2": "block_sparse_moe.experts.{}.w3",
        "mlp.experts.{}.proj": "block_sparse_moe.experts.{}.w2",
    },
    spellings=(  # the live model of transformers 5, saved as it is
        (r"\.mlp\.", ".block_sparse_moe."),
        (r"(\.experts\.\d+)\.gate_proj\.", r"\1.w1."),
        (r"(\.experts\.\d+)\.up_proj\.", r"\1.w3."),
        (r"(\.experts\.\d+)\.down_proj\.", r"\1.w2."),
    ),
)
_DEEPSEEK = _like(
    _LLAMA,
    _EXPERTS | {
        "attn.q_proj": "self_attn.q_proj", "attn.q_a_proj": "self_attn.q_a_proj",
        "attn.q_a_norm": "self_attn.q_a_layernorm", "attn.q_b_proj": "self_attn.q_b_proj",
        "attn.kv_a_proj_with_mqa": "self_attn.kv_a_proj_with_mqa",
        "attn.kv_a_norm": "self_attn.kv_a_layernorm", "attn.kv_b_proj": "self_attn.kv_b_proj",
        "mlp.shared_experts.fc_1": "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.fc_2": "mlp.shared_experts.up_proj",
        "mlp.shared_experts.proj": "mlp.shared_experts.down_proj",
    },
    has_next_token_layers=True,
)
_GPT_NEOX = WeightMap(
    outer={
        "transformer.wte": "gpt_neox.embed_in", "transformer.ln_f": "gpt_neox.final_layer_norm",
        "lm_head": "embed_out",
    },
    layers="gpt_neox.layers.{}.",
    block={
        "norm_1": "input_layernorm",
        "attn.qkv": Source(("attention.query_key_value",), grouped=True),
        "attn.proj": "attention.dense",
        "norm_2": "post_attention_layernorm",
        "mlp.fc": "mlp.dense_h_to_4h",
        "mlp.proj": "mlp.dense_4h_to_h",
    },
    skip=(Skip(r".*\.attention\.(bias|masked_bias)"),),
    spellings=((r"^lm_head\.", "embed_out."),),
)

WEIGHT_MAPS: dict[str, WeightMap] = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "gemma": _LLAMA, "olmo": _LLAMA, "stablelm": _LLAMA,
    "granite": _LLAMA, "smollm3": _LLAMA, "seed_oss": _LLAMA, "ernie4_5": _LLAMA,
    "mixtral": _MIXTRAL,
    "gemma2": _GEMMA_2,
    "gemma3_text": _like(_GEMMA_2, _QK_NORM),
    "qwen3": _QWEN_3,
    "qwen3_moe": _like(_QWEN_3, _EXPERTS),
    "phi": _like(
        _LLAMA,
        {"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"},
        {"transformer.ln_f": "model.final_layernorm"},
    ),
    "phi3": _like(_LLAMA, {"attn.qkv": "self_attn.qkv_proj"} | _FUSED_GATE),
    "olmo2": _OLMO_2, "olmo3": _OLMO_2,
    "gpt_neox": _GPT_NEOX,
    "falcon": _like(
        _GPT_NEOX,
        {
            "norm_1": "ln_attn",
            "attn.qkv": Source(("self_attention.query_key_value",), grouped=True),
            "attn.proj": "self_attention.dense",
            "norm_2": "ln_mlp",
        },
        {
            "transformer.wte": "transformer.word_embeddings", "transformer.ln_f": "transformer.ln_f",
            "lm_head": "lm_head",
        },
        layers="transformer.h.{}.", block_where={"shared_attention_norm": {"norm_1": "input_layernorm"}},
        skip=(), spellings=(),
    ),
    "deepseek_v2": _DEEPSEEK, "deepseek_v3": _DEEPSEEK,
    "glm4": _like(
        _LLAMA, {"post_attention_norm": "post_self_attn_layernorm", "post_mlp_norm": "post_mlp_layernorm"} | _FUSED_GATE
    ),
}
"""Model type in config.json -> its table."""

# fmt: on

OTHER_TYPES = {"gemma3": "gemma3_text", "RefinedWebModel": "falcon", "RefinedWeb": "falcon"}
"""Model types that stand for one of `WEIGHT_MAPS`: a multimodal model for its text part, older names."""

# Which type a config is by its fields; the first that holds. A Llama answers for what has nothing special.
_TYPE_BY_FIELDS: tuple[tuple[str, Callable[[Config], object]], ...] = (
    ("deepseek_v2", lambda c: c.latent_attention and c.router_scoring == "softmax"),
    ("deepseek_v3", lambda c: c.latent_attention),
    ("phi", lambda c: c.mlp_class_name == "GptNeoxMLP" and c.lm_head_bias),
    ("gpt_neox", lambda c: c.mlp_class_name == "GptNeoxMLP" and c.bias),
    ("falcon", lambda c: c.mlp_class_name == "GptNeoxMLP"),
    ("stablelm", lambda c: c.norm_class_name == "LayerNorm" and c.norm_affine),
    ("olmo", lambda c: c.norm_class_name == "LayerNorm"),
    ("gemma3_text", lambda c: c.mlp_class_name == "GemmaMLP" and c.post_mlp_norm and c.norm_qk),
    ("gemma2", lambda c: c.mlp_class_name == "GemmaMLP" and c.post_mlp_norm),
    ("gemma", lambda c: c.mlp_class_name == "GemmaMLP"),
    ("qwen3_moe", lambda c: c.n_expert and c.norm_qk),
    ("mixtral", lambda c: c.n_expert),
    ("olmo3", lambda c: c.norm_qk and c.norm_qk_type == "olmo2" and c.sliding_window_size),
    ("olmo2", lambda c: c.norm_qk and c.norm_qk_type == "olmo2"),
    ("qwen3", lambda c: c.norm_qk),
    ("granite", lambda c: c.embedding_multiplier or c.residual_multiplier or c.logits_scaling),
    ("glm4", lambda c: c.post_mlp_norm),
    ("ernie4_5", lambda c: c.rope_interleave),
    ("smollm3", lambda c: c.nope_indices),
    ("seed_oss", lambda c: c.attn_bias and c.head_size * c.n_head != c.n_embd),
    ("qwen2", lambda c: c.attn_bias),
    ("phi3", lambda c: c.rotary_percentage < 1 or "long_factor" in (c.rope_adjustments or ())),
    ("mistral", lambda c: c.sliding_window_size),
    ("llama", lambda c: True),
)
# Named models that their fields do not tell from a Llama.
_TYPE_BY_NAME = {row["name"]: "phi3" for row in phi if not row.get("lm_head_bias")}
_TYPE_BY_NAME |= {row["name"]: "mistral" for row in mistral if not row.get("n_expert")}

HF_MODULES = {module for table in WEIGHT_MAPS.values() for module in table.modules()}
HF_MODULES -= {"lm_head", "transformer.ln_f"}  # called the same on both sides


def find_model_type(
    config: Config, hf_values: Mapping[str, Any] | None = None, tensor_names: Iterable[str] = ()
) -> str:
    """The Hugging Face model type: by config.json, else by the name of the config, else by the features it has.

    Args:
        config: Of the model.
        hf_values: Content of config.json.
        tensor_names: In the file. They decide between types that the rest does not tell apart.

    Raises:
        ValueError: config.json says a type that has no table here.
    """
    if hf_values and hf_values.get("model_type"):
        text = hf_values.get("text_config") or {}
        inner = text.get("model_type") if isinstance(text, Mapping) else None
        return known_type(inner if inner in WEIGHT_MAPS else hf_values["model_type"])
    by_fields = next(model_type for model_type, holds in _TYPE_BY_FIELDS if holds(config))
    likely = _TYPE_BY_NAME.get(config.name, by_fields)
    modules = {module_pattern(TEXT_PART.sub("model.", name)) for name in tensor_names} & HF_MODULES
    return next((kind for kind in (likely, *WEIGHT_MAPS) if modules <= WEIGHT_MAPS[kind].modules()), likely)


def known_type(model_type: object) -> str:
    """The key of `WEIGHT_MAPS` for a model type in config.json; unknown ones are errors."""
    model_type = OTHER_TYPES.get(str(model_type), str(model_type))
    if model_type not in WEIGHT_MAPS:
        near = ", ".join(nearest(model_type, WEIGHT_MAPS) or sorted(WEIGHT_MAPS))
        raise ValueError(
            f"no table of weight names for model_type {model_type[:60]!r}; the nearest that has one: {near}"
        )
    return model_type


def is_hf_names(names: Iterable[str]) -> bool:
    """Whether tensors are called as in a Hugging Face file of a family that has a table here."""
    return any(module_pattern(TEXT_PART.sub("model.", name)) in HF_MODULES for name in names)
