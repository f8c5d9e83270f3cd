"""Tiny Hugging Face models beside our configs, written by hand so that they are an independent witness."""

from pathlib import Path

import torch

from litgpt.config import Config

SIZES = dict(n_layer=2, n_embd=32, n_head=4, padded_vocab_size=64, vocab_size=64, block_size=64)
LATENT = dict(q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6)
_LLAMA = dict(
    norm_class_name="RMSNorm", parallel_residual=False, rotary_percentage=1.0, bias=False, mlp_class_name="LLaMAMLP",
    intermediate_size=48, n_query_groups=2, **SIZES,
)  # fmt: skip
_GEMMA = _LLAMA | dict(mlp_class_name="GemmaMLP", norm_unit_offset=True, tie_embeddings=True, head_size=16)
_NORMS_AROUND = dict(post_attention_norm=True, post_mlp_norm=True)
_MOE = dict(mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2)
_NEOX = dict(mlp_class_name="GptNeoxMLP", **SIZES)
_FALCON = _NEOX | dict(bias=False, rotary_percentage=1.0, tie_embeddings=True)
_OLMO_2 = _LLAMA | _NORMS_AROUND | dict(norm_qk=True, norm_qk_type="olmo2", norm_1=False, norm_2=False)
_DEEPSEEK = _LLAMA | _MOE | dict(
    n_query_groups=4, latent_attention=LATENT, n_expert_groups=2, n_topk_groups=1, n_shared_expert=2,
    first_k_dense_replace=1, moe_intermediate_size=24, rope_interleave=True, n_layer=3,
)  # fmt: skip

FAMILIES: dict[str, dict] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | dict(sliding_window_size=8),
    "mixtral": _LLAMA | _MOE,
    "gemma": _GEMMA | dict(n_query_groups=1),
    "gemma2": _GEMMA | _NORMS_AROUND | dict(attention_logit_softcapping=50.0),
    "gemma3_text": _GEMMA | _NORMS_AROUND | dict(norm_qk=True),
    "qwen2": _LLAMA | dict(attn_bias=True),
    "qwen3": _LLAMA | dict(norm_qk=True, head_size=16),
    "qwen3_moe": _LLAMA | _MOE | dict(norm_qk=True, head_size=16, moe_intermediate_size=24),
    "phi": _NEOX | dict(shared_attention_norm=True, lm_head_bias=True),
    "phi3": _LLAMA | dict(rotary_percentage=0.75),
    "olmo": _LLAMA | dict(norm_class_name="LayerNorm", norm_affine=False),
    "olmo2": _OLMO_2,
    "olmo3": _OLMO_2 | dict(sliding_window_size=8),
    "gpt_neox": _NEOX,
    "falcon": _FALCON | dict(n_query_groups=2),
    "falcon, one key head": _FALCON | dict(n_query_groups=1, shared_attention_norm=True),
    "stablelm": _LLAMA | dict(norm_class_name="LayerNorm"),
    "deepseek_v2": _DEEPSEEK | dict(router_scoring="softmax"),
    "deepseek_v2, whole queries": _DEEPSEEK | dict(
        router_scoring="softmax", latent_attention={k: v for k, v in LATENT.items() if k != "q_lora_rank"}),
    "deepseek_v3": _DEEPSEEK,
    "granite": _LLAMA | dict(logits_scaling=8.0),
    "smollm3": _LLAMA | dict(nope_indices=[0, 1], tie_embeddings=True),
    "seed_oss": _LLAMA | dict(attn_bias=True, head_size=16),
    "ernie4_5": _LLAMA | dict(rope_interleave=True, tie_embeddings=True),
    "glm4": _LLAMA | _NORMS_AROUND | dict(attn_bias=True, rope_interleave=True, rotary_percentage=0.5),
}  # fmt: skip
"""A config of each model type, by the type and, after a comma, what is special."""


def config_of(family: str, **overrides: object) -> Config:
    """The tiny config of a row of `FAMILIES`."""
    return Config(**FAMILIES[family] | overrides)


def build_hf_model(model_type: str, config: Config) -> torch.nn.Module:
    """A randomly initialised model of transformers with the structure of `config`; its maths may differ in details."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(
        hidden_size=config.n_embd, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        vocab_size=config.padded_vocab_size, intermediate_size=config.intermediate_size,
        tie_word_embeddings=config.tie_embeddings, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    has_own_head_dim = config.head_size * config.n_head != config.n_embd
    if model_type == "falcon":
        is_old = config.shared_attention_norm
        values |= dict(new_decoder_architecture=not is_old, multi_query=is_old, parallel_attn=True, alibi=False)
        values |= dict(num_kv_heads=config.n_query_groups, bias=config.bias)
    elif model_type == "gpt_neox":
        values |= dict(attention_bias=config.bias)
    else:
        values |= dict(num_key_value_heads=config.n_query_groups)
    if has_own_head_dim or model_type in ("gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe", "ernie4_5", "glm4"):
        values |= dict(head_dim=config.head_size)
    if model_type in ("seed_oss", "glm4"):
        values |= dict(attention_bias=config.attn_bias, attention_out_bias=False)
    if config.n_expert:
        experts = dict(mixtral="num_local_experts", qwen3_moe="num_experts").get(model_type, "n_routed_experts")
        values |= {experts: config.n_expert, "num_experts_per_tok": config.n_expert_per_token}
        values |= dict(moe_intermediate_size=config.moe_intermediate_size or config.intermediate_size)
    if config.latent_attention:
        values |= dict(q_lora_rank=None) | config.latent_attention
        values |= dict(first_k_dense_replace=config.first_k_dense_replace, n_shared_experts=config.n_shared_expert)
        values |= dict(n_group=config.n_expert_groups, topk_group=config.n_topk_groups)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))


def save_hf_model(model_type: str, config: Config, folder: Path) -> Path:
    """The file that `save_pretrained` writes for such a model."""
    build_hf_model(model_type, config).save_pretrained(folder)
    return folder / "model.safetensors"
