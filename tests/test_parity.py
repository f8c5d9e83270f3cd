"""Every family and variant against transformers: a tiny random model, through a Hugging Face folder to ours and back.

One row a family or variant. `like` names a published config with the same features; together the rows have the features
of all of them. transformers computes a text at once; ours also in pieces, with a KV cache.
"""

import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from litgpt.checkpoint.adapter import StateDictAdapter, find_model_type
from litgpt.checkpoint.hf_config import config_from_hf, config_to_hf, read_hf_config
from litgpt.checkpoint.tensors import LazyTensor, open_weights, write_safetensors
from litgpt.config import Config, name_to_config
from litgpt.model import GPT, layer_window

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the largest logit, in float32
B, T = 2, 24
W = 7  # windows are shorter than a text

# ---- rows


@dataclass(frozen=True)
class Row:
    """A model of transformers: its type, in what it differs from `SIZES`, and a published config with its features."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    like: str | None = None


SIZES: dict[str, Any] = dict(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=61, max_position_embeddings=T,
    intermediate_size=48, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def rope(kind: str = "default", theta: float = 10000.0, original: int | None = None, **values: Any) -> dict[str, Any]:
    """Their fields for a rotary embedding."""
    params = {"rope_type": kind, "rope_theta": theta, **values}
    return {"rope_parameters": params | ({"original_max_position_embeddings": original} if original else {})}


def long_rope(original: int, **values: Any) -> dict[str, Any]:
    """As `rope`; Phi-3 reads the original length beside the other values."""
    return rope("longrope", 100.0, original, **values) | {"original_max_position_embeddings": original}


def by_layer(full: dict[str, Any], local_theta: float) -> dict[str, Any]:
    """As `rope`, with another base in windowed layers."""
    sliding = {"rope_type": "default", "rope_theta": local_theta}
    return {"rope_parameters": {"full_attention": full["rope_parameters"], "sliding_attention": sliding}}


MHA, GQA, MQA = dict(num_key_value_heads=4), dict(num_key_value_heads=2), dict(num_key_value_heads=1)
TIED, WINDOW, FOUR = dict(tie_word_embeddings=True), dict(sliding_window=W), dict(num_hidden_layers=4)
NEOX, FALCON = dict(intermediate_size=128), dict(ffn_hidden_size=96, intermediate_size=None)
LLAMA_3 = rope("llama3", 100.0, 8, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)  # a pair fast, one between
YARN = dict(factor=4.0, beta_fast=8.0, beta_slow=1.0)  # with base 10: all pairs between
LATENT_YARN = rope("yarn", 10.0, 8, **YARN, mscale=0.7, mscale_all_dim=1.4)
LONG = dict(short_factor=[1.0, 1.5, 2.0, 4.0], long_factor=[1.0, 3.0, 6.0, 9.0])
LONG_3 = dict(short_factor=[1.0, 1.5, 2.0], long_factor=[1.0, 3.0, 6.0])
GEMMA = dict(head_dim=12)
GEMMA_2 = GEMMA | GQA | WINDOW | dict(attn_logit_softcapping=2.0, final_logit_softcapping=0.5, num_hidden_layers=4)
GEMMA_3 = GEMMA | GQA | WINDOW | FOUR | dict(query_pre_attn_scalar=12, sliding_window_pattern=3)
QWEN = GQA | dict(max_window_layers=2)
LAST_TWO = WINDOW | FOUR | dict(use_sliding_window=True, max_window_layers=2)
EXPERTS = dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=20, head_dim=12)
LATENT = dict(q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=6, qk_nope_head_dim=8, v_head_dim=14)
DEEPSEEK = LATENT | MHA | dict(
    moe_intermediate_size=20, n_shared_experts=2, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3,
    first_k_dense_replace=1, routed_scaling_factor=2.5)  # fmt: skip
DEEPSEEK_3 = DEEPSEEK | dict(num_mtp_layers=0)
MULTIPLIERS = dict(embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=2.5, attention_multiplier=0.3)

ROWS = {
    "stablelm-alpha": Row("gpt_neox", NEOX, "stablelm-base-alpha-3b"),
    "stablecode-alpha": Row(
        "gpt_neox", NEOX | rope(theta=500.0, partial_rotary_factor=0.5), "stablecode-instruct-alpha-3b"),
    "pythia": Row("gpt_neox", NEOX | dict(layer_norm_eps=1e-3), "pythia-160m"),
    "neox, sequential, tanh gelu": Row(
        "gpt_neox", NEOX | dict(use_parallel_residual=False, hidden_act="gelu_pytorch_tanh")),
    "neox, tied, linear rope": Row(
        "gpt_neox", NEOX | TIED | rope("linear", partial_rotary_factor=1.0, factor=4.0)),
    "stablelm-3b": Row("stablelm", MHA, "stablelm-3b-4e1t"),
    "stablelm, parallel, grouped, qkv bias": Row("stablelm", GQA | dict(use_parallel_residual=True, use_qkv_bias=True)),
    "falcon": Row("falcon", FALCON | dict(multi_query=True), "falcon-7b"),
    "falcon-40b": Row("falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2), "falcon-40b"),
    "falcon, grouped, one norm": Row(
        "falcon", FALCON | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)),
    "falcon, multi-head, bias": Row("falcon", FALCON | dict(multi_query=False, bias=True)),
    "falcon3": Row("llama", GQA | rope(theta=1000042.0), "Falcon3-1B-Base"),
    "open-llama": Row("llama", MHA, "open_llama_3b"),
    "llama-2": Row("llama", MHA | dict(rms_norm_eps=1e-5), "Llama-2-7b-hf"),
    "llama-2, 32k": Row("llama", MHA | rope("linear", factor=8.0), "LLaMA-2-7B-32K"),
    "llama-2-70b": Row("llama", GQA, "Llama-2-70b-hf"),
    "llama-3": Row("llama", GQA | rope(theta=500000.0), "Llama-3-8B"),
    "llama-3.1": Row("llama", GQA | LLAMA_3, "Llama-3.1-8B"),
    "llama-3.2": Row("llama", GQA | LLAMA_3 | TIED, "Llama-3.2-1B"),
    "llama-3.3": Row("llama", GQA | LLAMA_3, "Llama-3.3-70B-Instruct"),
    "llama-nemotron": Row("llama", GQA | LLAMA_3, "Llama-3.1-Nemotron-70B-Instruct-HF"),
    "llama, biases everywhere": Row("llama", GQA | dict(attention_bias=True, mlp_bias=True)),
    "llama, wide heads, multi-query": Row("llama", MQA | dict(head_dim=12)),
    "llama, gelu": Row("llama", GQA | dict(hidden_act="gelu")),
    "llama, yarn": Row("llama", GQA | rope("yarn", 10.0, 8, **YARN)),
    "llama, yarn, not truncated": Row(
        "llama", GQA | rope("yarn", 10.0, 8, **YARN, truncate=False, attention_factor=1.3)),
    "llama, longrope": Row("llama", GQA | rope("longrope", 100.0, 8, **LONG, factor=3.0)),
    "olmo": Row("olmo", MHA, "OLMo-7B-hf"),
    "olmo, tied": Row("olmo", GQA | TIED, None),
    "olmo-1b": Row("olmo", MHA | TIED, "OLMo-1B-hf"),
    "olmo-2": Row("olmo2", MHA | rope(theta=500000.0), "OLMo-2-1124-7B"),
    "olmo-2, grouped": Row("olmo2", GQA),
    "olmo-3": Row("olmo3", GQA | WINDOW | FOUR | by_layer(rope("yarn", 500.0, 8, **YARN, attention_factor=1.2), 500.0)),
    "olmo-3, one rope": Row("olmo3", MHA | WINDOW | FOUR),
    "gemma": Row("gemma", GEMMA | MQA, "Gemma-2b"),
    "gemma-7b": Row("gemma", GEMMA | MHA, "Gemma-7b"),
    "codegemma": Row("gemma", GEMMA | MHA, "CodeGemma-7b-it"),
    "gemma-2": Row("gemma2", GEMMA_2 | dict(query_pre_attn_scalar=12), "Gemma-2-2b"),
    "gemma-2-27b": Row("gemma2", GEMMA_2 | dict(query_pre_attn_scalar=20), "Gemma-2-27b"),
    "gemma-3-1b": Row("gemma3_text", GEMMA_3 | MQA | by_layer(rope(theta=5000.0), 100.0), "Gemma-3-1b-it"),
    "gemma-3": Row("gemma3_text", GEMMA_3 | by_layer(rope("linear", 5000.0, factor=8.0), 100.0), "Gemma-3-4b-it"),
    "gemma-3-27b": Row(
        "gemma3_text", GEMMA_3 | dict(query_pre_attn_scalar=20) | by_layer(rope("linear", 5000.0, factor=8.0), 100.0),
        "Gemma-3-27b-it"),
    "freewilly2": Row("llama", GQA, "FreeWilly2"),
    "code-llama": Row("llama", MHA | rope(theta=1000000.0), "CodeLlama-7b-hf"),
    "platypus": Row("llama", MHA, "Platypus2-7B"),
    "tiny-llama": Row("llama", GQA, "tiny-llama-1.1b"),
    "micro-llama": Row("llama", GQA, "micro-llama-300M"),
    "salamandra": Row("llama", MHA, "salamandra-2b"),
    "smollm2": Row("llama", GQA | TIED | rope(theta=100000.0), "SmolLM2-135M"),
    "smollm2-1.7b": Row("llama", MHA | TIED | rope(theta=130000.0), "SmolLM2-1.7B"),
    "r1-distill-llama": Row("llama", GQA | LLAMA_3, "R1-Distill-Llama-8B"),
    "phi-1/2": Row("phi", NEOX | MHA, "phi-1_5"),
    "phi, grouped": Row("phi", NEOX | GQA | rope(partial_rotary_factor=0.75)),
    "phi-3": Row("phi3", MHA | WINDOW, "Phi-3-mini-4k-instruct"),
    "phi-3.5": Row("phi3", MHA, "Phi-3.5-mini-instruct"),
    "phi-3, longrope, short text": Row("phi3", MHA | long_rope(T, **LONG)),
    "phi-3, longrope, long text": Row("phi3", MHA | long_rope(8, **LONG)),
    "phi-4": Row("phi3", GQA | rope(theta=250000.0), "phi-4"),
    "phi-4-mini": Row(
        "phi3", GQA | TIED | dict(sliding_window=16) | rope(partial_rotary_factor=0.75), "Phi-4-mini-instruct"),
    "phi-4-mini, longrope": Row("phi3", GQA | TIED | long_rope(8, **LONG_3, partial_rotary_factor=0.75)),
    "mistral": Row("mistral", GQA | WINDOW, "Mistral-7B-v0.1"),
    "mistral-v0.3": Row("mistral", GQA | dict(sliding_window=None) | rope(theta=1e6), "Mistral-7B-v0.3"),
    "mixtral": Row("mixtral", GQA | dict(num_local_experts=8, num_experts_per_tok=2), "Mixtral-8x7B-v0.1"),
    "mixtral, window": Row("mixtral", GQA | WINDOW | dict(num_local_experts=4, num_experts_per_tok=3)),
    "qwen2.5": Row("qwen2", QWEN | rope(theta=1e6), "Qwen2.5-7B"),
    "qwen2.5-0.5b": Row("qwen2", QWEN | TIED | rope(theta=1e6), "Qwen2.5-0.5B"),
    "qwen2.5, last layers windowed": Row("qwen2", GQA | LAST_TWO),
    "qwen3": Row("qwen3", QWEN | dict(head_dim=12) | rope(theta=1e6), "Qwen3-8B"),
    "qwen3-0.6b": Row("qwen3", QWEN | TIED | dict(head_dim=12), "Qwen3-0.6B"),
    "qwen3, last layers windowed": Row("qwen3", GQA | LAST_TWO | dict(head_dim=12)),
    "qwen3-moe": Row("qwen3_moe", GQA | EXPERTS | dict(norm_topk_prob=True), "Qwen3-30B-A3B"),
    "qwen3-moe, plain weights": Row("qwen3_moe", GQA | EXPERTS | TIED | dict(norm_topk_prob=False)),
    "qwen3-moe, window": Row(
        "qwen3_moe", GQA | EXPERTS | WINDOW | dict(norm_topk_prob=True, use_sliding_window=True)),
    "deepseek-v3": Row("deepseek_v3", DEEPSEEK_3),
    "deepseek-v3, another eps": Row("deepseek_v3", DEEPSEEK_3 | dict(rms_norm_eps=1e-5)),
    "deepseek-v3, yarn": Row("deepseek_v3", DEEPSEEK_3 | LATENT_YARN),
    "deepseek-v3, plain queries, halves": Row(
        "deepseek_v3", DEEPSEEK_3 | dict(q_lora_rank=None, rope_interleave=False, norm_topk_prob=False)),
    "deepseek-v3, biases, all experts": Row(
        "deepseek_v3", DEEPSEEK_3 | dict(attention_bias=True, n_group=1, topk_group=1, first_k_dense_replace=0)),
    "deepseek-v2": Row("deepseek_v2", DEEPSEEK | dict(topk_method="group_limited_greedy")),
    "deepseek-v2-lite": Row("deepseek_v2", DEEPSEEK | dict(q_lora_rank=None, n_group=1, topk_group=1)),
    "deepseek-v2, yarn": Row("deepseek_v2", DEEPSEEK | LATENT_YARN | dict(topk_method="group_limited_greedy")),
    "granite": Row("granite", GQA | MULTIPLIERS),
    "granite, tied, biases": Row("granite", GQA | MULTIPLIERS | TIED | dict(attention_bias=True, mlp_bias=True)),
    "smollm3": Row("smollm3", GQA | FOUR | dict(no_rope_layers=[1, 0, 1, 0])),
    "smollm3, window": Row("smollm3", GQA | FOUR | WINDOW | dict(use_sliding_window=True, no_rope_layers=[1, 0, 0, 1])),
    "seed-oss": Row("seed_oss", GQA | dict(head_dim=12)),
    "seed-oss, no bias": Row("seed_oss", GQA | dict(head_dim=12, attention_bias=False)),
    "ernie-4.5": Row("ernie4_5", GQA | dict(head_dim=12)),
    "ernie-4.5, bias, untied": Row("ernie4_5", GQA | dict(head_dim=12, use_bias=True, tie_word_embeddings=False)),
    "glm-4": Row("glm4", GQA | dict(head_dim=12)),
    "glm-4, no bias": Row("glm4", MHA | dict(head_dim=8, attention_bias=False)),
}  # fmt: skip

# ---- building the two sides


@dataclass
class Sides:
    """Their model and folder, ours with the weights of that folder, and ids `(B, T)`."""

    row: Row
    theirs: Any
    folder: Path
    ours: GPT
    idx: Tensor
    expected: Tensor  # their logits


def build_theirs(row: Row) -> Any:
    """Their model; each weight is drawn so that leaving it out or taking another one shows in the logits."""
    config = transformers.AutoConfig.for_model(row.model_type, **deepcopy(SIZES | row.fields))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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
                is_plain_norm = name.endswith("weight") and "gemma" not in row.model_type
                weight.copy_(noise * 0.3 + is_plain_norm)
    return model


def build_ours(folder: Path) -> GPT:
    """Our model from a Hugging Face folder."""
    values = read_hf_config(folder)
    config = config_from_hf(values)
    weights = StateDictAdapter(config, values["model_type"]).from_hf(open_weights(folder))
    model = GPT(config).eval()
    model.load_state_dict({name: tensor.read() for name, tensor in weights.items()})
    return model


@pytest.fixture(scope="module", params=ROWS)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    row = ROWS[request.param]
    theirs, folder = build_theirs(row), tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    idx = torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = theirs(idx, use_cache=False).logits
    return Sides(row, theirs, folder, build_ours(folder), idx, expected)


def assert_same(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max()


# ---- from Hugging Face to ours


@torch.inference_mode()
def test_logits_equal_those_of_transformers(sides):
    assert_same(sides.ours(sides.idx), sides.expected)


PLANS = ([T], [10] + [1] * (T - 10), [3, 9, 1, 8, 2, 1], [1] * T)
"""How many tokens a call gets; windows are 7 long, and chunks shorter and longer than that."""


@torch.inference_mode()
def test_logits_with_kv_cache_equal_those_of_transformers(sides):
    for plan in PLANS:
        for says_length in (True, False):  # both ways to say the positions
            sides.ours.set_kv_cache(batch_size=B, max_seq_length=T)
            logits, start = [], 0
            for stop in torch.tensor(plan).cumsum(0).tolist():
                pos = torch.arange(start, stop)
                if says_length:
                    logits.append(sides.ours(sides.idx[:, start:stop], pos, input_pos_maxp1=stop))
                else:
                    logits.append(sides.ours(sides.idx[:, start:stop], pos.expand(B, -1)))
                start = stop
            assert_same(torch.cat(logits, dim=1), sides.expected)
    sides.ours.clear_kv_cache()


@torch.inference_mode()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_rows_equal_those_of_transformers(sides, side):
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, : T // 3] = False
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = sides.theirs(sides.idx, attention_mask=mask.long(), position_ids=positions, use_cache=False).logits
    assert_same(sides.ours(sides.idx, mask=mask)[mask], expected[mask])


# ---- from ours to Hugging Face


def export(model: GPT, model_type: str, folder: Path) -> Any:
    """Writes a Hugging Face folder and gives the model that transformers makes of it."""
    weights = {name: LazyTensor.of(tensor) for name, tensor in model.state_dict().items()}
    write_safetensors(folder, StateDictAdapter(model.config, model_type).to_hf(weights))
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config, model_type, torch.float32)))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return theirs.eval()


@torch.inference_mode()
def test_exported_folder_is_the_model_that_transformers_wrote(sides, tmp_path):
    again = export(sides.ours, sides.row.model_type, tmp_path)
    assert torch.equal(again(sides.idx, use_cache=False).logits, sides.expected)

    original, written = open_weights(sides.folder), open_weights(tmp_path)
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].read(), tensor.read()), name

    old, new = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (sides.folder, tmp_path))
    for config in (old, new):  # an older word for rope_type
        (config.get("rope_parameters") or {}).pop("type", None)
    assert {key: (old[key], new.get(key)) for key in old if old[key] != new.get(key)}.keys() == {"_name_or_path"}


@torch.inference_mode()
def test_text_part_of_a_multimodal_folder_is_read_and_written_alone(tmp_path):
    vision = dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, image_size=28, patch_size=14,
    )  # fmt: skip
    text = SIZES | GEMMA_3 | dict(model_type="gemma3_text", vocab_size=64)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="only the text part"):
        ours = build_ours(tmp_path / "theirs")
    idx = torch.randint(0, 61, (B, T))
    expected = theirs(idx, token_type_ids=torch.zeros_like(idx), use_cache=False).logits
    assert_same(ours(idx), expected)

    again = export(ours, "gemma3_text", tmp_path)
    assert type(again) is transformers.Gemma3ForCausalLM
    assert_same(again(idx, use_cache=False).logits, expected)


# ---- the rows together


def features(config: Config) -> dict[str, Any]:
    """What a config uses, whatever the sizes."""
    same = (
        "norm_class_name norm_unit_offset norm_affine norm_qk norm_qk_type norm_1 norm_2 post_attention_norm "
        "post_mlp_norm parallel_residual shared_attention_norm bias attn_bias lm_head_bias mlp_class_name "
        "gelu_approximate scale_embeddings tie_embeddings rope_interleave norm_topk_prob"
    )
    windows = {layer_window(config, i) is not None for i in range(config.n_layer)}
    adjustments = config.rope_adjustments or ({"factor": 8} if config.rope_condense_ratio != 1 else {})
    return {key: getattr(config, key) for key in same.split()} | {
        "model_type": find_model_type(config),
        "heads": {1: "MQA", config.n_head: "MHA"}.get(config.n_query_groups, "GQA"),
        "windows": windows,
        "partial rope": config.rope_n_elem < config.head_size,
        "rope": sorted(adjustments),
        "local rope": config.rope_local_base_freq is not None,
        "soft-caps": [config.attention_logit_softcapping is not None, config.final_logit_softcapping is not None],
        "own scale": config.attention_scores_scalar not in (None, config.head_size),
        "router": [config.n_expert > 0, config.n_expert_groups, config.n_shared_expert],
    }


def row_config(row: Row) -> Config:
    fields = transformers.AutoConfig.for_model(row.model_type, **deepcopy(SIZES | row.fields)).to_dict()
    return config_from_hf(fields, name=row.like and Config.from_name(row.like).name)


@pytest.mark.filterwarnings("ignore:.*by name alone")
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.like])
def test_row_has_the_features_of_the_published_config(name):
    assert features(row_config(ROWS[name])) == features(Config.from_name(ROWS[name].like))


@pytest.mark.filterwarnings("ignore:.*by name alone")
def test_every_published_config_has_a_row_with_its_features():
    covered = [features(row_config(row)) for row in ROWS.values() if row.like]
    without = [name for name in name_to_config if features(Config.from_name(name)) not in covered]
    assert not without
