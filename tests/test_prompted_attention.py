import pytest
import torch
import torch.nn.functional as F
from model_variants import assert_close, build_model, random_tokens
from torch import nn

from litgpt import model
from litgpt.adapter import add_adapter


def adapted(variant="gqa", start_layer=1, is_open=True, **fields):
    """A model with prompts; open gates let them through."""
    built = add_adapter(build_model(variant, **fields), prompt_length=4, start_layer=start_layer).eval()
    for name, parameter in built.named_parameters():
        if "gating_factor" in name and is_open:
            nn.init.normal_(parameter)
    return built


def test_prompt_keys_and_values_come_from_their_rows_of_the_projection():
    attention = adapted("gqa", bias=True).transformer.h[1].attn
    config, x = attention.config, torch.randn(2, 7, 32)
    nh, G, hs = config.n_head, config.n_query_groups, config.head_size
    weight, bias = attention.qkv.weight, attention.qkv.bias
    prompts = attention.adapter_wte.weight
    k = F.linear(prompts, weight[nh * hs : -G * hs], bias[nh * hs : -G * hs]).view(-1, G, hs)
    v = F.linear(prompts, weight[-G * hs :], bias[-G * hs :]).view(-1, G, hs)
    cos, sin = model.rope_tables(config, torch.arange(7), 7)
    q = F.linear(x, weight[: nh * hs], bias[: nh * hs]).view(2, 7, nh, hs).transpose(1, 2)
    q = model.apply_rope(q, cos, sin)
    heard = []
    for head in range(nh):
        group = head // (nh // G)
        scores = (q[:, head] @ k[:, group].t()) / hs**0.5
        heard.append(scores.softmax(-1) @ v[:, group] * attention.gating_factor[0, 0, head, 0])
    expected = F.linear(torch.stack(heard, dim=2).flatten(2), attention.proj.weight)
    with_prompts = attention(x)
    nn.init.zeros_(attention.gating_factor)
    assert_close(with_prompts - attention(x), expected)


def test_gradient_of_prompts_is_that_of_finite_differences():
    built = adapted("gqa").double()
    weight, idx = built.transformer.h[1].attn.adapter_wte.weight, random_tokens(1, 8)
    (grad,) = torch.autograd.grad(built(idx).log_softmax(-1).gather(2, idx.roll(-1, 1)[..., None]).sum(), weight)
    with torch.no_grad():
        step = torch.zeros_like(weight)
        step[1, 5] = 1e-4
        up, down = (F.log_softmax(_logits(built, weight, s, idx), -1) for s in (step, -step))
        picked = [z.gather(2, idx.roll(-1, 1)[..., None]).sum() for z in (up, down)]
    assert abs((picked[0] - picked[1]) / 2e-4 - grad[1, 5]) < 1e-4 * grad.abs().max()


def _logits(built, weight, step, idx):
    weight.add_(step)
    logits = built(idx)
    weight.sub_(step)
    return logits


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gqa", "window", "gemma2", "gemma3", "mla"])
@pytest.mark.parametrize("chunks", [[12], [1] * 12, [7, 1, 4], [3, 1, 1, 1, 6]], ids=str)
def test_generation_with_a_cache_hears_the_prompts(variant, chunks):
    built, idx = adapted(variant), random_tokens(2, 12)
    expected = built(idx)
    built.set_kv_cache(2)
    parts = idx.split(chunks, dim=1)
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    logits = [built(part, torch.arange(start, start + part.size(1))) for start, part in zip(starts, parts)]
    assert_close(torch.cat(logits, dim=1), expected)


@torch.no_grad()
def test_a_second_text_hears_prompts_that_have_changed_since():
    built, idx = adapted(), random_tokens(1, 6)
    built.set_kv_cache(1)
    steps = [torch.tensor([i]) for i in range(6)]
    for position in steps:
        built(idx[:, position], position)
    nn.init.normal_(built.transformer.h[1].attn.adapter_wte.weight, std=3)
    again = torch.cat([built(idx[:, i], i) for i in steps], dim=1)
    assert_close(again, built(idx))


def test_a_pass_without_a_cache_leaves_nothing_behind():
    built = adapted()
    built(random_tokens(1, 6)).sum().backward()
    assert all(block.attn.prompt_kv is None for block in built.transformer.h[1:])
    with torch.no_grad():
        built(random_tokens(1, 6))
    assert all(block.attn.prompt_kv is None for block in built.transformer.h[1:])


def test_training_between_two_texts_with_one_cache_is_heard():
    built, idx = adapted(), random_tokens(1, 6)
    built.set_kv_cache(1)
    with torch.inference_mode():
        built(idx[:, :5], torch.arange(5))
        built(idx[:, 5:], torch.tensor([5]))
    total, _ = built(idx, targets=idx.roll(-1, 1))
    total.backward()
    with torch.no_grad():
        built.transformer.h[1].attn.adapter_wte.weight.sub_(built.transformer.h[1].attn.adapter_wte.weight.grad.sign())
        later = torch.cat([built(idx[:, :5], torch.arange(5)), built(idx[:, 5:], torch.tensor([5]))], dim=1)
        assert_close(later, built(idx))


def test_prompts_work_in_low_precision_and_under_autocast():
    idx = random_tokens(2, 8)
    half = adapted().bfloat16()
    assert half(idx).dtype == torch.bfloat16
    attention, x = adapted().transformer.h[1].attn, torch.randn(2, 8, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, attention(x), 0.02)
    low = add_adapter(build_model().bfloat16())
    assert low.transformer.h[2].attn.adapter_wte.weight.dtype == torch.bfloat16


def test_gates_of_older_checkpoints_load():
    built, other = adapted(), adapted()
    state = {name: value.transpose(1, 2) if "gating" in name else value for name, value in built.state_dict().items()}
    assert state["transformer.h.1.attn.gating_factor"].shape == (1, 4, 1, 1)
    other.load_state_dict(state)
    idx = random_tokens(1, 5)
    assert torch.equal(other(idx), built(idx))
