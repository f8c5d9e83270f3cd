import copy
import gc
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from model_variants import VARIANTS, assert_close, build_model, config_of, random_tokens
from torch import nn

from litgpt import quantize
from litgpt.checkpoint.io import save_torch
from litgpt.checkpoint.meta import meta_device
from litgpt.model import GPT
from litgpt.quantize import MODES, QuantizedLinear, check_mode, load_quantized, quantize_model, quantized

pytest.importorskip("bitsandbytes")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of the largest value


def n_bytes(layer):
    return sum(tensor.nbytes for tensor in [*layer.buffers(), *layer.parameters()])


def quantized_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "n_rows"), [(128, 40), (128, 3), (100, 3), (7, 3)])
def test_a_quantised_layer_and_its_gradient_are_those_of_its_weight(mode, dtype, width, n_rows):
    linear = nn.Linear(width, 64).to(dtype)
    layer = quantized(linear, mode)
    x = torch.randn(2, n_rows, width, dtype=dtype, requires_grad=True)
    expected = F.linear(x, layer.weight, layer.bias)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, expected, ROUNDING[dtype])
    grad = torch.randn_like(y)
    assert_close(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)), ROUNDING[dtype])
    with torch.no_grad():
        assert_close(layer(x), expected, ROUNDING[dtype])
        assert_close(layer(x[0, :1]), expected[0, :1], ROUNDING[dtype])
    error = (layer.weight.float() - linear.weight.float()).norm() / linear.weight.float().norm()
    assert error < (0.01 if "int8" in mode else 0.13 if "fp4" in mode else 0.1)


@pytest.mark.parametrize(("mode", "share"), [("bnb.nf4", 0.30), ("bnb.nf4-dq", 0.27), ("bnb.fp4", 0.30)])
def test_a_quantised_layer_takes_little_memory(mode, share):
    linear = nn.Linear(512, 768, bias=False).bfloat16()
    assert n_bytes(quantized(linear, mode)) <= share * n_bytes(linear)


def test_numbers_are_those_of_the_layer_of_bitsandbytes():
    import bitsandbytes as bnb

    linear, x = nn.Linear(128, 64), torch.randn(3, 128)
    for mode, kind, nested in (("bnb.nf4", "nf4", False), ("bnb.fp4-dq", "fp4", True)):
        theirs = bnb.nn.Linear4bit(128, 64, compute_dtype=torch.float32, compress_statistics=nested, quant_type=kind)
        theirs.load_state_dict(linear.state_dict())
        theirs = theirs.train().to("cpu")
        assert_close(quantized(linear, mode)(x), theirs(x), 1e-6)


def test_int8_products_of_quantised_inputs_are_near():
    layer, x = quantized(nn.Linear(128, 64, bias=False), "bnb.int8"), torch.randn(5, 128)
    x[:, 3] = 30  # an outlier, which is not quantised
    with torch.no_grad():
        assert_close(layer._multiply_int8(x), layer(x), 0.02)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_zeros_stay_zero(mode):
    linear = nn.Linear(128, 64, bias=False)
    nn.init.zeros_(linear.weight)
    assert quantized(linear, mode)(torch.randn(2, 128)).eq(0).all()


def test_scales_keep_their_dtype_when_the_model_is_cast_and_weights_load_plain():
    linear = nn.Linear(128, 64)
    layer = nn.ModuleList([quantized(copy.deepcopy(linear), "bnb.nf4-dq")]).bfloat16()[0]
    assert (layer.absmax.dtype, layer.nested_absmax.dtype) == (torch.uint8, torch.float32)
    assert layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    other = nn.Linear(128, 64)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, quantized(other, "bnb.nf4-dq").weight)
    layer.weight = nn.Parameter(linear.weight.detach())
    assert torch.equal(layer.weight, quantized(linear, "bnb.nf4-dq").weight)
    again = quantized(other, "bnb.nf4-dq")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight) and torch.equal(copy.deepcopy(again).weight, layer.weight)
    with pytest.raises(ValueError, match=r"weight is \(3, 2\) in the state dict, but \(64, 128\)"):
        layer.load_state_dict(nn.Linear(2, 3).state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_linears_of_the_blocks_are_quantised_but_routers_and_head_are_not(variant):
    plain, idx = build_model(variant), random_tokens(2, 12)
    built = quantize_model(copy.deepcopy(plain), "bnb.int8")
    layers = quantized_layers(built)
    expected = {n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert set(layers) == {name for name in expected if not name.endswith("mlp.gate")}
    for name, layer in layers.items():  # the model computes with exactly these weights
        plain.get_submodule(name).weight.data = layer.weight
    with torch.no_grad():
        assert_close(built(idx), plain(idx))
        built.set_kv_cache(2)
        steps = [built(idx[:, i : i + 1], torch.tensor([i])) for i in range(12)]
        assert_close(torch.cat(steps, dim=1), plain(idx))
    assert quantize_model(built, "bnb.int8") is built and quantized_layers(built) == layers


def test_any_tree_of_blocks_can_be_quantised_and_others_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU())])
            self.head = nn.Linear(64, 3)

    assert list(quantized_layers(quantize_model(Own(), "bnb.fp4"))) == ["layers.0.0"]
    with pytest.raises(ValueError, match="Sequential has no linear layers in a ModuleList"):
        quantize_model(nn.Sequential(nn.Linear(2, 2)), "bnb.nf4")


@pytest.mark.parametrize("mode", MODES)
def test_lora_learns_through_frozen_layers_as_through_their_weights(mode):
    lora = pytest.importorskip("litgpt.lora")
    plain, idx = build_model("gqa", n_embd=64, intermediate_size=64), random_tokens(2, 12)
    built = quantize_model(copy.deepcopy(plain), mode)
    for name, layer in quantized_layers(built).items():
        plain.get_submodule(name).weight.data = layer.weight
    settings = lora.LoRASettings(r=4, dropout=0.0, key=True, projection=True, mlp=True)
    grads = []
    for model in (built, plain):
        torch.manual_seed(5)
        lora.add_lora(model, settings)
        lora.mark_only_lora_as_trainable(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(std=0.1)
        model.train()(idx, targets=idx.roll(-1, 1))[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 2 * 3 * 5
    for name, grad in grads[1].items():
        assert grad.abs().max() > 0
        assert_close(grads[0][name], grad)


def test_adapters_learn_on_quantised_layers():
    from litgpt.adapter_v2 import add_adapter_v2, mark_only_adapter_v2_as_trainable

    built, idx = quantize_model(build_model("gqa"), "bnb.nf4"), random_tokens(2, 12)
    expected = built(idx)
    add_adapter_v2(built, start_layer=1)
    assert torch.equal(built(idx), expected)
    mark_only_adapter_v2_as_trainable(built)
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        total, n = built(idx, targets=idx.roll(-1, 1))
        losses.append((total / n).item())
        (total / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert built.transformer.h[1].attn.adapter_wte.weight.grad is None


# ---- loading


def save(model, folder):
    from litgpt.config import save_config

    save_config(model.config, folder)
    save_torch({"model": model.state_dict()}, folder / "lit_model.pth")


@pytest.mark.parametrize("variant", ["gqa", "gemma2", "moe", "mla"])
def test_a_streamed_checkpoint_is_the_model_quantised_afterwards(tmp_path, variant):
    plain, idx = build_model(variant).bfloat16(), random_tokens(2, 9)
    save(plain, tmp_path)
    with meta_device():
        empty = GPT(plain.config)
    streamed = load_quantized(empty, tmp_path, "bnb.nf4", torch.bfloat16).eval()
    expected = quantize_model(plain, "bnb.nf4")
    assert set(quantized_layers(streamed)) == set(quantized_layers(expected))
    with torch.no_grad():
        assert torch.equal(streamed(idx), expected(idx))
    assert (streamed.lm_head.weight is streamed.transformer.wte.weight) == plain.config.tie_embeddings


def test_older_names_are_streamed_too(tmp_path):
    plain = build_model("mha", n_query_groups=4)
    state = plain.state_dict()
    for i in range(3):
        q, k, v = (part.unflatten(0, (4, 1, 8)) for part in state.pop(f"transformer.h.{i}.attn.qkv.weight").chunk(3))
        state[f"transformer.h.{i}.attn.attn.weight"] = torch.cat((q, k, v), dim=1).flatten(0, 2)
    save(plain, tmp_path)
    save_torch({"model": state}, tmp_path / "lit_model.pth")
    with meta_device():
        empty = GPT(plain.config)
    streamed = load_quantized(empty, tmp_path, "bnb.int8", torch.float32)
    for name, layer in quantized_layers(quantize_model(plain, "bnb.int8")).items():
        assert torch.equal(streamed.get_submodule(name).weight, layer.weight)


def test_no_more_than_a_block_is_ever_whole_in_memory(tmp_path, monkeypatch):
    plain = build_model("mha", n_layer=5, n_embd=64, intermediate_size=128)
    save(plain.bfloat16(), tmp_path)
    block = 4 * sum(parameter.numel() for parameter in plain.transformer.h[0].parameters())
    peaks, one_by_one = [], quantize.quantized

    def watched(linear, *args):
        if linear.out_features == 3 * 64:  # the first of a block
            gc.collect()
            live = [t for t in gc.get_objects() if type(t) is nn.Parameter and t.dtype == torch.float32]
            peaks.append(sum(t.nbytes for t in live if not t.is_meta))
        return one_by_one(linear, *args)

    monkeypatch.setattr(quantize, "quantized", watched)
    with meta_device():
        empty = GPT(plain.config)
    load_quantized(empty, tmp_path, "bnb.nf4", torch.float32)
    assert len(peaks) == 5
    assert all(0.9 * block < peak < 1.1 * block for peak in peaks)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path):
    save(build_model("gqa"), tmp_path)
    with meta_device():
        empty = GPT(config_of("mha"))
    with pytest.raises(ValueError, match=r"do not fit the model \(wrong shape: .*qkv.weight") as caught:
        load_quantized(empty, tmp_path, "bnb.nf4", torch.bfloat16)
    assert "\n" not in str(caught.value)


# ---- what is refused


def test_modes_and_precisions_that_do_not_go_together_are_refused():
    for precision in ("bf16-true", "16-true", "32-true", None):
        check_mode("bnb.nf4", precision)
    for precision in ("bf16-mixed", "16-mixed", "64-true"):
        with pytest.raises(ValueError, match=f"quantize bnb.nf4 does not go with precision {precision}.*choose bf16-t"):
            check_mode("bnb.nf4", precision)
    with pytest.raises(ValueError, match=r"quantize 'nf4' is not known here: choose bnb\.nf4, bnb\.nf4-dq"):
        check_mode("nf4")
    check_mode("bnb.int8", is_training=False), check_mode("bnb.int8-training", is_training=True)
    for mode, is_training in (("bnb.int8", True), ("bnb.int8-training", False)):
        with pytest.raises(ValueError, match=f"{mode}' is not known here"):
            check_mode(mode, is_training=is_training)


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes.*pip install 'litgpt\[quant\]'"):
        quantize_model(build_model(), "bnb.nf4")


def test_the_package_is_imported_only_when_something_is_quantised_and_says_nothing():
    code = "import sys, torch, litgpt.quantize as q; assert 'bitsandbytes' not in sys.modules; q.load_bitsandbytes()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
