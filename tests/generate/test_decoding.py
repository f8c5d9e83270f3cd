import pytest
import torch
from torch import nn

from litgpt.config import Config
from litgpt.generate import decoding
from litgpt.generate.decoding import CompiledStep, Decoder, LengthError, check_lengths, token_stream
from litgpt.generate.sampling import Sampler
from litgpt.model import GPT

LLAMA = dict(
    mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", parallel_residual=False, bias=False, rotary_percentage=1.0
)
LATENT = dict(q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
KINDS = {
    "MHA": {},
    "GQA": dict(LLAMA, n_query_groups=2),
    "MQA": dict(LLAMA, n_query_groups=1),
    "window": dict(LLAMA, sliding_window_size=5),
    "window in one layer, softcaps": dict(
        LLAMA, sliding_window_size=4, sliding_window_indices=[1, 0], attention_logit_softcapping=20.0,
        final_logit_softcapping=15.0,
    ),
    "latent": dict(LLAMA, latent_attention=LATENT),
    "tied, QK-norm, local RoPE base": dict(
        LLAMA, norm_qk=True, rope_local_base_freq=100.0, rope_indices=[1, 0], tie_embeddings=True
    ),
}  # fmt: skip


def tiny_config(**kwargs):
    sizes = dict(
        n_layer=2, n_embd=32, n_head=4, block_size=64, vocab_size=61, padded_vocab_size=64, intermediate_size=48
    )
    return Config(**{**sizes, **kwargs})


def tiny_gpt(n_cache=40, batch_size=1, **kwargs):
    torch.manual_seed(1)
    model = GPT(tiny_config(**kwargs)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    if n_cache:
        model.set_kv_cache(batch_size=batch_size, max_seq_length=n_cache)
    return model


class Bare(nn.Module):
    """Any module with `forward(idx) -> logits`; counts the tokens it is fed."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.n_read = model, 0

    def forward(self, idx):
        self.n_read += idx.numel()
        return self.inner(idx)


def greedy_by_recomputation(model, idx, n):
    for _ in range(n):
        idx = torch.cat((idx, model(idx)[:, -1].argmax(-1, keepdim=True)), dim=1)
    return idx


def continued(decoder, prompts, max_returned_tokens, sampler=Sampler(temperature=0)):
    tokens = list(token_stream(decoder, prompts, max_returned_tokens, sampler))
    return torch.cat((prompts, torch.stack(tokens, dim=1)), dim=1)


@pytest.fixture
def prompts():
    return torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [4096, 13, 12, 5, 1])
@torch.inference_mode()
def test_greedy_decoding_equals_recomputation(kind, chunk, prompts):
    model = tiny_gpt(batch_size=2, **KINDS[kind])
    expected = greedy_by_recomputation(model, prompts, 20)
    decoder = Decoder(model, prefill_chunk_tokens=chunk)
    for _ in range(2):  # the second time over a used cache
        assert torch.equal(continued(decoder, prompts, 33), expected)
    logits, reference = decoder.prefill(prompts), model(prompts)[:, -1]
    assert (logits - reference).abs().max() < 1e-5 * reference.abs().max()


@torch.inference_mode()
def test_cache_of_another_size_gives_the_same(prompts):
    expected = greedy_by_recomputation(tiny_gpt(0), prompts[:1], 10)
    for n_cache in (22, 23, 64):
        assert torch.equal(continued(Decoder(tiny_gpt(n_cache)), prompts[:1], 23), expected)


@torch.inference_mode()
def test_shorter_prompt_after_a_longer_one_sees_nothing_of_it(prompts):
    model = tiny_gpt(sliding_window_size=5)
    decoder = Decoder(model)
    continued(decoder, prompts[:1], 30)
    for n in (1, 2, 6):
        expected = greedy_by_recomputation(model, prompts[1:, :n], 8)
        assert torch.equal(continued(decoder, prompts[1:, :n], n + 8), expected)


@torch.inference_mode()
def test_module_without_cache_is_decoded_by_recomputation(prompts):
    model = Bare(tiny_gpt(0))
    assert torch.equal(continued(Decoder(model), prompts, 20), greedy_by_recomputation(model.inner, prompts, 7))


@torch.inference_mode()
def test_with_a_cache_each_token_is_fed_once_and_only_one_row_of_logits_is_built(prompts, monkeypatch):
    model = tiny_gpt(batch_size=2)
    fed, built = [], []
    model.transformer.wte.register_forward_hook(lambda module, args, out: fed.append(args[0].size(1)))
    model.lm_head.register_forward_hook(lambda module, args, out: built.append(args[0].size(1)))
    continued(Decoder(model), prompts, 17)
    assert fed == [13, 1, 1, 1]  # the last token is not fed
    assert built == [1, 1, 1, 1]


def test_nothing_is_computed_before_it_is_asked_for(prompts):
    model = Bare(tiny_gpt(0))
    stream = token_stream(Decoder(model), prompts, 20, Sampler())
    assert model.n_read == 0
    next(stream)
    assert model.n_read == prompts.numel()


@torch.inference_mode()
def test_rows_may_have_their_own_settings(prompts):
    model = tiny_gpt(batch_size=2)
    greedy = greedy_by_recomputation(model, prompts, 6)
    out = continued(Decoder(model), prompts, 19, [Sampler(temperature=0), Sampler(temperature=5.0)])
    assert torch.equal(out[0], greedy[0]) and not torch.equal(out[1], greedy[1])


@pytest.mark.parametrize("kind", ["GQA", "window", "latent"])
@torch.inference_mode()
def test_replaced_decode_step_with_static_shapes_gives_the_same(kind, prompts):
    model = tiny_gpt(batch_size=2, **KINDS[kind])
    shapes = set()

    def step(model, token, input_pos):
        shapes.add((tuple(token.shape), tuple(input_pos.shape)))
        return decoding.decode_step(model, token, input_pos)

    expected = greedy_by_recomputation(model, prompts, 20)
    assert torch.equal(continued(Decoder(model, step=step), prompts, 33), expected)
    assert shapes == {((2, 1), (1,))}


@torch.inference_mode()
def test_step_that_does_not_compile_runs_as_it_is(prompts, monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(decoding.torch, "compile", lambda *args, **kwargs: broken)
    model = tiny_gpt(batch_size=2)
    expected = greedy_by_recomputation(model, prompts, 5)
    with pytest.warns(UserWarning, match="runs uncompiled: RuntimeError: no compiler$"):
        out = continued(Decoder(model, step=CompiledStep(prompts.device)), prompts, 18)
    assert torch.equal(out, expected)


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_step_gives_the_same_and_compiles_once(prompts):
    model = tiny_gpt(batch_size=2, **KINDS["GQA"])
    expected = greedy_by_recomputation(model, prompts, 20)
    torch._dynamo.reset()
    step = CompiledStep(prompts.device)
    decoder = Decoder(model, step=step)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        assert torch.equal(continued(decoder, prompts, 33), expected)
    assert step._has_worked
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_lengths_that_do_not_fit_are_explained(prompts):
    model = tiny_gpt(20)
    cases = [
        ((0, 5), "the prompt is empty"),
        ((5, 5), "max_returned_tokens 5 leaves no room.*has 5"),
        ((5, 22), r"a prompt of 5 tokens and 17 new ones need 21, but the KV cache .* 20: .*at most 16 new tokens"),
        ((30, 35), r"holds 20: shorten the prompt$"),
    ]
    for arguments, message in cases:
        for published in (ValueError, AssertionError, NotImplementedError):
            with pytest.raises(published, match=message):
                check_lengths(model, *arguments)
    check_lengths(model, 5, 21)
    with pytest.raises(LengthError, match="the model's context is 64"):
        bare = Bare(model)
        bare.config = model.config
        check_lengths(bare, 5, 66)
    with pytest.raises(ValueError, match="prefill_chunk_tokens 0"):
        Decoder(model, prefill_chunk_tokens=0)


def test_missing_cache_says_what_to_call(prompts):
    with pytest.raises(TypeError, match="set_kv_cache"):
        next(token_stream(Decoder(tiny_gpt(0)), prompts, 20, Sampler()))
