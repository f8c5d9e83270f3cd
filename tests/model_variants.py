"""The kinds of model that the tests of `model.py` go through, and what counts as equal among them."""

from typing import Any

import torch
from torch import Tensor

from litgpt.config import Config
from litgpt.model import GPT

TOLERANCE = 1e-5  # of the largest value, in float32

SIZES: dict[str, Any] = dict(
    name="tiny", n_layer=3, n_embd=32, n_head=4, vocab_size=100, padded_vocab_size=100, block_size=64,
    rotary_percentage=1.0, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=48,
    parallel_residual=False, bias=False,
)  # fmt: skip
YARN = dict(factor=4.0, beta_fast=32, beta_slow=1, original_max_seq_len=16, mscale=1.0, mscale_all_dim=1.0)
LATENT = dict(q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6)

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": dict(n_query_groups=2),
    "mqa": dict(n_query_groups=1),
    "neox": dict(
        norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", parallel_residual=True, bias=True,
        rotary_percentage=0.25,
    ),
    "falcon": dict(
        norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", parallel_residual=True, shared_attention_norm=True,
        n_query_groups=1,
    ),
    "window": dict(n_query_groups=2, sliding_window_size=5),
    "gemma2": dict(
        n_query_groups=2, sliding_window_size=5, sliding_window_indices=[1, 0, 1], attention_logit_softcapping=5.0,
        final_logit_softcapping=3.0, mlp_class_name="GemmaMLP", post_attention_norm=True, post_mlp_norm=True,
        scale_embeddings=True, norm_unit_offset=True, tie_embeddings=True, attention_scores_scalar=12,
    ),
    "gemma3": dict(
        sliding_window_size=5, sliding_window_indices=[1, 1, 0], rope_local_base_freq=100.0, rope_indices=[1, 1, 0],
        norm_qk=True, rope_adjustments=dict(factor=8.0),
    ),
    "olmo2": dict(
        norm_qk=True, norm_qk_type="olmo2", norm_1=False, norm_2=False, post_attention_norm=True, post_mlp_norm=True
    ),
    "moe": dict(mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, moe_intermediate_size=16),
    "mla": dict(
        latent_attention=LATENT, rope_interleave=True, mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2,
        n_expert_groups=4, n_topk_groups=2, n_topk_scores_per_group=2, n_shared_expert=1, moe_intermediate_size=16,
        first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5, rope_adjustments=YARN,
    ),
}  # fmt: skip


def config_of(variant: str = "mha", **fields: Any) -> Config:
    """The config of a variant; `fields` replace its own."""
    return Config(**SIZES | VARIANTS[variant] | fields)


def build_model(variant: str = "mha", **fields: Any) -> GPT:
    """A model whose every parameter is random and large enough to matter; `fields` replace those of the config."""
    model = GPT(config_of(variant, **fields))
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif not name.startswith(("lm_head", "transformer.wte")):
                parameter.mul_(3)
    return model.eval()


def random_tokens(*shape: int) -> Tensor:
    """Token ids that every model of these sizes knows."""
    return torch.randint(0, SIZES["vocab_size"], shape)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Same shape, and no difference above `tolerance` of the largest value expected."""
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).abs().max().item()
    assert difference <= tolerance * expected.float().abs().max().item()  # NaN fails too
