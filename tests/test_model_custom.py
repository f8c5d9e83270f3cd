"""Models built from the parts of `model.py` as guides for custom models show it, in the fewest lines that do."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from model_variants import SIZES, assert_close, build_model, random_tokens
from torch import nn

from litgpt.config import Config
from litgpt.model import GPT, MLP, Block, CausalSelfAttention, Context, apply_rope

# ---- one part named by a class attribute


class GatedAttention(CausalSelfAttention):
    def __init__(self, config, block_idx):
        super().__init__(config, block_idx)
        self.gate = nn.Parameter(torch.full((config.n_embd,), config.gate_init))

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) * self.gate.sigmoid()


@dataclass
class GatedConfig(Config):
    gate_init: float = 0.0


class GatedBlock(Block):
    attention_class = GatedAttention


class GatedGPT(GPT):
    block_class = GatedBlock


def test_an_attention_of_ones_own_is_two_lines_away():
    plain, idx = build_model("gqa"), random_tokens(2, 12)
    model = GatedGPT(GatedConfig(**SIZES, n_query_groups=2, gate_init=50.0)).eval()
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == [f"transformer.h.{i}.attn.gate" for i in range(3)]
    assert_close(model(idx), plain(idx))  # open gates
    nn.init.constant_(model.transformer.h[1].attn.gate, -50.0)
    assert (model(idx) - plain(idx)).abs().max() > 1e-2
    model.set_kv_cache(2)
    steps = [model(idx[:, i : i + 1], torch.tensor([i])) for i in range(12)]
    assert_close(torch.cat(steps, dim=1), model(idx))


def test_an_mlp_of_ones_own_is_one_line_away():
    class Silent(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, x):
            return torch.zeros_like(x)

    class SilentBlock(Block):
        mlp_class = Silent

    class SilentGPT(GPT):
        block_class = SilentBlock

    model, idx = SilentGPT(build_model().config), random_tokens(1, 6)
    assert not [key for key in model.state_dict() if ".mlp." in key]
    assert model(idx).shape == (1, 6, 100)


def test_a_step_of_ones_own_may_carry_more_through_the_pass():
    @dataclass
    class NoisyContext(Context):
        noise: float = 0.0

    class NoisyGPT(GPT):
        def build_context(self, *args, **kwargs):
            return NoisyContext(**vars(super().build_context(*args, **kwargs)), noise=0.5)

        def embed(self, idx, ctx):
            return super().embed(idx, ctx) + ctx.noise

    plain, idx = build_model(), random_tokens(1, 6)
    model = NoisyGPT(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    assert (model(idx) - plain(idx)).abs().max() > 1e-2


# ---- parts called by themselves


@pytest.mark.parametrize("variant", ["mha", "gqa", "neox", "window", "gemma2", "mla"])
def test_blocks_and_attentions_need_nothing_but_x(variant):
    model, idx = build_model(variant), random_tokens(2, 12)
    ctx = model.build_context(idx)
    x = model.embed(idx, ctx)
    for block in model.transformer.h:
        assert_close(block(x), block(x, ctx.cos, ctx.sin))
        assert_close(block.attn(x), block.attn(x, ctx.cos, ctx.sin))


@pytest.mark.parametrize("variant", ["mha", "window", "gemma2", "mla"])
def test_blocks_take_positions_alone_and_use_the_cache(variant):
    model, idx = build_model(variant), random_tokens(2, 12)
    full = model(idx)
    model.set_kv_cache(2)

    def forward(idx, input_pos):
        x = model.embed(idx, None)
        for block in model.transformer.h:
            x = block(x, input_pos=input_pos)
        return model.unembed(x, None)

    parts = [forward(idx[:, a:b], torch.arange(a, b)) for a, b in ((0, 7), (7, 8), (8, 12))]
    assert_close(torch.cat(parts, dim=1), full)


def test_blocks_without_cosines_choose_longrope_factors_by_the_cache():
    adjustments = dict(short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0], original_max_seq_len=16, factor=2.0)
    block = build_model("window", rope_adjustments=adjustments).transformer.h[0]
    x = torch.randn(1, 24, 32)
    block.attn.kv_cache = block.attn.build_kv_cache(1, 24)
    steps = [block(x[:, i : i + 1], input_pos=torch.tensor([i])) for i in range(24)]
    assert_close(torch.cat(steps, dim=1), block(x))


@pytest.mark.parametrize("variant", ["mha", "gqa", "gemma2", "mla"])
def test_a_mask_tensor_takes_the_place_of_causality(variant):
    """As blocks written for 0.5 call it: `block(x, cos, sin, mask, input_pos)`."""
    model, idx = build_model(variant, sliding_window_size=None, sliding_window_indices=None), random_tokens(2, 12)
    ctx = model.build_context(idx)
    x, block = model.embed(idx, ctx), model.transformer.h[1]
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    assert_close(block(x, ctx.cos, ctx.sin, causal), block(x))
    assert_close(block(x, ctx.cos, ctx.sin, causal[None, None].expand(2, -1, -1, -1)), block(x))
    everything = block(x, ctx.cos, ctx.sin, torch.ones_like(causal))
    assert_close(everything[:, -1], block(x)[:, -1])
    assert (everything[:, 0] - block(x)[:, 0]).abs().max() > 1e-3
    model.set_kv_cache(2, max_seq_length=16)
    rows = torch.ones(16, 16, dtype=torch.bool).tril()
    for a, b in ((0, 5), (5, 12)):
        pos = torch.arange(a, b)
        part = block(x[:, a:b], ctx.cos[a:b], ctx.sin[a:b], rows[a:b], pos)
        assert_close(part, block(x)[:, a:b])


# ---- everything of one's own


@dataclass
class CustomConfig(Config):
    custom_param: float = 0.1


class CustomMLP(MLP):
    def forward(self, x):
        return self.fc_2(self.act(self.fc_1(x)) * self.config.custom_param)


class CustomAttention(CausalSelfAttention):
    def forward(self, x, cos=None, sin=None, mask=None, input_pos=None, input_pos_maxp1=None):
        return super().forward(x, cos, sin, mask, input_pos, input_pos_maxp1)


class SeparateAttention(CausalSelfAttention):
    """Own projections, the rest is inherited."""

    def __init__(self, config, block_idx=0):
        super().__init__(config, block_idx)
        del self.qkv
        self.q, self.k, self.v = (nn.Linear(config.n_embd, config.n_embd) for _ in range(3))

    def project(self, x, cos, sin):
        q, k, v = (f(x).unflatten(-1, (self.config.n_head, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        cos, sin = cos.squeeze(-2), sin.squeeze(-2)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v


class CustomBlock(Block):
    attention = CustomAttention

    def __init__(self, config, block_idx=0):
        super().__init__(config, block_idx)
        self.attn = self.attention(config)
        self.mlp = CustomMLP(config)
        self.extra_norm = nn.LayerNorm(config.n_embd)

    def forward(self, x, input_pos=None):
        x = self.extra_norm(x)
        x = x + self.attn(self.norm_1(x), input_pos=input_pos)
        return x + self.mlp(self.norm_2(x))


class SeparateBlock(CustomBlock):
    attention = SeparateAttention


class CustomGPT(GPT):
    block = CustomBlock

    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                h=nn.ModuleList([self.block(config) for _ in range(config.n_layer)]),
                ln_f=nn.LayerNorm(config.n_embd),
            )
        )
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05)

    def forward(self, idx, input_pos=None):
        x = self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x, input_pos=input_pos)
        return self.lm_head(self.transformer.ln_f(x))


class SeparateGPT(CustomGPT):
    block = SeparateBlock


def build_custom(cls: type[GPT] = CustomGPT) -> GPT:
    return cls(CustomConfig(name="custom", n_layer=2, n_head=4, n_embd=128, vocab_size=1000, block_size=256))


@pytest.mark.parametrize("cls", [CustomGPT, SeparateGPT])
def test_a_model_of_ones_own_gives_logits_and_learns(cls):
    model, idx = build_custom(cls), torch.randint(0, 1000, (2, 16))
    assert model(idx).shape == (2, 16, model.config.padded_vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("cls", [CustomGPT, SeparateGPT])
@pytest.mark.parametrize("length", [None, 20])
def test_a_model_of_ones_own_generates_with_the_cache(cls, length):
    model, idx = build_custom(cls).eval(), torch.randint(0, 1000, (2, 16))
    model.set_kv_cache(2, max_seq_length=length)
    parts = [model(idx[:, :9], torch.arange(9))]
    parts += [model(idx[:, i : i + 1], torch.tensor([i])) for i in range(9, 16)]
    full = model(idx)
    assert_close(torch.cat(parts, dim=1), full)
    model.clear_kv_cache()


def test_a_model_of_ones_own_has_the_rest_of_the_interface():
    model = build_custom()
    assert model.max_seq_length == 256
    model.max_seq_length = 128
    assert model.cos.shape == (128, 32 * model.config.rotary_percentage)
    assert model.get_nparams_and_flops(16).total == sum(p.numel() for p in model.parameters())
    assert model.to(torch.float64).lm_head.weight.dtype == torch.float64
    model.float().init_weights()
    assert model.lm_head.weight.std().item() == pytest.approx(0.05, rel=0.05)  # as the model's own _init_weights says
    assert (model.transformer.ln_f.weight == 1).all()
    other = build_custom()
    other.load_state_dict(model.state_dict())
    idx = torch.randint(0, 1000, (1, 8))
    assert torch.equal(model.eval()(idx), other.eval()(idx))


def test_a_tied_head_may_be_wrapped():
    """As tuning methods do: moving the model then neither fails nor adds a weight."""

    class Wrapped(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x)

        @property
        def weight(self):
            return self.linear.weight

    model, idx = build_model(tie_embeddings=True), random_tokens(1, 6)
    expected = model(idx)
    model.lm_head = Wrapped(model.lm_head)
    names = set(model.state_dict())
    model.double().float()
    assert set(model.state_dict()) == names
    assert model.lm_head.linear.weight is model.transformer.wte.weight
    assert_close(model(idx), expected)
