import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt.low_rank import AddUpdate, LoRALinear, LoRAQKVLinear, plain_weight, row_norms

PARTS = {"all": (True, True, True), "query and value": (True, False, True), "key": (False, True, False)}


def build(kind="linear", **kwargs):
    """A layer of 6 -> 24 whose update is not zero."""
    torch.manual_seed(0)
    if kind == "linear":
        layer = LoRALinear(6, 24, r=2, lora_alpha=6, **kwargs)
    else:  # 4 heads of 3, 2 groups
        layer = LoRAQKVLinear(6, 24, 3, 4, 2, r=2, lora_alpha=6, enable_lora=PARTS[kind], **kwargs)
    nn.init.normal_(layer.lora_B)
    if layer.use_dora:
        layer.lora_magnitude.data += 0.3
    return layer


def by_hand(layer, x):
    """The definition, with matrices as large as the weight."""
    update = torch.zeros_like(layer.linear.weight)
    at = 0
    for i, (start, stop) in enumerate(layer.parts):
        a, b = layer.lora_A[2 * i : 2 * i + 2], layer.lora_B[at : at + stop - start]
        update[start:stop] = 3.0 * b @ a
        at += stop - start
    weight = layer.linear.weight + update
    if layer.use_dora:
        rows = torch.cat([torch.arange(start, stop) for start, stop in layer.parts])
        length = row_norms(weight).detach().clone()
        length[rows] = layer.lora_magnitude
        weight = weight * (length / row_norms(weight).detach()).unsqueeze(1)
    return F.linear(x, weight, layer.linear.bias)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", *PARTS])
def test_forward_and_gradients_are_those_of_the_definition(kind, dora):
    layer, x = build(kind, use_dora=dora), torch.randn(2, 5, 6, requires_grad=True)
    found, wanted = layer(x), by_hand(layer, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    names = ["lora_A", "lora_B"] + ["lora_magnitude"] * dora
    leaves = [x, *(getattr(layer, name) for name in names)]
    grad = torch.randn_like(wanted)
    for got, want in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_update_passes_the_numerical_gradient_check():
    y, x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    a, b = torch.randn(4, 4, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, a, b)]

    def run(y, x, a, b):
        return AddUpdate.apply(y * 1.0, x, a, b, 0.7, ((0, 3), (6, 8)))

    assert torch.autograd.gradcheck(run, (y, *leaves))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", *PARTS])
def test_merged_layer_computes_the_same(kind, dora):
    layer, x = build(kind, use_dora=dora), torch.randn(7, 6)
    wanted = layer(x)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), wanted, rtol=1e-5, atol=1e-5)
    layer.merge()
    once = layer.linear.weight.clone()
    layer.merge()
    assert torch.equal(layer.linear.weight, once)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_new_layer_is_the_one_it_wraps(kwargs):
    linear, x = nn.Linear(6, 24), torch.randn(3, 6)
    layer = LoRALinear(6, 24, r=4, lora_alpha=6, linear=linear, **kwargs)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-6)
    assert layer.lora_A.abs().max() <= 6**-0.5 and layer.lora_A.std() > 0.1  # uniform up to 1 / sqrt(in)
    assert layer.scaling == (3.0 if "use_rslora" in kwargs else 1.5)


def test_shapes_of_the_fused_projection_are_the_published_ones():
    layer = build("query and value")
    assert layer.lora_A.shape == (4, 6) and layer.lora_B.shape == (12 + 6, 2)
    assert layer.lora_ind.tolist() == [*range(12), *range(18, 24)]
    padded = layer.zero_pad(torch.ones(2, 18))
    assert padded[:, 12:18].eq(0).all() and padded.sum() == 36
    x = torch.randn(2, 6, 5)  # (B, C, T)
    h = layer.conv1d(F.conv1d(x, layer.lora_A.unsqueeze(-1)), layer.lora_B.unsqueeze(-1))
    wanted = F.linear(x.transpose(1, 2), layer.get_lora_AB())
    torch.testing.assert_close(layer.zero_pad(h.transpose(1, 2)) * layer.scaling, wanted, rtol=1e-5, atol=1e-5)


def test_dropout_touches_the_update_alone():
    layer, x = build(lora_dropout=0.5), torch.randn(400, 6)
    layer.train()
    found = layer(x)
    assert not torch.equal(found, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    layer.lora_B.data.zero_()
    assert torch.equal(layer(x), layer.linear(x))


@pytest.mark.parametrize("dora", [False, True])
def test_layer_computes_in_the_dtype_of_autocast_whatever_it_is_stored_in(dora):
    layer, x = build("query and value", use_dora=dora), torch.randn(4, 6)
    stored = copy.deepcopy(layer)
    stored.linear.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = stored(x), layer(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    found.float().sum().backward()
    assert stored.lora_A.grad.dtype == torch.float32


def test_compiled_layer_computes_the_same():
    layer, x = build("query and value"), torch.randn(4, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_lengths_follow_weights_that_are_loaded_later():
    layer, other = LoRALinear(6, 24, r=2, use_dora=True), nn.Linear(6, 24)
    layer.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(layer.lora_magnitude.data, row_norms(other.weight.data))
    layer.lora_B.data.fill_(1.0)
    layer.lora_magnitude.data.fill_(2.0)
    layer.load_state_dict(other.state_dict(), strict=False)  # it has learned something: that is kept
    assert layer.lora_magnitude.eq(2).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dora", [False, True])
def test_layer_of_four_bits_trains_and_merges(kind, dora):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type=kind).to("cpu")
    x = torch.randn(8, 64)
    layer = LoRALinear(64, 32, r=4, lora_alpha=8, linear=linear, use_dora=dora)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-4)
    nn.init.normal_(layer.lora_B, std=0.3)
    wanted = layer(x)
    wanted.sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
    exact = layer.weight.detach().clone()
    layer.merge()
    assert layer.linear.weight.quant_state is not None
    error = (plain_weight(layer.linear) - exact).norm() / exact.norm()
    assert error < (0.12 if kind == "nf4" else 0.18)  # what four bits cost, once
    assert (layer(x) - wanted).norm() < 0.2 * wanted.norm()
