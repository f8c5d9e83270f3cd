"""The rehearsed model next to the real one: names and shapes of all weights, and the bytes of a block."""

import contextlib
import json

import pytest
import torch
from benchmarks.plan_memory import allocations
from model_variants import LATENT, VARIANTS, config_of

from litgpt import model, rehearsed_model
from litgpt.config import Config, configs
from litgpt.model import GPT
from litgpt.rehearsal import Setting
from litgpt.rehearsed_model import block_kinds, kv_cache_bytes, model_weights, rehearse_stage

WIDE = dict(n_embd=64, n_head=4, intermediate_size=160, block_size=512)
OTHERS = {
    "granite": dict(residual_multiplier=0.5, embedding_multiplier=2.0, logits_scaling=4.0),
    "smollm3": dict(nope_indices=[0, 0, 1], n_query_groups=2),
    "attention bias": dict(attn_bias=True, n_query_groups=2),
    "head bias": dict(lm_head_bias=True, bias=True),
    "no affine": dict(norm_class_name="LayerNorm", norm_affine=False),
    "own MLP": dict(mlp_class_name="MLP", norm_1=False),
    "mla without q_lora": dict(latent_attention={**LATENT, "q_lora_rank": None}, attn_bias=True),
    "dropout": dict(dropout=0.1),
    "softmax router": dict(VARIANTS["mla"], router_scoring="softmax"),
}
ALL = {**VARIANTS, **OTHERS}
STRUCTURE = ("name", "hf_config", "n_layer", "block_size", "vocab_size", "rope_base", "norm_eps", "rope_adjustments",
             "rope_condense_ratio", "sliding_window_indices", "rope_indices")  # fmt: skip


def rehearsed_weights(config: Config) -> dict[tuple, int]:
    """(Name without indices, shape) -> how many."""
    found: dict[tuple, int] = {}
    for name, shape, count in model_weights(config):
        found[name, shape] = found.get((name, shape), 0) + count
    return found


def built_weights(config: Config) -> dict[tuple, int]:
    with torch.device("meta"):
        gpt = GPT(config)
    found: dict[tuple, int] = {}
    for name, p in gpt.named_parameters():
        name = ".".join("*" if part.isdigit() else part for part in name.split("."))
        name = "lm_head.weight" if config.tie_embeddings and name == "lm_head.weight" else name
        found[name, tuple(p.shape)] = found.get((name, tuple(p.shape)), 0) + 1
    if config.tie_embeddings:  # torch names the shared weight after the head, which comes first
        found["transformer.wte.weight", tuple(gpt.lm_head.weight.shape)] = found.pop(
            ("lm_head.weight", tuple(gpt.lm_head.weight.shape))
        )
    return found


@pytest.mark.parametrize("kind", ALL)
def test_rehearsed_weights_are_those_of_the_model(kind):
    config = config_of(**ALL[kind])
    assert rehearsed_weights(config) == built_weights(config)


def test_rehearsed_weights_are_right_for_every_structure_among_the_named_models():
    seen = {}
    for row in configs:
        rest = {key: value for key, value in row.items() if key not in STRUCTURE}
        rest["names"] = ("Gemma" in row["name"], "OLMo" in row["name"])
        seen.setdefault(json.dumps(rest, sort_keys=True, default=str), row)
    assert len(seen) > 80
    for row in seen.values():
        config = Config(**{**row, "n_layer": 2})
        assert rehearsed_weights(config) == built_weights(config), row["name"]


def test_constants_are_those_of_the_mirrored_code():
    assert rehearsed_model.LOSS_CHUNK_BYTES == model.LOSS_CHUNK_BYTES


def test_blocks_of_a_kind_are_rehearsed_once():
    assert block_kinds(config_of("gemma2")) == [0, 1, 0]
    assert block_kinds(config_of("mla")) == [0, 1, 1]
    assert block_kinds(config_of(nope_indices=[1, 0, 1])) == [0, 1, 0]


@pytest.mark.parametrize("kind", ["gqa", "window", "gemma2", "mla"])
def test_kv_cache_has_the_bytes_of_the_real_one(kind):
    config = config_of(kind)
    gpt = GPT(config)
    gpt.set_kv_cache(3, 40)
    real = sum(b.numel() * b.element_size() for name, b in gpt.named_buffers() if "kv_cache" in name)
    assert kv_cache_bytes(config, 3, 40, width=4) == real


def measured_block(config: Config, index: int, precision: str, B: int, T: int) -> tuple[int, int, int]:
    """Peak of the forward pass, what it keeps, and peak of the backward pass, of a real block."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    gpt = GPT(config).to(dtype)
    block, x0 = gpt.transformer.h[index], torch.randn(B, T, config.n_embd, dtype=dtype)
    ctx = gpt.build_context(torch.zeros(B, T, dtype=torch.long))

    def forward() -> torch.Tensor:
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
        with autocast:
            return block(x0.clone().requires_grad_(), ctx.cos, ctx.sin, ctx.mask)

    def both() -> None:
        block.zero_grad(set_to_none=True)
        torch.empty(1, dtype=torch.uint8)
        y = forward()
        grad = torch.empty_like(y)
        torch.empty(1, dtype=torch.uint8)
        y.backward(grad)

    both()
    block.zero_grad(set_to_none=True)
    in_use, peaks, at_marks = 0, [0], []
    for size in allocations(both):
        if size == 1:
            at_marks.append(in_use)
            peaks.append(0)
        in_use += size
        peaks[-1] = max(peaks[-1], in_use)
    n_out = x0.numel() * x0.element_size()
    return peaks[1], at_marks[1] - 2 * n_out, peaks[2] - n_out  # here the output lives on; in a model it does not


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", [*VARIANTS, "smollm3", "own MLP", "softmax router", "dropout"])
def test_rehearsed_block_takes_the_bytes_of_the_real_one(kind, precision):
    B, T, index = 2, 256, 1
    config = config_of(**{**ALL[kind], **WIDE})
    param_bytes, compute_bytes = {"32-true": (4, 4), "bf16-mixed": (4, 2), "bf16-true": (2, 2)}[precision]
    setting = Setting(B=B, T=T, param_bytes=param_bytes, compute_bytes=compute_bytes, backward=True)
    stage = rehearse_stage(config, setting, "block", index)
    forward_peak, saved, backward_peak = measured_block(config, index, precision, B, T)
    assert stage.saved == pytest.approx(saved, rel=0.02)
    assert stage.backward_peak == pytest.approx(backward_peak, rel=0.05)
    assert stage.forward_peak == pytest.approx(forward_peak, rel=0.08)


@pytest.mark.parametrize(
    ("fields", "compute_bytes", "keeps_scores"),
    [
        (dict(n_query_groups=2), 2, False),  # flash
        ({}, 4, False),  # memory-efficient
        (dict(n_query_groups=2), 4, True),  # neither takes groups in float32
        (dict(attention_logit_softcapping=5.0), 2, True),
    ],
)
def test_scores_are_kept_on_cuda_only_where_no_fused_kernel_fits(fields, compute_bytes, keeps_scores):
    config = config_of(**WIDE | fields)
    setting = Setting(B=1, T=512, param_bytes=compute_bytes, compute_bytes=compute_bytes, device="cuda", backward=True)
    saved = rehearse_stage(config, setting, "block").saved
    assert (saved > 4 * 512 * 512 * compute_bytes) == keeps_scores


def test_checkpointed_block_keeps_its_input_alone():
    config = config_of(**WIDE)
    setting = Setting(B=2, T=64, backward=True)
    plain, kept = (rehearse_stage(config, setting, "block", checkpointing=flag) for flag in (False, True))
    assert kept.saved == 2 * 64 * 64 * 4 < plain.saved
    assert kept.backward_peak >= plain.backward_peak and kept.gradients == plain.gradients
