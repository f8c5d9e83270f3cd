"""Names of the state dict, loading, tied embeddings, first weights, and the count of parameters and FLOPs."""

import math
import warnings

import pytest
import torch
from model_variants import LATENT, VARIANTS, build_model, config_of, random_tokens
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.model import GPT, Block

every_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- names of the state dict

NORMS = "norm_1.weight norm_2.weight"
SWIGLU = "mlp.fc_1.weight mlp.fc_2.weight mlp.proj.weight"
NEOX = "mlp.fc.weight mlp.proj.weight"
POST_NORMS = "post_attention_norm.weight post_mlp_norm.weight"
QK_NORMS = "attn.norm_q.weight attn.norm_k.weight"
ATTENTION = "attn.qkv.weight attn.proj.weight"
EXPERTS = " ".join(f"mlp.experts.{e}.{part}.weight" for e in range(4) for part in ("fc_1", "fc_2", "proj"))
LATENT_ATTENTION = " ".join(
    f"attn.{part}.weight"
    for part in ["q_a_proj", "q_a_norm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_norm", "kv_b_proj", "proj"]
)
SHARED_EXPERTS = SWIGLU.replace("mlp.", "mlp.shared_experts.")
EIGHT_EXPERTS = " ".join(EXPERTS.replace(f".{e}.", f".{e + 4}.") for e in range(4))
BLOCK_KEYS = {
    "mha": f"{NORMS} {ATTENTION} {SWIGLU}",
    "mqa": f"{NORMS} {ATTENTION} {SWIGLU}",
    "neox": " ".join(f"{k} {k.replace('weight', 'bias')}" for k in f"{NORMS} {ATTENTION} {NEOX}".split()),
    "falcon": f"norm_1.weight norm_1.bias {ATTENTION} {NEOX}",
    "gemma2": f"{NORMS} {POST_NORMS} {ATTENTION} {SWIGLU}",
    "gemma3": f"{NORMS} {QK_NORMS} {ATTENTION} {SWIGLU}",
    "olmo2": f"{POST_NORMS} {QK_NORMS} {ATTENTION} {SWIGLU}",
    "moe": f"{NORMS} {ATTENTION} mlp.gate.weight {EXPERTS}",
}


@pytest.mark.parametrize("variant", BLOCK_KEYS)
def test_blocks_have_the_published_names(variant):
    assert sorted(Block(config_of(variant)).state_dict()) == sorted(BLOCK_KEYS[variant].split())


def test_latent_attention_and_grouped_experts_have_the_published_names():
    dense, sparse = (set(Block(config_of("mla"), i).state_dict()) for i in (0, 1))
    shared = set(f"{NORMS} {LATENT_ATTENTION}".split())
    assert dense == shared | set(SWIGLU.split())
    experts = {f"mlp.experts.{e}.{part}.weight" for e in range(8) for part in ("fc_1", "fc_2", "proj")}
    router = {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    assert sparse == shared | experts | router | set(SHARED_EXPERTS.split())
    no_rank = Block(config_of("mla", latent_attention=LATENT | dict(q_lora_rank=None)), 0).state_dict()
    assert {"attn.q_proj.weight"} == no_rank.keys() - dense
    assert {f"attn.q_{part}.weight" for part in ("a_proj", "a_norm", "b_proj")} == dense - no_rank.keys()


def test_models_have_the_published_names():
    outer = lambda model: {key for key in model.state_dict() if not key.startswith("transformer.h.")}  # noqa: E731
    names = {"lm_head.weight", "transformer.wte.weight", "transformer.ln_f.weight"}
    assert outer(GPT(config_of())) == names
    assert outer(GPT(config_of("neox", lm_head_bias=True))) == names | {"lm_head.bias", "transformer.ln_f.bias"}
    model = GPT(config_of(n_layer=2))
    block_keys = {f"transformer.h.{i}.{key}" for i in range(2) for key in BLOCK_KEYS["mha"].split()}
    assert set(model.state_dict()) == names | block_keys
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict())


def test_older_name_of_the_projection_reads_the_same_module():
    attention = GPT(config_of()).transformer.h[0].attn
    assert attention.attn is attention.qkv
    assert not [key for key in attention.state_dict() if key.startswith("attn.")]
    assert not [name for name, _ in attention.named_modules() if name == "attn"]


@pytest.mark.parametrize(
    "fields", [dict(bias=True), dict(attn_bias=True), dict(bias=False), dict(bias=True, attn_bias=True)]
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_interleaved_checkpoints_of_old_load_to_the_same_logits(fields, groups):
    """They store the queries of a group, its key and its value together, then the next group."""
    model, idx = build_model("mha", n_query_groups=groups, **fields), random_tokens(2, 9)
    hs, per_group, old = 8, 4 // groups, {}
    for key, value in model.state_dict().items():
        if ".attn.qkv." in key:
            q, k, v = value.split((4 * hs, groups * hs, groups * hs))
            rows = []
            for g in range(groups):
                rows += [q[g * per_group * hs : (g + 1) * per_group * hs], k[g * hs :][:hs], v[g * hs :][:hs]]
            key, value = key.replace("attn.qkv", "attn.attn"), torch.cat(rows)
        old[key] = value
    before = {key: value.clone() for key, value in old.items()}
    other = GPT(model.config).eval()
    other.load_state_dict(old)
    assert torch.equal(other(idx), model(idx))
    assert old.keys() == before.keys()  # the caller's dict is left alone
    with torch.device("meta"):
        assigned = GPT(model.config).eval()
    assigned.load_state_dict(old, assign=True)
    assert torch.equal(assigned(idx), model(idx))


# ---- tied embeddings


def is_tied(model: GPT) -> bool:
    return model.lm_head.weight is model.transformer.wte.weight


def test_embeddings_are_tied_only_where_the_config_says_so():
    assert is_tied(GPT(config_of(tie_embeddings=True))) and not is_tied(GPT(config_of()))


def test_tied_embeddings_stay_tied():
    model = GPT(config_of(tie_embeddings=True))
    with torch.device("meta"):
        empty = GPT(model.config)
    assert is_tied(empty)
    assert is_tied(empty.to_empty(device="cpu"))
    empty.init_weights()
    assert is_tied(empty)
    assert is_tied(model.to(torch.float64)) and model.lm_head.weight.dtype == torch.float64
    assert is_tied(model.bfloat16())
    assert [name for name, _ in model.named_parameters() if "wte" in name or "lm_head" in name] == ["lm_head.weight"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
def test_tied_checkpoints_load_with_and_without_a_head(assign, with_head):
    model, idx = build_model(tie_embeddings=True), random_tokens(1, 5)
    weights = {k: v.clone() for k, v in model.state_dict().items() if with_head or k != "lm_head.weight"}
    with torch.device("meta" if assign else "cpu"):
        other = GPT(config_of(tie_embeddings=True)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(weights, assign=assign)
    assert is_tied(other) and torch.equal(other(idx), model(idx))
    assert ("lm_head.weight" in weights) == with_head


@pytest.mark.parametrize("assign", [False, True])
def test_a_head_that_was_trained_apart_is_loaded_untied(assign):
    untied, idx = build_model(), random_tokens(1, 5)
    with torch.device("meta" if assign else "cpu"):
        model = GPT(config_of(tie_embeddings=True)).eval()
    with pytest.warns(UserWarning, match="untied"):
        model.load_state_dict(untied.state_dict(), assign=assign)
    assert not is_tied(model) and not model.config.tie_embeddings
    assert torch.equal(model(idx), untied(idx))
    assert not is_tied(model.to(torch.float64))


def test_missing_weights_are_errors_also_of_tied_models():
    model = GPT(config_of(tie_embeddings=True))
    weights = model.state_dict()
    del weights["transformer.wte.weight"], weights["lm_head.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(weights)
    model = GPT(config_of())
    weights = model.state_dict()
    del weights["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight"):
        model.load_state_dict(weights)


# ---- first weights


def expected_std(name: str, parameter: Tensor, config: Config) -> float:
    """0 for a constant, else the standard deviation that a parameter is drawn with."""
    if parameter.dim() == 1:
        return 0.0
    if name.endswith(".proj.weight"):
        return 1 / math.sqrt(config.n_embd) / config.n_layer
    return math.sqrt(2 / 5 / config.n_embd)


@every_variant
def test_first_weights_have_the_right_spread_and_leave_nothing_out(variant):
    """Starts from memory full of NaN, as `to_empty` may leave it."""
    with torch.device("meta"):
        model = GPT(config_of(variant, n_embd=64, intermediate_size=96, lm_head_bias=True))
    model.to_empty(device="cpu")
    model.set_kv_cache(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        nn.init.constant_(tensor, math.nan)
    model.init_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        std = expected_std(name, tensor, model.config)
        if "kv_cache" in name or name.endswith("e_score_correction_bias"):
            std = 0
        if std == 0:
            is_norm = "norm" in name or "ln_f" in name
            one = is_norm and name.endswith("weight") and not model.config.norm_unit_offset
            assert (tensor == (1 if one else 0)).all(), name
        else:
            assert tensor.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * tensor.numel())), name
            assert abs(tensor.mean().item()) < 5 * std / math.sqrt(tensor.numel()), name
    assert model(random_tokens(1, 8)).isfinite().all()


def test_published_init_draws_with_a_hundredth_times_two():
    model = GPT(config_of("neox", n_embd=64))
    model.apply(model._init_weights)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.h[0].attn.proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.transformer.h[0].mlp.fc.bias.any()


@every_variant
def test_models_from_the_meta_device_equal_those_made_in_place(variant):
    model, idx = build_model(variant), random_tokens(2, 9)
    with torch.device("meta"):
        other = GPT(model.config)
    assert all(tensor.is_meta for tensor in [*other.parameters(), *other.buffers()])
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other.eval()(idx), model(idx))


# ---- sizes


def count_by_hand(c: Config) -> tuple[int, int]:
    """All parameters, and those that one token passes through."""
    C, nh, G, hs = c.n_embd, c.n_head, c.n_query_groups, c.head_size
    norm = 0 if not c.norm_affine else 2 * C if c.norm_class_name == "LayerNorm" else C
    linear = lambda i, o, bias=c.bias: i * o + (o if bias else 0)  # noqa: E731
    total = active = c.padded_vocab_size * C * (1 if c.tie_embeddings else 2) + norm
    for layer in range(c.n_layer):
        n_norms = c.norm_1 + (c.norm_2 and not c.shared_attention_norm) + c.post_attention_norm + c.post_mlp_norm
        if c.latent_attention:
            attention = C * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * nh * c.qk_head_dim
            attention += C * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
            attention += c.kv_lora_rank * nh * (c.qk_nope_head_dim + c.v_head_dim) + nh * c.v_head_dim * C
        else:
            attention = linear(C, (nh + 2 * G) * hs, c.bias or c.attn_bias) + linear(nh * hs, C)
        if c.norm_qk:
            attention += (nh + G) * hs if c.norm_qk_type == "olmo2" else 2 * hs
        all_of_it = attention + n_norms * norm
        per_token = all_of_it
        if c.mlp_class_name == "LLaMAMoE" and layer >= (c.first_k_dense_replace or 0):
            expert = 3 * C * c.moe_intermediate_size
            always = C * c.n_expert + (c.n_shared_expert or 0) * expert
            all_of_it += always + c.n_expert * expert
            per_token += always + c.n_expert_per_token * expert
        else:
            width = c.intermediate_size
            mlp = linear(C, width) + linear(width, C)
            mlp += 0 if c.mlp_class_name == "GptNeoxMLP" else linear(C, width)
            all_of_it, per_token = all_of_it + mlp, per_token + mlp
        total, active = total + all_of_it, active + per_token
    return total, active


@every_variant
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_flops_are_those_counted_by_hand(variant, tied):
    config = config_of(variant, tie_embeddings=tied)
    with torch.device("meta"):
        model = GPT(config)
    total, active = count_by_hand(config)
    multiplied = active - (0 if tied else config.padded_vocab_size * config.n_embd)
    windows = {"window": [5, 5, 5], "gemma2": [5, None, 5], "gemma3": [5, 5, None]}.get(variant, [None] * 3)
    widths = 12 + 6 if variant == "mla" else 8 + 8
    attention = sum(6 * 4 * widths * min(20, window or 20) for window in windows)
    assert model.get_nparams_and_flops(20) == (total, active, 6 * multiplied + attention)
    assert model.get_nparams_and_flops(4).flops_per_token < model.get_nparams_and_flops(5).flops_per_token


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("pythia-160m", 162_322_944, 162_322_944),
        ("SmolLM2-135M", 134_515_008, 134_515_008),
        ("Llama-3.2-1B", 1_235_814_400, 1_235_814_400),
        ("Mixtral-8x7B-v0.1", 46_702_792_704, 12_879_925_248),
    ],
)
def test_named_models_have_the_sizes_their_makers_say(name, total, active):
    with torch.device("meta"):
        size = GPT.from_name(name).get_nparams_and_flops(128)
    assert (size.total, size.active) == (total, active)
