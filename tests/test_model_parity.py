"""The maths of every architectural feature against transformers: same weights, same logits, with and without KV cache.

One row a feature. The weights are those of the transformers model, all drawn at random (norms and biases too), and
copied by the name tables below. transformers computes the whole text at once; ours also takes it in pieces.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.config import (
    Config,
    DeepseekConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OLMo2Config,
    OLMoConfig,
    PhiConfig,
    PythiaConfig,
    Qwen3Config,
    QwenConfig,
)
from litgpt.model import GPT

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the largest logit, in float32
B, T = 2, 24

# ---- names: ours -> theirs. A tuple is stacked; `name:0` and `name:1` are the halves of a fused tensor.

_LLAMA_MLP = {"mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
_EXPERTS = {
    "mlp.gate": "mlp.gate",
    "mlp.experts.fc_1": "mlp.experts.gate_up_proj:0",
    "mlp.experts.fc_2": "mlp.experts.gate_up_proj:1",
    "mlp.experts.proj": "mlp.experts.down_proj",
}
_QK_NORM = {"attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm"}
_NEOX_MLP = {"mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"}

LLAMA = {
    "layers": "model.layers",
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": "self_attn.o_proj",
    **_QK_NORM,
    **_LLAMA_MLP,
}
MOE = LLAMA | _EXPERTS
GEMMA_2 = LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "norm_2": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
OLMO_2 = LLAMA | {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
PHI = LLAMA | {
    "transformer.ln_f": "model.final_layernorm",
    "attn.proj": "self_attn.dense",
    "mlp.fc": "mlp.fc1",
    "mlp.proj": "mlp.fc2",
}
PHI_3 = LLAMA | {"attn.qkv": "self_attn.qkv_proj", "mlp.fc_1": "mlp.gate_up_proj:0", "mlp.fc_2": "mlp.gate_up_proj:1"}
# Their query_key_value is stored group by group, as our checkpoints of old: it goes through that door.
NEOX = {
    "layers": "gpt_neox.layers",
    "transformer.wte": "gpt_neox.embed_in",
    "transformer.ln_f": "gpt_neox.final_layer_norm",
    "lm_head": "lm_head",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.attn": "attention.query_key_value",
    "attn.proj": "attention.dense",
    **_NEOX_MLP,
}
FALCON = {
    "layers": "transformer.h",
    "transformer.wte": "transformer.word_embeddings",
    "transformer.ln_f": "transformer.ln_f",
    "lm_head": "lm_head",
    "norm_1": "input_layernorm",
    "attn.attn": "self_attention.query_key_value",
    "attn.proj": "self_attention.dense",
    **_NEOX_MLP,
}
FALCON_NEW = FALCON | {"norm_1": "ln_attn", "norm_2": "ln_mlp"}
DEEPSEEK = MOE | {
    "attn.q_proj": "self_attn.q_proj",
    "attn.q_a_proj": "self_attn.q_a_proj",
    "attn.q_a_norm": "self_attn.q_a_layernorm",
    "attn.q_b_proj": "self_attn.q_b_proj",
    "attn.kv_a_proj_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn.kv_a_norm": "self_attn.kv_a_layernorm",
    "attn.kv_b_proj": "self_attn.kv_b_proj",
    **{f"mlp.shared_experts.{ours[4:]}": f"mlp.shared_experts.{theirs[4:]}" for ours, theirs in _LLAMA_MLP.items()},
}

# ---- rows

OUR_SIZES: dict[str, Any] = dict(n_layer=3, n_embd=32, n_head=4, vocab_size=61, padding_multiple=1, block_size=T)
THEIR_SIZES: dict[str, Any] = dict(
    num_hidden_layers=3, hidden_size=32, num_attention_heads=4, vocab_size=61, max_position_embeddings=T,
    bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation="eager",
)  # fmt: skip


@dataclass
class Row:
    """One feature: their model class and config fields, our config class and fields, and the names of the weights."""

    theirs: str
    their_fields: dict[str, Any]
    ours: type[Config]
    fields: dict[str, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=lambda: LLAMA)

    def config(self) -> Config:
        return self.ours(**OUR_SIZES | self.fields)


_GQA, _OUR_GQA = dict(intermediate_size=48, num_key_value_heads=2), dict(intermediate_size=48, n_query_groups=2)
_LLAMA = _GQA | dict(rms_norm_eps=1e-5)
_LLAMA_3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)  # with base 100: one pair fast, one between
_YARN = dict(factor=4.0, beta_fast=8.0, beta_slow=1.0)  # with base 10: all pairs between
_LATENT_YARN = _YARN | dict(mscale=0.7, mscale_all_dim=1.4)
_LONG = dict(short_factor=[1.0, 1.5, 2.0, 4.0], long_factor=[1.0, 3.0, 6.0, 9.0], factor=3.0)
_LONG_3 = dict(short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 6.0], factor=3.0)
_GEMMA, _OUR_GEMMA = _GQA | dict(head_dim=12), _OUR_GQA | dict(head_size=12)
_GEMMA_2 = dict(sliding_window=7, query_pre_attn_scalar=20, attn_logit_softcapping=2.0, final_logit_softcapping=0.5)
_OUR_GEMMA_2 = dict(
    sliding_window_size=7, attention_scores_scalar=20, attention_logit_softcapping=2.0, final_logit_softcapping=0.5
)
_GEMMA_3 = dict(
    sliding_window=7, query_pre_attn_scalar=20, layer_types=["sliding_attention", "full_attention"] * 2,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    },
)  # fmt: skip
_OUR_GEMMA_3 = dict(
    sliding_window_size=7, attention_scores_scalar=20, rope_base=5000, rope_local_base_freq=100.0,
    sliding_window_indices=[1, 0, 1, 0], rope_indices=[1, 0, 1, 0], rope_adjustments=dict(factor=8.0),
)  # fmt: skip
_FOUR, _OUR_FOUR = dict(num_hidden_layers=4), dict(n_layer=4)
_QWEN_3_MOE = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, norm_topk_prob=True)
_OUR_QWEN_3_MOE = dict(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=3, moe_intermediate_size=20)
_LATENT: dict[str, Any] = dict(q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=6, qk_nope_head_dim=8, v_head_dim=14)
_DEEPSEEK: dict[str, Any] = _LATENT | dict(
    intermediate_size=48, num_key_value_heads=4, moe_intermediate_size=20, n_shared_experts=2, n_routed_experts=8,
    n_group=4, topk_group=2, num_experts_per_tok=3, first_k_dense_replace=1, routed_scaling_factor=2.5,
    num_mtp_layers=0,
)  # fmt: skip
_OUR_DEEPSEEK: dict[str, Any] = dict(
    intermediate_size=48, moe_intermediate_size=20, n_shared_expert=2, n_expert=8, n_expert_groups=4, n_topk_groups=2,
    n_expert_per_token=3, first_k_dense_replace=1, routed_scaling_factor=2.5, latent_attention=_LATENT,
)  # fmt: skip


def rope(kind: str = "default", theta: float = 10000.0, original: int | None = None, **values: Any) -> dict[str, Any]:
    """Their fields for a rotary embedding; Phi-3 reads the original length beside the other values."""
    fields: dict[str, Any] = {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}
    if original is not None:
        fields["rope_parameters"]["original_max_position_embeddings"] = original
        fields |= {"original_max_position_embeddings": original} if kind == "longrope" else {}
    return fields


def our_rope(base: int = 10000, original: int | None = None, **values: Any) -> dict[str, Any]:
    return dict(rope_base=base, rope_adjustments=values | ({"original_max_seq_len": original} if original else {}))


ROWS = {
    "neox, partial rotary": Row("GPTNeoX", dict(intermediate_size=128), PythiaConfig, names=NEOX),
    "neox, sequential": Row(
        "GPTNeoX", dict(intermediate_size=128, use_parallel_residual=False) | rope(partial_rotary_factor=0.5),
        PythiaConfig, dict(parallel_residual=False, rotary_percentage=0.5), NEOX,
    ),
    "llama": Row("Llama", _LLAMA, LlamaConfig, _OUR_GQA),
    "llama 3.1 rope": Row(
        "Llama", _LLAMA | rope("llama3", 100.0, 32, **_LLAMA_3),
        LlamaConfig, _OUR_GQA | our_rope(100, 32, **_LLAMA_3),
    ),
    "linear rope": Row(
        "Llama", _LLAMA | rope("linear", factor=4.0), LlamaConfig, _OUR_GQA | our_rope(factor=4.0)
    ),
    "yarn": Row("Llama", _LLAMA | rope("yarn", 10.0, 64, **_YARN), LlamaConfig, _OUR_GQA | our_rope(10, 64, **_YARN)),
    "yarn, not truncated": Row(
        "Llama", _LLAMA | rope("yarn", 10.0, 64, **_YARN, truncate=False, attention_factor=1.3),
        LlamaConfig, _OUR_GQA | our_rope(10, 64, **_YARN, truncate=False, attention_factor=1.3),
    ),
    "falcon, multi-query": Row(
        "Falcon", dict(multi_query=True), FalconConfig, dict(n_query_groups=1, shared_attention_norm=True), FALCON
    ),
    "falcon, grouped": Row(
        "Falcon", dict(new_decoder_architecture=True, num_kv_heads=2), FalconConfig, dict(n_query_groups=2), FALCON_NEW
    ),
    "phi": Row("Phi", dict(intermediate_size=128), PhiConfig, names=PHI),
    "phi 3": Row("Phi3", _LLAMA, LlamaConfig, _OUR_GQA, PHI_3),
    "longrope, short text": Row(
        "Phi3", _LLAMA | rope("longrope", 100.0, T, **_LONG), LlamaConfig, _OUR_GQA | our_rope(100, T, **_LONG), PHI_3
    ),
    "longrope, long text": Row(
        "Phi3", _LLAMA | rope("longrope", 100.0, 8, **_LONG), LlamaConfig, _OUR_GQA | our_rope(100, 8, **_LONG), PHI_3
    ),
    "longrope, partial rotary, tied": Row(
        "Phi3",
        _LLAMA | dict(tie_word_embeddings=True) | rope("longrope", 100.0, 8, **_LONG_3, partial_rotary_factor=0.75),
        LlamaConfig,
        _OUR_GQA | dict(tie_embeddings=True, rotary_percentage=0.75) | our_rope(100, 8, **_LONG_3),
        PHI_3,
    ),
    "mistral, window": Row(
        "Mistral", _LLAMA | dict(sliding_window=7) | rope(theta=1e6),
        MistralConfig, _OUR_GQA | dict(sliding_window_size=7),
    ),
    "mixtral": Row(
        "Mixtral", _LLAMA | dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
        MixtralConfig, _OUR_GQA, MOE,
    ),
    "gemma": Row("Gemma", _GEMMA | dict(num_key_value_heads=1), GemmaConfig, _OUR_GEMMA | dict(n_query_groups=1)),
    "gemma 2": Row(
        "Gemma2", _GEMMA | _FOUR | _GEMMA_2, Gemma2Config, _OUR_GEMMA | _OUR_FOUR | _OUR_GEMMA_2, GEMMA_2
    ),
    "gemma 3": Row(
        "Gemma3", _GEMMA | _FOUR | _GEMMA_3, Gemma3Config, _OUR_GEMMA | _OUR_FOUR | _OUR_GEMMA_3, GEMMA_2
    ),
    "qwen 2.5": Row("Qwen2", _GQA | rope(theta=1e6), QwenConfig, _OUR_GQA),
    "qwen 3": Row("Qwen3", _GEMMA | rope(theta=1e6), Qwen3Config, _OUR_GEMMA),
    "qwen 3 moe": Row(
        "Qwen3Moe", _GEMMA | _QWEN_3_MOE | rope(theta=1e6), Qwen3Config, _OUR_GEMMA | _OUR_QWEN_3_MOE, MOE
    ),
    "olmo": Row("Olmo", _GQA, OLMoConfig, _OUR_GQA),
    "olmo 2": Row("Olmo2", _GQA | dict(rms_norm_eps=1e-6) | rope(theta=5e5), OLMo2Config, _OUR_GQA, OLMO_2),
    "deepseek v3": Row("DeepseekV3", _DEEPSEEK, DeepseekConfig, _OUR_DEEPSEEK, DEEPSEEK),
    "deepseek v3, yarn": Row(
        "DeepseekV3", _DEEPSEEK | rope("yarn", 10.0, 64, **_LATENT_YARN),
        DeepseekConfig, _OUR_DEEPSEEK | our_rope(10, 64, **_LATENT_YARN), DEEPSEEK,
    ),
    "deepseek v3, plain queries, halves": Row(
        "DeepseekV3", _DEEPSEEK | dict(q_lora_rank=None, rope_interleave=False, norm_topk_prob=False),
        DeepseekConfig,
        _OUR_DEEPSEEK
        | dict(latent_attention=_LATENT | dict(q_lora_rank=None), rope_interleave=False, norm_topk_prob=False),
        DEEPSEEK,
    ),
}  # fmt: skip


# ---- building the two sides


def build_theirs(row: Row) -> torch.nn.Module:
    """Their model; each weight is drawn so that leaving it out or taking another one shows in the logits."""
    model_class = getattr(transformers, f"{row.theirs}ForCausalLM")
    model = model_class(model_class.config_class(**THEIR_SIZES | row.their_fields)).eval()
    assert model.config._attn_implementation == "eager"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or name.endswith("embed_scale"):
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                # small embeddings, so that the epsilon of the norms shows
                weight.copy_(noise * (0.05 if "embed" in name else 1.3 / weight.shape[-1] ** 0.5))
            else:
                is_plain_norm = name.endswith("weight") and "Gemma" not in row.theirs
                weight.copy_(noise * 0.3 + is_plain_norm)
    return model


def translate(key: str, names: Mapping[str, Any]) -> tuple[str, list[tuple[str, int | None, int | None]]]:
    """Our key under which to load, and the tensors that make it: (their name, number of the expert, half)."""
    layer, part, kind = re.fullmatch(r"(?:transformer\.h\.(\d+)\.)?(.+)\.(\w+)", key).groups()
    if part == "attn.qkv" and "attn.attn" in names:
        key, part = key.replace("attn.qkv", "attn.attn"), "attn.attn"
    expert = re.search(r"experts\.(\d+)\.", part)
    part = re.sub(r"experts\.\d+\.", "experts.", part)
    sources = []
    for name in [names[part]] if isinstance(names[part], str) else names[part]:
        name, _, half = name.partition(":")
        name = name if layer is None else f"{names['layers']}.{layer}.{name}"
        name = name if expert else f"{name}.{kind}"  # the experts of a layer are one parameter
        sources.append((name, int(expert[1]) if expert else None, int(half) if half else None))
    return key, sources


def build_ours(row: Row, theirs: torch.nn.Module) -> GPT:
    """Our model with all of their weights."""
    model, weights = GPT(row.config()).eval(), theirs.state_dict()
    state, used = {}, set()
    for key in model.state_dict():
        key, sources = translate(key, row.names)
        parts = []
        for name, expert, half in sources:
            used.add(name)
            weight = weights[name] if expert is None else weights[name][expert]
            parts.append(weight if half is None else weight.chunk(2)[half])
        state[key] = torch.cat(parts)
    assert used == weights.keys()
    model.load_state_dict(state)
    return model


@cache
def sides(name: str) -> tuple[GPT, torch.nn.Module, Tensor]:
    """Our model, theirs, and ids `(B, T)`."""
    theirs = build_theirs(ROWS[name])
    idx = torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(2))
    return build_ours(ROWS[name], theirs), theirs, idx


def assert_same(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()


# ---- the tests


@torch.inference_mode()
@pytest.mark.parametrize("name", ROWS)
def test_logits_equal_those_of_transformers(name):
    model, theirs, idx = sides(name)
    assert_same(model(idx), theirs(idx, use_cache=False).logits)


PLANS = {
    "at once": [T],
    "prefill and tokens": [10] + [1] * (T - 10),
    "uneven chunks": [3, 9, 1, 8, 2, 1],
    "tokens": [1] * T,
}
"""How many tokens a call gets; windows are 7 long, and chunks shorter and longer than that."""


@torch.inference_mode()
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ROWS)
def test_logits_with_kv_cache_equal_those_of_transformers(name, plan):
    model, theirs, idx = sides(name)
    expected = theirs(idx, use_cache=False).logits
    for says_length in (True, False):  # both ways to say the positions
        model.set_kv_cache(batch_size=B, max_seq_length=T)
        logits, start = [], 0
        for stop in torch.tensor(PLANS[plan]).cumsum(0).tolist():
            pos = torch.arange(start, stop)
            if says_length:
                logits.append(model(idx[:, start:stop], pos, input_pos_maxp1=stop))
            else:
                logits.append(model(idx[:, start:stop], pos.expand(B, -1)))
            start = stop
        assert_same(torch.cat(logits, dim=1), expected)
    model.clear_kv_cache()


@torch.inference_mode()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name", ["neox, partial rotary", "llama", "mistral, window", "gemma 2", "gemma 3", "qwen 3 moe", "deepseek v3"]
)
def test_logits_of_padded_rows_equal_those_of_transformers(name, side):
    model, theirs, idx = sides(name)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, : T // 3] = False
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(idx, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
    assert_same(model(idx, mask=mask)[mask], expected[mask])
