"""The parts of the model against their formulas, what `forward` returns, and what it refuses.

How texts are fed is in `test_model_cache.py`, training in `test_model_loss.py`, names, loading and first weights in
`test_model_weights.py`, RoPE in `test_model_rope.py`, models built from the parts in `test_model_custom.py`.
"""

import pytest
import torch
from model_variants import TOLERANCE, VARIANTS, assert_close, build_model, config_of, random_tokens
from torch import Tensor, nn

from litgpt.model import (
    GPT,
    MLP,
    Block,
    GemmaMLP,
    GptNeoxMLP,
    GroupedTopkRouter,
    LLaMAMLP,
    LLaMAMoE,
    MultiheadLatentAttention,
    RMSNorm,
    layer_window,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS)


# ---- parts


def test_rms_norm_is_its_formula():
    x = torch.randn(3, 5, 8) * 4
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    norm = RMSNorm(8, eps=1e-3)
    nn.init.normal_(norm.weight)
    assert_close(norm(x), (expected * norm.weight.double()).float())
    offset = RMSNorm(8, eps=1e-3, add_unit_offset=True)
    assert not offset.weight.any()
    offset.weight.data = norm.weight.detach() - 1
    assert_close(offset(x), norm(x))
    low = norm(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, norm(x.bfloat16().float()).bfloat16())  # float32 inside
    across = RMSNorm(5, dim=1, eps=1e-3)(x.transpose(1, 2).reshape(3, 8, 5).transpose(1, 2).transpose(1, 2))
    assert across.shape == (3, 8, 5)


def test_norms_follow_the_config():
    assert isinstance(GPT(config_of("neox")).transformer.ln_f, nn.LayerNorm)
    assert GPT(config_of("neox", norm_affine=False)).transformer.ln_f.weight is None
    assert GPT(config_of("gemma2")).transformer.h[0].norm_1.add_unit_offset
    assert GPT(config_of(norm_eps=0.25)).transformer.h[0].norm_1.eps == 0.25
    block = Block(config_of("olmo2"))
    assert isinstance(block.norm_1, nn.Identity) and isinstance(block.norm_2, nn.Identity)
    assert Block(config_of("falcon")).norm_2 is None


@pytest.mark.parametrize("kind", [GptNeoxMLP, LLaMAMLP, GemmaMLP, MLP])
def test_mlps_are_their_formulas(kind):
    config, x = config_of("mha", bias=True, gelu_approximate="tanh"), torch.randn(2, 3, 32)
    mlp = kind(config)
    gelu = lambda z: nn.functional.gelu(z, approximate="tanh")  # noqa: E731
    expected = {
        GptNeoxMLP: lambda m: m.proj(gelu(m.fc(x))),
        LLaMAMLP: lambda m: m.proj(m.fc_1(x) * m.fc_1(x).sigmoid() * m.fc_2(x)),
        GemmaMLP: lambda m: m.proj(gelu(m.fc_1(x)) * m.fc_2(x)),
        MLP: lambda m: m.fc_2(gelu(m.fc_1(x))),
    }[kind](mlp)
    assert_close(mlp(x), expected)
    assert kind(config, intermediate_size=20)(x).shape == x.shape
    assert isinstance(GPT(config_of(mlp_class_name=kind.__name__)).transformer.h[0].mlp, kind)


def grouped_choice(router: GroupedTopkRouter, x: Tensor) -> list[dict[int, float]]:
    """For each token the chosen experts and their weights, token by token in plain Python."""
    c, choices = router.config, []
    for scores in (x @ router.weight.T).sigmoid().tolist():
        biased = [s + b for s, b in zip(scores, router.e_score_correction_bias.tolist())]
        size = c.n_expert // c.n_expert_groups
        groups = [biased[g * size : (g + 1) * size] for g in range(c.n_expert_groups)]
        best = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: c.n_topk_groups]
        allowed = [g * size + i for g in best for i in range(size)]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: c.n_expert_per_token]
        total = sum(scores[e] for e in chosen) if c.norm_topk_prob else 1
        choices.append({e: c.routed_scaling_factor * scores[e] / total for e in chosen})
    return choices


def softmax_choice(gate: nn.Linear, x: Tensor) -> list[dict[int, float]]:
    choices = []
    for logits in gate(x):
        top = logits.topk(2)
        choices.append(dict(zip(top.indices.tolist(), top.values.softmax(dim=0).tolist())))
    return choices


@torch.no_grad()
@pytest.mark.parametrize("variant", ["moe", "mla"])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_experts_are_those_of_a_plain_loop(variant, norm_topk_prob):
    model = build_model(variant, norm_topk_prob=norm_topk_prob)
    moe = model.transformer.h[1].mlp
    assert isinstance(moe, LLaMAMoE) and isinstance(
        model.transformer.h[0].mlp, LLaMAMLP if variant == "mla" else LLaMAMoE
    )
    x = torch.randn(2, 11, 32)
    if variant == "mla":
        moe.gate.e_score_correction_bias.normal_()
    choose = grouped_choice if variant == "mla" else softmax_choice
    rows = []
    for token, choice in zip(x.flatten(0, 1), choose(moe.gate, x.flatten(0, 1))):
        row = sum(weight * moe.experts[e](token) for e, weight in choice.items())
        rows.append(row + moe.shared_experts(token) if variant == "mla" else row)
    assert_close(moe(x), torch.stack(rows).view_as(x))
    assert_close(moe(x[:1, :1]), moe(x)[:1, :1])


def test_experts_that_no_token_chose_get_no_gradient_and_the_router_does():
    moe = build_model("moe").transformer.h[0].mlp
    moe(torch.randn(1, 1, 32)).sum().backward()
    assert sum(expert.proj.weight.grad is not None for expert in moe.experts) == 2
    assert moe.gate.weight.grad.any()


def test_windows_belong_to_the_layers_that_the_config_marks():
    assert [layer_window(config_of("gemma2"), i) for i in range(3)] == [5, None, 5]
    assert [block.attn.window for block in GPT(config_of("gemma3")).transformer.h] == [5, 5, None]
    assert layer_window(config_of(), 0) is None
    assert isinstance(Block(config_of("mla")).attn, MultiheadLatentAttention)


def test_shared_attention_norm_needs_parallel_residuals():
    with pytest.raises(NotImplementedError, match="parallel"):
        GPT(config_of("falcon", parallel_residual=False))


# ---- what forward returns and refuses


def test_logits_to_keep_picks_rows():
    model, idx = build_model("gqa"), random_tokens(3, 9)
    full = model(idx)
    assert_close(model(idx, logits_to_keep=1), full[:, -1:])
    assert_close(model(idx, logits_to_keep=4), full[:, -4:])
    kept = model(idx, logits_to_keep=torch.tensor([8, 0, 3]))
    assert_close(kept, torch.stack((full[0, 8:], full[1, :1], full[2, 3:4])))


@pytest.mark.parametrize(("size", "lengths"), [(4, [4, 4, 1]), (9, [9]), (100, [9]), (1, [1] * 9)])
def test_logits_in_chunks_are_a_list(size, lengths):
    model, idx = build_model("gemma2"), random_tokens(2, 9)
    chunks = model(idx, lm_head_chunk_size=size)
    assert isinstance(chunks, list) and [chunk.size(1) for chunk in chunks] == lengths
    assert_close(torch.cat(chunks, dim=1), model(idx))


def test_too_long_texts_are_refused():
    model = build_model()
    with pytest.raises(ValueError, match="length 65, max seq length is only 64"):
        model(random_tokens(1, 65))
    with pytest.raises(ValueError, match=r"65 tokens.*only 64"):
        model.max_seq_length = 65
    with pytest.raises(ValueError, match=r"65 tokens.*only 64"):
        model.set_kv_cache(1, max_seq_length=65)
    model.max_seq_length = 10
    assert model(random_tokens(1, 10)).shape == (1, 10, 100)
    with pytest.raises(ValueError, match="length 11, max seq length is only 10"):
        model(random_tokens(1, 11))


def test_positions_without_a_cache_are_refused():
    model, idx = build_model(), random_tokens(1, 3)
    with pytest.raises(TypeError, match="set_kv_cache"):
        model(idx, torch.arange(3))
    with pytest.raises(TypeError, match="set_kv_cache"):
        model.transformer.h[0](torch.randn(1, 3, 32), input_pos=torch.arange(3))
    model.set_kv_cache(1)
    model.clear_kv_cache()
    with pytest.raises(TypeError, match="set_kv_cache"):
        model(idx, torch.arange(3))


@pytest.mark.parametrize("shape", [(2,), (4,), (1, 3), (2, 2), (2, 3, 1), (2, 1, 3)])
def test_positions_of_another_shape_are_refused(shape):
    model = build_model()
    model.set_kv_cache(2)
    with pytest.raises(ValueError, match=r"input_pos \(.*\) does not fit idx \(2, 3\)"):
        model(random_tokens(2, 3), torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("end", [None, 9])
def test_positions_outside_of_the_cache_are_refused(end):
    model = build_model("window")
    model.set_kv_cache(1, max_seq_length=8)
    model(random_tokens(1, 8), torch.arange(8))
    with pytest.raises(ValueError, match="Position 8 is outside of the KV cache of 8 tokens"):
        model(random_tokens(1, 1), torch.tensor([8]), end)


def test_packed_documents_with_a_cache_are_refused():
    model, idx = build_model(), random_tokens(1, 6)
    model.set_kv_cache(1)
    with pytest.raises(ValueError, match="segment_ids"):
        model(idx, torch.arange(6), segment_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]))


def test_a_longer_cache_raises_the_length_of_the_model():
    model = build_model()
    model.max_seq_length = 10
    model.set_kv_cache(1)
    assert model.transformer.h[0].attn.kv_cache.k.size(2) == 10
    model.set_kv_cache(1, max_seq_length=20)
    assert model.max_seq_length == 20
    assert model(random_tokens(1, 20), torch.arange(20)).shape == (1, 20, 100)


@every_variant
def test_tolerance_is_one_that_a_fault_exceeds(variant):
    """A single weight changed by a thousandth of its layer's spread is seen through all layers."""
    model, idx = build_model(variant), random_tokens(2, 24)
    before = model(idx)
    with torch.no_grad():
        weight = model.transformer.h[0].attn.proj.weight
        weight[0] += 1e-2 * weight.std()
    assert (model(idx) - before).abs().max() > TOLERANCE * before.abs().max()
