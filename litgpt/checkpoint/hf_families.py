"""What the model types of transformers are in our fields: data for `hf_config`, in both directions.

`FAMILIES` is an allow-list with a row a type: the keys of its `config.json` that are read, with what the config class
of transformers 5 puts where a file lacks them. `FIELDS` are those that are a field of ours under another name.
"""

from dataclasses import dataclass, field
from typing import Any

from litgpt.config import (
    Config,
    DeepseekConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    LlamaConfig,
    OLMo2Config,
    OLMoConfig,
    PhiConfig,
    PythiaConfig,
    Qwen3Config,
)


@dataclass(frozen=True)
class Family:
    """How one model type of transformers is said in our fields."""

    architecture: str
    """The class that transformers loads."""
    kind: type[Config]
    """Its defaults hold for all models of the type."""
    keys: dict[str, Any]
    """What is read, with the defaults of transformers; null where that is derived, or a feature not used."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Fields in which the type differs from `kind`."""
    only: dict[str, tuple] = field(default_factory=dict)
    """Values that our model can do, of keys that decide nothing else; another value is refused."""
    also: dict[str, Any] = field(default_factory=dict)
    """Keys that are written and not read, for other readers than transformers 5."""


def _keys(
    vocab: int, width: int, inner: int, layers: int, heads: int, groups: int | None, length: int, **more: Any
) -> dict[str, Any]:  # fmt: skip
    own = dict(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=length, head_dim=None,
        tie_word_embeddings=False, rope_theta=10000.0,
    )  # fmt: skip
    return own | ({} if "hidden_activation" in more else {"hidden_act": "silu"}) | more


def _without(keys: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


# fmt: off
_RMS, _RMS_5, _LN = dict(rms_norm_eps=1e-6), dict(rms_norm_eps=1e-5), dict(layer_norm_eps=1e-5)
_BIASES, _NO_BIAS, _TIED = dict(attention_bias=False, mlp_bias=False), dict(attention_bias=(False,)), dict(
    tie_word_embeddings=True)
_WINDOW = dict(sliding_window=4096, layer_types=None)
_WINDOW_ABOVE = _WINDOW | dict(use_sliding_window=False, max_window_layers=28)
_GEMMA = dict(**_RMS, **_TIED, head_dim=256, hidden_activation="gelu_pytorch_tanh")
_GEMMA_2 = _GEMMA | _WINDOW | dict(query_pre_attn_scalar=256)
_MULTIPLIERS = dict(embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0, attention_multiplier=1.0)
_LATENT = dict(q_lora_rank=1536, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", LlamaConfig, _keys(32000, 4096, 11008, 32, 32, None, 2048, **_RMS, **_BIASES)),
    "mistral": Family("MistralForCausalLM", LlamaConfig, _keys(
        32000, 4096, 14336, 32, 32, 8, 131072, **_RMS, sliding_window=4096)),
    "mixtral": Family("MixtralForCausalLM", LlamaConfig, _keys(
        32000, 4096, 14336, 32, 32, 8, 131072, **_RMS_5, sliding_window=None, rope_theta=1e6, num_local_experts=8,
        num_experts_per_tok=2), dict(mlp_class_name="LLaMAMoE")),
    "gemma": Family("GemmaForCausalLM", GemmaConfig, _keys(
        256000, 3072, 24576, 28, 16, 16, 8192, **_GEMMA), {}, _NO_BIAS | dict(hidden_act=("gelu", "gelu_pytorch_tanh")),
        dict(hidden_act="gelu_pytorch_tanh")),
    "gemma2": Family("Gemma2ForCausalLM", Gemma2Config, _keys(
        256000, 2304, 9216, 26, 8, 4, 8192, **_GEMMA_2, sliding_window_pattern=2, final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0), {}, _NO_BIAS),
    "gemma3_text": Family("Gemma3ForCausalLM", Gemma3Config, _keys(
        262208, 2304, 9216, 26, 8, 4, 131072, **_GEMMA_2, sliding_window_pattern=6, final_logit_softcapping=None,
        attn_logit_softcapping=None, rope_theta=1e6, rope_local_base_freq=10000.0), {}, _NO_BIAS),
    "qwen2": Family("Qwen2ForCausalLM", LlamaConfig, _keys(
        151936, 4096, 22016, 32, 32, 32, 32768, **_RMS, **_WINDOW_ABOVE), dict(attn_bias=True)),
    "qwen3": Family("Qwen3ForCausalLM", Qwen3Config, _keys(
        151936, 4096, 22016, 32, 32, 32, 32768, **_RMS, **_WINDOW_ABOVE, head_dim=128), {}, _NO_BIAS),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", Qwen3Config, _keys(
        151936, 2048, 6144, 24, 32, 4, 32768, **_RMS, sliding_window=4096, use_sliding_window=False, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False), dict(mlp_class_name="LLaMAMoE"),
        _NO_BIAS | dict(mlp_only_layers=([],), decoder_sparse_step=(1,))),
    "phi": Family("PhiForCausalLM", PhiConfig, _keys(
        51200, 2048, 8192, 24, 32, None, 2048, **_LN, hidden_act="gelu_new", partial_rotary_factor=0.5)),
    "phi3": Family("Phi3ForCausalLM", LlamaConfig, _keys(
        32064, 3072, 8192, 32, 32, None, 4096, **_RMS_5, sliding_window=None, partial_rotary_factor=1.0,
        original_max_position_embeddings=4096)),
    "olmo": Family("OlmoForCausalLM", OLMoConfig, _keys(50304, 4096, 11008, 32, 32, None, 2048), {}, _NO_BIAS),
    "olmo2": Family("Olmo2ForCausalLM", OLMo2Config, _keys(
        50304, 4096, 11008, 32, 32, None, 2048, **_RMS_5), {}, _NO_BIAS),
    "olmo3": Family("Olmo3ForCausalLM", OLMo2Config, _keys(
        50304, 4096, 11008, 32, 32, None, 2048, **_RMS_5, **_WINDOW, sliding_window_pattern=4, rope_theta=500000.0,
        rope_local_base_freq=None), {}, _NO_BIAS),
    "falcon": Family("FalconForCausalLM", FalconConfig, dict(
        vocab_size=65024, hidden_size=4544, ffn_hidden_size=None, num_hidden_layers=32, num_attention_heads=71,
        num_kv_heads=None, max_position_embeddings=2048, layer_norm_epsilon=1e-5, activation="gelu", bias=False,
        tie_word_embeddings=True, rope_theta=10000.0, new_decoder_architecture=False, multi_query=True,
        num_ln_in_parallel_attn=None), {}, dict(alibi=(False,), parallel_attn=(True,))),
    "gpt_neox": Family("GPTNeoXForCausalLM", PythiaConfig, _without(_keys(
        50432, 6144, 24576, 44, 64, None, 2048, **_LN, hidden_act="gelu", use_parallel_residual=True,
        rotary_emb_base=10000.0, rotary_pct=0.25), "num_key_value_heads", "head_dim", "rope_theta"), {},
        dict(attention_bias=(True,))),
    "stablelm": Family("StableLmForCausalLM", LlamaConfig, _without(_keys(
        50304, 2560, 6912, 32, 32, 32, 4096, **_LN, use_qkv_bias=False, use_parallel_residual=False,
        partial_rotary_factor=0.25), "head_dim"), dict(norm_class_name="LayerNorm")),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", DeepseekConfig, _without(_keys(
        102400, 4096, 11008, 32, 32, None, 2048, **_RMS, attention_bias=False, **_LATENT, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=None, moe_intermediate_size=1407, n_group=None, topk_group=None,
        topk_method="greedy", first_k_dense_replace=0, routed_scaling_factor=1.0), "head_dim"),
        dict(router_scoring="softmax", n_topk_scores_per_group=1, norm_topk_prob=False), dict(
            mlp_bias=(False,), scoring_func=("softmax",), norm_topk_prob=(False,)),
        dict(scoring_func="softmax", moe_layer_freq=1)),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", DeepseekConfig, _without(_keys(
        129280, 7168, 18432, 61, 128, 128, 4096, **_RMS, attention_bias=False, **_LATENT, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8, topk_group=4,
        first_k_dense_replace=3, routed_scaling_factor=2.5, norm_topk_prob=True, rope_interleave=True), "head_dim"),
        {}, dict(scoring_func=("sigmoid",), topk_method=("noaux_tc",)), dict(
            scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1,
            num_nextn_predict_layers=0)),  # what predicts more tokens at once is not part of our model
    "granite": Family("GraniteForCausalLM", LlamaConfig, _keys(
        32000, 4096, 11008, 32, 32, None, 2048, **_RMS, **_BIASES, **_MULTIPLIERS)),
    "smollm3": Family("SmolLM3ForCausalLM", LlamaConfig, _keys(
        128256, 2048, 11008, 36, 16, 4, 32768, **_RMS, **_BIASES, **_TIED, rope_theta=2e6, use_sliding_window=False,
        sliding_window=None, layer_types=None, no_rope_layers=None, no_rope_layer_interval=4)),
    "seed_oss": Family("SeedOssForCausalLM", LlamaConfig, _keys(
        155136, 4096, 27648, 64, 80, 8, 524288, **_RMS, attention_bias=True, attention_out_bias=False, mlp_bias=False,
        head_dim=128)),
    "ernie4_5": Family("Ernie4_5ForCausalLM", LlamaConfig, _keys(
        103424, 1024, 3072, 18, 16, 2, 131072, **_RMS_5, **_TIED, rope_theta=500000.0, use_bias=False, head_dim=128),
        dict(rope_interleave=True)),
    "glm4": Family("Glm4ForCausalLM", LlamaConfig, _keys(
        151552, 4096, 13696, 40, 32, 2, 131072, rms_norm_eps=1.5625e-07, attention_bias=True, head_dim=128,
        partial_rotary_factor=0.5), dict(rope_interleave=True, post_attention_norm=True, post_mlp_norm=True)),
}
FIELDS = {
    "vocab_size": "padded_vocab_size", "hidden_size": "n_embd", "intermediate_size": "intermediate_size",
    "ffn_hidden_size": "intermediate_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "num_key_value_heads": "n_query_groups", "max_position_embeddings": "block_size", "head_dim": "head_size",
    "rms_norm_eps": "norm_eps", "layer_norm_eps": "norm_eps", "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tie_embeddings", "final_logit_softcapping": "final_logit_softcapping",
    "attn_logit_softcapping": "attention_logit_softcapping", "query_pre_attn_scalar": "attention_scores_scalar",
    "bias": "bias", "use_bias": "bias", "use_qkv_bias": "attn_bias", "use_parallel_residual": "parallel_residual",
    "num_local_experts": "n_expert", "num_experts": "n_expert", "n_routed_experts": "n_expert",
    "num_experts_per_tok": "n_expert_per_token", "n_shared_experts": "n_shared_expert",
    "moe_intermediate_size": "moe_intermediate_size", "first_k_dense_replace": "first_k_dense_replace",
    "routed_scaling_factor": "routed_scaling_factor", "rope_interleave": "rope_interleave",
    "embedding_multiplier": "embedding_multiplier", "residual_multiplier": "residual_multiplier",
    "logits_scaling": "logits_scaling",
}
NEUTRAL_AT_ONE = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
ALIASES = {"gemma3": "gemma3_text"}
OF_ALL_PARTS = ("tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization_config")  # stand beside the parts of a multimodal model
NEVER = dict(  # refused whatever the model type
    use_bidirectional_attention=(False,), is_encoder_decoder=(False,), add_cross_attention=(False,), clip_qkv=(),
    qk_layernorm=(False,), moe_layer_freq=(1,), per_layer_config=({}, []))
KINDS = dict(layer_types=list, no_rope_layers=list, rope_local_base_freq=float, final_logit_softcapping=float,
    attn_logit_softcapping=float)  # of keys whose default is null; others are whole numbers
NULL = {"sliding_window", "num_key_value_heads", "final_logit_softcapping", "attn_logit_softcapping", "q_lora_rank",
    "n_group", "topk_group"}  # keys whose null is not just another word for the default
OTHER_NAMES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
LIMITS = dict(n_layer=2**12, n_embd=2**20, n_head=2**14, head_size=2**14, padded_vocab_size=2**24, block_size=2**31,
    intermediate_size=2**24, moe_intermediate_size=2**24, n_expert=2**14)
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_pytorch_tanh": "tanh"}
ROPE_KEYS = dict(default=(), linear=("factor",), llama3=("factor", "low_freq_factor", "high_freq_factor"), yarn=(
    "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "attention_factor"),
    longrope=("factor", "short_factor", "long_factor", "attention_factor"))
# fmt: on
