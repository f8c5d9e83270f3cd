import copy

import pytest
import torch
from model_variants import SIZES, VARIANTS, assert_close, build_model, config_of, random_tokens
from torch import nn

from litgpt import adapter_v2, model
from litgpt.adapter_v2 import (
    AdapterV2Linear,
    Config,
    adapter_filter,
    add_adapter_v2,
    mark_only_adapter_v2_as_trainable,
    merge_adapter_v2,
)  # fmt: skip
from litgpt.checkpoint.meta import meta_device


def stir(built):
    """Makes scales, biases and gates something that shows."""
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(("adapter_scale", "adapter_bias", "gating_factor")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def names_of(built):
    return {name for name, parameter in built.named_parameters() if parameter.requires_grad}


def train(built, loss, steps=3):
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_added_adapter_changes_nothing_at_first(variant):
    plain, idx = build_model(variant), random_tokens(2, 12)
    built = add_adapter_v2(copy.deepcopy(plain))
    assert torch.equal(built(idx), plain(idx))
    assert all(isinstance(m, AdapterV2Linear) for n, m in built.named_modules() if n.endswith((".proj", "lm_head")))


@pytest.mark.parametrize("variant", ["gqa", "neox", "gemma2", "moe", "mla"])
def test_all_that_is_trainable_learns_and_nothing_else_does(variant):
    built = add_adapter_v2(build_model(variant), start_layer=1)
    mark_only_adapter_v2_as_trainable(built)
    idx = random_tokens(4, 16)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with torch.no_grad():
        built(idx)

    def loss():
        total, n = built(idx, targets=idx.roll(-1, 1))
        return total / n

    train(built, loss)
    after = built.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if adapter_filter(name, None)}
    assert changed == {n for n in after if n in names_of(built)}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert {"adapter_scale", "adapter_bias", "gating_factor", "weight"} <= kinds
    assert not any(".linear." in name for name in changed)


def test_names_in_the_state_dict_are_the_published_ones_and_plain_weights_load():
    plain = build_model("gqa")
    built = add_adapter_v2(model.GPT(plain.config)).eval()
    keys = set(built.state_dict())
    block = "transformer.h.2."
    assert {block + "attn.qkv.linear.weight", block + "attn.qkv.adapter_scale", block + "mlp.fc_1.adapter_bias"} <= keys
    assert {"lm_head.linear.weight", "lm_head.adapter_scale", block + "attn.adapter_wte.weight"} <= keys
    saved = {name for name in keys if adapter_filter(name, None)}
    assert {block + "norm_1.weight", block + "norm_2.weight", "transformer.ln_f.weight"} <= saved
    assert {name.rpartition(".")[2] for name in saved} == {"weight", "gating_factor", "adapter_scale", "adapter_bias"}
    result = built.load_state_dict(plain.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(adapter_filter(name, None) for name in result.missing_keys)
    idx = random_tokens(2, 7)
    assert torch.equal(built(idx), plain(idx))
    again = add_adapter_v2(model.GPT(plain.config)).eval()
    again.load_state_dict(stir(built).state_dict())
    assert torch.equal(again(idx), built(idx))


def test_any_module_tree_gets_scales_and_biases():
    tree = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 2, bias=False)))
    x = torch.randn(16, 4)
    before = tree(x)
    assert torch.equal(add_adapter_v2(tree)(x), before)
    mark_only_adapter_v2_as_trainable(tree)
    assert names_of(tree) == {f"{n}.adapter_{kind}" for n in ("0", "2.0") for kind in ("scale", "bias")}
    train(tree, lambda: tree(x).square().mean())
    assert tree(x).square().mean() < 0.9 * before.square().mean()
    expected = tree(x)
    merge_adapter_v2(tree)
    assert type(tree[0]) is nn.Linear and type(tree[2][0]) is nn.Linear
    assert_close(tree(x), expected)


@pytest.mark.parametrize("variant", ["gqa", "neox", "gemma2", "moe", "mla"])
def test_a_merged_model_gives_the_same_logits(variant):
    built, idx = stir(add_adapter_v2(build_model(variant), start_layer=1)).eval(), random_tokens(2, 9)
    expected, tied = built(idx), built.config.tie_embeddings
    merge_adapter_v2(built)
    assert_close(built(idx), expected)
    assert isinstance(built.lm_head, AdapterV2Linear) == tied
    assert not any(isinstance(m, AdapterV2Linear) for m in built.transformer.modules())
    assert_close(built.float()(idx), expected)


def test_published_classes_are_the_model_with_adapters():
    config = Config(**SIZES | VARIANTS["gqa"], adapter_prompt_length=4, adapter_start_layer=1)
    built = stir(add_adapter_v2(build_model("gqa"), 4, 1)).eval()
    face, idx = adapter_v2.GPT(config).eval(), random_tokens(2, 5)
    face.load_state_dict(built.state_dict())
    assert torch.equal(face(idx), built(idx))
    assert all(isinstance(block, adapter_v2.Block) for block in face.transformer.h)
    assert adapter_v2.GPT.from_name("pythia-14m", n_layer=3).transformer.h[2].attn.adapter_wte.weight.shape[0] == 10
    for kind in ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP"):
        layers = getattr(adapter_v2, kind)(config)
        assert isinstance(layers.proj, AdapterV2Linear) and isinstance(layers, getattr(model, kind))
    experts = adapter_v2.LLaMAMoE(config_of("moe"))
    assert isinstance(experts.gate, AdapterV2Linear) and isinstance(experts.experts[0].fc_1, AdapterV2Linear)
    attention = adapter_v2.CausalSelfAttention(config, 1)
    assert isinstance(attention.qkv, AdapterV2Linear) and attention.has_prompts


def test_adapters_take_the_dtype_of_the_model_and_may_be_added_on_the_meta_device():
    built = add_adapter_v2(build_model().bfloat16())
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    with meta_device():
        built = add_adapter_v2(model.GPT(config_of("gqa")))
    assert all(parameter.is_meta for parameter in built.parameters())
    built.to_empty(device="cpu").init_weights()
    assert built.lm_head.adapter_scale.eq(1).all() and built(random_tokens(1, 4)).isfinite().all()


@torch.no_grad()
def test_generation_with_a_cache_equals_one_without():
    built, idx = stir(add_adapter_v2(build_model("gqa"), start_layer=0)).eval(), random_tokens(1, 8)
    expected = built(idx)
    built.set_kv_cache(1)
    parts = [built(idx[:, :6], torch.arange(6))] + [built(idx[:, i : i + 1], torch.tensor([i])) for i in (6, 7)]
    assert_close(torch.cat(parts, dim=1), expected)


def test_wrong_use_is_refused_in_one_line():
    with pytest.raises(ValueError, match="has no adapter to be trained: call add_adapter_v2 first"):
        mark_only_adapter_v2_as_trainable(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="has no linear layers to adapt"):
        add_adapter_v2(nn.ReLU())
    with pytest.raises(ValueError, match="has adaption prompts already"):
        add_adapter_v2(add_adapter_v2(build_model()))
