import torch
from model_variants import assert_close
from torch import nn

from litgpt.adapter_linear import AdapterV2Linear


def test_a_linear_layer_is_scaled_and_shifted():
    layer = AdapterV2Linear(5, 3, bias=True)
    x, start = torch.randn(2, 5), layer.linear.weight
    assert torch.equal(layer(x), layer.linear(x)) and (layer.in_features, layer.out_features) == (5, 3)
    nn.init.normal_(layer.adapter_scale), nn.init.normal_(layer.adapter_bias)
    assert_close(layer(x), layer.adapter_scale * (x @ start.t() + layer.linear.bias + layer.adapter_bias))
    assert set(layer.state_dict()) == {"linear.weight", "linear.bias", "adapter_bias", "adapter_scale"}
    layer.reset_parameters()
    assert torch.equal(layer(x), layer.linear(x))


def test_a_merged_layer_is_plain_and_computes_the_same():
    for has_bias in (True, False):
        layer, x = AdapterV2Linear(5, 3, bias=has_bias).eval(), torch.randn(2, 5)
        nn.init.normal_(layer.adapter_scale), nn.init.normal_(layer.adapter_bias)
        merged = layer.merged()
        assert type(merged) is nn.Linear and not merged.training
        assert_close(merged(x), layer(x))


def test_an_adapter_takes_its_place_and_its_dtype():
    layer = AdapterV2Linear(5, 3, dtype=torch.bfloat16, device="meta")
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16} and all(p.is_meta for p in layer.parameters())
    x = torch.randn(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert AdapterV2Linear(5, 3)(x).dtype == torch.bfloat16
