"""LoRA on whole models: ours, variants of ours, and ones that know nothing of us."""

import copy
from dataclasses import asdict

import pytest
import torch
from torch import nn

import litgpt.lora as published
from litgpt.config import Config
from litgpt.lora import (
    LoRASettings,
    add_lora,
    disabled,
    is_lora,
    lora_filter,
    lora_layers,
    lora_plus_groups,
    mark_only_lora_as_trainable,
    merge_lora_weights,
)
from litgpt.model import GPT, Block, CausalSelfAttention
from litgpt.surgery import unwrap

LATENT = dict(q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
MOE = dict(
    mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, n_shared_expert=1, moe_intermediate_size=24, bias=False
)
ALL = dict(key=True, projection=True, mlp=True, head=True)


class GatedAttention(CausalSelfAttention):
    """An attention with a projection of its own."""

    def __init__(self, config, block_idx=0):
        super().__init__(config, block_idx)
        self.gate = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, *args, **kwargs):
        return super().forward(x, *args, **kwargs) * self.gate(x).sigmoid()


class GatedBlock(Block):
    attention_class = GatedAttention


class GatedGPT(GPT):
    block_class = GatedBlock


class Own(nn.Module):
    """A model of somebody else: recurrent, with torch's own encoder behind it, which reads weights of its layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 16)
        self.cell = nn.GRUCell(16, 16)
        self.mix = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, 300)

    def forward(self, idx):
        state, states = torch.zeros(len(idx), 16), []
        for x in self.embed(idx).unbind(1):
            state = self.cell(x, state)
            states.append(state)
        return self.out(self.mix(torch.stack(states, dim=1)))


def build(kind):
    config = dict(name="tiny", n_layer=2, n_embd=32, n_head=4, block_size=64, padded_vocab_size=320, vocab_size=300)
    torch.manual_seed(0)
    if kind == "own":
        return Own(), LoRASettings(r=3, alpha=6, dropout=0.0, targets=["linear*", "out_proj", "out"])
    if kind == "subclass":
        return GatedGPT(Config(**config)), LoRASettings(r=3, alpha=6, dropout=0.0, targets=["attn.*", r".*\.fc"])
    fields = {
        "plain": {}, "grouped": dict(n_query_groups=2), "tied": dict(tie_embeddings=True),
        "moe": MOE, "router": MOE | dict(n_expert_groups=2, n_topk_groups=1),
        "latent": MOE | dict(latent_attention=LATENT, first_k_dense_replace=1, intermediate_size=48),
    }[kind]  # fmt: skip
    return GPT(Config(**config | fields)), LoRASettings(r=3, alpha=6, dropout=0.0, **ALL)


KINDS = ["plain", "grouped", "tied", "moe", "router", "latent", "subclass", "own"]
IDX = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", [{}, {"use_dora": True}, {"use_rslora": True}], ids=lambda how: next(iter(how), "lora"))
@pytest.mark.parametrize("kind", KINDS)
def test_model_equals_the_base_then_itself_after_the_merge_and_trains_lora_alone(kind, how):
    model, settings = build(kind)
    base = copy.deepcopy(model)
    add_lora(model, LoRASettings(**asdict(settings) | how))
    mark_only_lora_as_trainable(model)
    tolerance = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(IDX), base(IDX), **tolerance)

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if is_lora(name)} != set()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # A has no gradient before B has moved
        optimizer.zero_grad()
        model(IDX).square().mean().backward()
        optimizer.step()
    used = [name for name, p in model.named_parameters() if p.grad is not None]
    assert used and all(is_lora(name) for name in used)
    frozen = {name.replace(".linear.", "."): p for name, p in model.named_parameters() if not is_lora(name)}
    assert all(torch.equal(p, frozen[name]) for name, p in base.named_parameters())

    model.eval(), base.eval()
    tuned = model(IDX)
    assert (tuned - base(IDX)).abs().max() > 1e-3
    with disabled(model):
        torch.testing.assert_close(model(IDX), base(IDX), **tolerance)
    torch.testing.assert_close(model(IDX), tuned, **tolerance)
    merge_lora_weights(model)
    torch.testing.assert_close(model(IDX), tuned, **tolerance)
    unwrap(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(model(IDX), tuned, **tolerance)


def test_switches_reach_experts_shared_experts_and_latent_projections():
    model, _ = build("latent")
    names = set()
    add_lora(model, LoRASettings(r=2, mlp=True, query=True, value=False))
    names = {name for name, module in model.named_modules() if module in set(lora_layers(model))}
    assert {"transformer.h.1.mlp.experts.3.fc_2", "transformer.h.1.mlp.shared_experts.proj"} < names
    assert {"transformer.h.0.mlp.fc_1", "transformer.h.0.attn.q_a_proj", "transformer.h.0.attn.q_b_proj"} < names
    assert not any("kv_" in name or name.endswith("attn.proj") for name in names)


def test_parts_of_the_fused_projection_are_chosen_one_by_one():
    model, _ = build("grouped")
    add_lora(model, LoRASettings(r=2, query=False, key=True, value=True))
    qkv = model.transformer.h[0].attn.qkv
    assert qkv.lora_A.shape == (4, 32) and qkv.lora_B.shape == (16 + 16, 2) and qkv.parts == ((32, 48), (48, 64))


def test_what_matches_nothing_is_an_error_that_says_what_there_is():
    with pytest.raises(ValueError, match=r"called w_qkv; there are: .*transformer\.h\.\*\.attn\.qkv"):
        add_lora(build("plain")[0], LoRASettings(targets=["attn.proj", "w_qkv"]))
    with pytest.raises(ValueError, match=r"Own has no layers for lora_query, lora_value.*--lora_targets.*out"):
        add_lora(Own(), LoRASettings())
    model, settings = build("plain")
    with pytest.raises(ValueError, match="no layers for lora_query"):
        add_lora(add_lora(model, settings), settings)
    with pytest.raises(ValueError, match="r 0"):
        LoRASettings(r=0)


@pytest.mark.parametrize(("bias", "wanted"), [("none", 0), ("all", 13), ("lora_only", 2)])
def test_biases_are_trained_as_asked(bias, wanted):
    model, _ = build("plain")
    add_lora(model, LoRASettings(r=2))
    mark_only_lora_as_trainable(model, bias)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not is_lora(name)]
    assert len(trained) == wanted and all(name.endswith("bias") for name in trained)
    with pytest.raises(ValueError, match="some"):
        mark_only_lora_as_trainable(model, "some")


def test_groups_of_lora_plus_let_b_learn_faster():
    model, settings = build("plain")
    add_lora(model, settings)
    mark_only_lora_as_trainable(model)
    slow, fast = lora_plus_groups(model, 1e-3, 16)
    layers = list(lora_layers(model))
    assert slow["lr"] == 1e-3 and fast["lr"] == pytest.approx(1.6e-2)
    assert {id(p) for p in fast["params"]} == {id(layer.lora_B) for layer in layers}
    assert {id(p) for p in slow["params"]} == {id(layer.lora_A) for layer in layers}


def test_loss_without_logits_is_that_of_the_logits():
    model, _ = build("plain")
    add_lora(model, LoRASettings(r=2, dropout=0.0, **ALL))
    total, n = model(IDX[:, :-1], targets=IDX[:, 1:])
    wanted = model.loss(model(IDX[:, :-1]), IDX[:, 1:])
    torch.testing.assert_close(total / n, wanted)


# ---------------------------------------------------------------- published in 0.5


def published_config(**fields):
    sizes = dict(name="tiny", n_layer=2, n_embd=32, n_head=4, block_size=64, padded_vocab_size=320, vocab_size=300)
    return published.Config(**sizes | dict(lora_r=4, lora_alpha=8, lora_query=True, lora_value=True) | fields)


def test_published_model_is_the_base_model_with_lora():
    model = published.GPT(published_config(lora_mlp=True))
    base = GPT(Config(**{k: v for k, v in asdict(model.config).items() if not k.startswith("lora_")}))
    add_lora(base, LoRASettings.from_flags(model.config))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
    assert isinstance(model, GPT) and isinstance(model.transformer.h[0], published.Block)
    assert isinstance(model.transformer.h[0].attn.qkv, published.LoRAQKVLinear)
    assert model.transformer.h[0].attn.qkv.scaling == 2
    assert not list(lora_layers(published.GPT(published_config(lora_r=0))))
    assert len(list(lora_layers(published.GPT.from_name("pythia-14m", n_layer=1, lora_r=2, lora_key=True)))) == 1


def test_checkpoints_with_plain_names_and_with_those_of_lora_both_load():
    model = published.GPT(published_config(lora_head=True))
    plain = GPT(published_config()).state_dict()
    everywhere = {  # 0.5 wraps every linear layer, with or without an update
        (n if "norm" in n or "wte" in n or "ln_f" in n else n.replace(".weight", ".linear.weight").replace(
            ".bias", ".linear.bias")): tensor + 1 for n, tensor in plain.items()
    }  # fmt: skip
    for state, shift in ((plain, 0), (everywhere, 1)):
        keys = model.load_state_dict(state, strict=False)
        assert not keys.unexpected_keys and all(lora_filter(name, None) for name in keys.missing_keys)
        found = {name.replace(".linear.", "."): tensor for name, tensor in model.state_dict().items()}
        assert all(torch.equal(found[name], tensor + shift) for name, tensor in plain.items())


@pytest.mark.parametrize(("name", "count"), [
    ("CausalSelfAttention", 1), ("GptNeoxMLP", 2), ("LLaMAMLP", 3), ("GemmaMLP", 3), ("LLaMAMoE", 4 * 3 + 3 + 1),
])  # fmt: skip
def test_published_parts_are_those_of_the_model_with_lora(name, count):
    fields = dict(MOE, mlp_class_name=name) if name == "LLaMAMoE" else {}
    part = getattr(published, name)(published_config(lora_mlp=True, intermediate_size=48, **fields))
    assert len(list(lora_layers(part))) == count
    assert part(torch.randn(1, 3, 32)).shape == (1, 3, 32)


def test_single_layer_is_made_as_published():
    config = published_config(lora_mlp=True, bias=True)
    layer = published.create_lora_linear(config, 6, 5)
    assert layer.lora_A.shape == (4, 6) and layer.linear.bias is not None
    layer = published.create_lora_linear(config, 6, 5, bias=False, use_r=False)
    assert not hasattr(layer, "lora_A") and layer.linear.bias is None
    assert issubclass(published.LoRAQKVLinear, published.LoRALayer)


def test_settings_come_from_flags():
    flags = {"lora_r": 4, "lora_alpha": 32, "lora_rslora": True, "lora_targets": ["qkv"], "checkpoint_dir": "x"}
    settings = LoRASettings.from_flags(flags)
    assert settings == LoRASettings(r=4, alpha=32, use_rslora=True, targets=["qkv"])
    assert settings.scaling == 16
