import copy
import warnings

import pytest
import torch
from model_variants import SIZES, VARIANTS, build_model, config_of, random_tokens
from torch import nn

from litgpt import adapter, model
from litgpt.adapter import Config, adapter_filter, add_adapter, mark_only_adapter_as_trainable
from litgpt.checkpoint.meta import meta_device


def adapted(variant="gqa", start_layer=1, is_open=True, **fields):
    """A model with prompts; open gates let them through."""
    built = add_adapter(build_model(variant, **fields), prompt_length=4, start_layer=start_layer).eval()
    for name, parameter in built.named_parameters():
        if "gating_factor" in name and is_open:
            nn.init.normal_(parameter)
    return built


def train(built, steps, lr=0.1):
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=lr)
    idx = random_tokens(2, 12)
    built.train()
    for _ in range(steps):
        total, n = built(idx, targets=idx.roll(-1, 1))
        (total / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    built.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_gates_change_nothing(variant):
    plain, idx = build_model(variant), random_tokens(2, 16)
    built = add_adapter(copy.deepcopy(plain))
    assert torch.equal(built(idx), plain(idx))


@pytest.mark.parametrize("variant", VARIANTS)
def test_open_gates_change_the_text_from_the_first_layer_with_prompts_on(variant):
    plain, idx = build_model(variant), random_tokens(2, 16)
    built = add_adapter(copy.deepcopy(plain), start_layer=1)
    seen = {}
    for i, block in enumerate(built.transformer.h):
        block.register_forward_hook(lambda module, args, out, i=i: seen.update({i: out}))
    before, first = built(idx), seen[0]
    for block in built.transformer.h[1:]:
        nn.init.normal_(block.attn.gating_factor)
    assert (built(idx) - before).abs().max() > 1e-3 and torch.equal(seen[0], first)


def test_names_in_the_state_dict_are_the_published_ones():
    built, plain = add_adapter(build_model()), build_model()
    new = built.state_dict().keys() - plain.state_dict().keys()
    assert new == {"transformer.h.2.attn.adapter_wte.weight", "transformer.h.2.attn.gating_factor"}
    assert {name for name in built.state_dict() if adapter_filter(name, None)} == new
    assert built.transformer.h[2].attn.adapter_wte.weight.shape == (10, 32)
    assert built.transformer.h[2].attn.gating_factor.shape == (1, 1, 4, 1)
    assert plain.state_dict().keys() <= built.state_dict().keys()


@pytest.mark.parametrize("variant", ["gqa", "window", "gemma2", "mla", "olmo2"])
def test_prompts_learn_also_after_a_validation_and_nothing_else_does(variant):
    built = adapted(variant, is_open=False)
    mark_only_adapter_as_trainable(built)
    with torch.no_grad():
        built(random_tokens(2, 12))  # what is seen here must not stay
    before = {name: value.clone() for name, value in built.state_dict().items()}
    train(built, steps=3)
    changed = {name for name, value in built.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if adapter_filter(name, None)}
    assert len(changed) == 4


@pytest.mark.parametrize("start_layer", [3, 7])
def test_a_model_without_the_first_layer_gets_prompts_in_all(start_layer):
    with pytest.warns(UserWarning, match=f"layer {start_layer} on, but the model has 3 layers: all of them"):
        built = add_adapter(build_model(), start_layer=start_layer)
    mark_only_adapter_as_trainable(built)
    assert sum("gating_factor" in name for name in built.state_dict()) == 3
    face = adapter.GPT(Config(**SIZES, adapter_start_layer=start_layer))
    assert face.state_dict().keys() == built.state_dict().keys()


def test_wrong_use_is_refused_in_one_line():
    with pytest.raises(ValueError, match="prompt_length 0 must be 1 or more"):
        add_adapter(build_model(), prompt_length=0)
    with pytest.raises(ValueError, match="start_layer -1 0 or more"):
        add_adapter(build_model(), start_layer=-1)
    with pytest.raises(ValueError, match=r"Sequential has no attention .* finetune_adapter_v2 work"):
        add_adapter(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="has adaption prompts already"):
        add_adapter(add_adapter(build_model()))
    with pytest.raises(ValueError, match="has no adaption prompts to be trained"):
        mark_only_adapter_as_trainable(build_model())


class Twice(model.CausalSelfAttention):
    """Overrides what is around the attention."""

    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


class Own(model.CausalSelfAttention):
    """A forward pass of one's own, as guides for custom attention show it."""

    def forward(self, x, cos, sin, mask=None, input_pos=None, input_pos_maxp1=None):
        q, k, v = self.attn(x).split((32, 32, 32), dim=-1)
        q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in (q, k, v))
        return self.proj(self.scaled_dot_product_attention(q, k, v).flatten(2))


class Deaf(Own):
    """Never asks the kernel that prompts hook."""

    def forward(self, x, *args):
        return self.proj(x)


def with_attention(kind):
    block = type("OwnBlock", (model.Block,), {"attention_class": kind})
    return type("OwnGPT", (model.GPT,), {"block_class": block})(config_of()).eval()


@pytest.mark.parametrize("kind", [Twice, Own])
def test_attention_of_ones_own_gets_prompts(kind):
    built, idx = with_attention(kind), random_tokens(2, 6)
    expected = built(idx)
    assert torch.equal(add_adapter(built, start_layer=0)(idx), expected)
    for block in built.transformer.h:
        nn.init.normal_(block.attn.gating_factor)
        assert isinstance(block.attn, kind)
    assert (built(idx) - expected).abs().max() > 1e-3
    mark_only_adapter_as_trainable(built)
    before = built.transformer.h[0].attn.adapter_wte.weight.clone()
    train(built, 1)
    assert not torch.equal(built.transformer.h[0].attn.adapter_wte.weight, before)


def test_attention_that_prompts_cannot_reach_says_so():
    built = add_adapter(with_attention(Deaf), start_layer=0)
    with pytest.raises(NotImplementedError, match=r"Deaf never calls self\.scaled_dot_product_attention"):
        built(random_tokens(1, 4))


def test_published_classes_are_the_model_with_prompts():
    config = Config(**SIZES | VARIANTS["gqa"], adapter_prompt_length=4, adapter_start_layer=1)
    face, built = adapter.GPT(config), adapted("gqa")
    face.load_state_dict(built.state_dict())
    idx = random_tokens(2, 6)
    assert torch.equal(face(idx), built(idx))
    assert isinstance(face.transformer.h[1], adapter.Block)
    assert isinstance(face.transformer.h[1].attn, adapter.PromptedAttention)
    assert adapter.CausalSelfAttention(config, 1).adapter_wte.weight.shape == (4, 32)
    assert not hasattr(adapter.CausalSelfAttention(config, 0), "adapter_wte")
    named = adapter.GPT.from_name("pythia-14m", n_layer=3, adapter_prompt_length=3)
    assert named.transformer.h[2].attn.adapter_wte.weight.shape[0] == 3
    latent = adapter.GPT(Config(**SIZES | VARIANTS["mla"]))
    assert isinstance(latent.transformer.h[2].attn, model.MultiheadLatentAttention)


def test_prompts_may_be_added_on_the_meta_device_and_drawn_later():
    with meta_device():
        built = add_adapter(model.GPT(config_of("gqa")), start_layer=1)
    assert all(parameter.is_meta for parameter in built.parameters())
    built.to_empty(device="cpu").init_weights()
    assert built.transformer.h[1].attn.gating_factor.eq(0).all()
    assert built.transformer.h[1].attn.adapter_wte.weight.std() > 0
    idx = random_tokens(1, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy(built)(idx).isfinite().all()
