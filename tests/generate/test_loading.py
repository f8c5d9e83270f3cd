import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from litgpt.checkpoint.io import save_torch
from litgpt.config import Config, save_config
from litgpt.generate.loading import autocast, load_model, parse_precision
from litgpt.model import GPT
from litgpt.quantize import QuantizedLinear, quantize_model
from litgpt.registry import load_checkpoint_config

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(request, tmp_path):
    config = Config(
        n_layer=2, n_embd=16, n_head=2, block_size=32, vocab_size=40, padded_vocab_size=40, tie_embeddings=request.param
    )
    torch.manual_seed(0)
    model = GPT(config).eval()
    save_config(config, tmp_path)
    save_torch({"model": model.state_dict(), "iter_num": 1}, tmp_path / "lit_model.pth")
    return model, tmp_path


def test_loaded_model_is_the_saved_one(saved):
    model, folder = saved
    loaded = load_model(*load_checkpoint_config(folder), folder, CPU, torch.float32)
    idx = torch.arange(20)[None]
    assert torch.equal(loaded(idx), model(idx)) and not loaded.training
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == model.config.tie_embeddings


def test_weights_are_cast(saved):
    model, folder = saved
    loaded = load_model(*load_checkpoint_config(folder), folder, CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    assert loaded(torch.arange(20)[None]).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["bnb.nf4", "bnb.int8"])
def test_quantised_model_is_the_loaded_one_quantised(saved, mode):
    pytest.importorskip("bitsandbytes")
    _, folder = saved
    spec, config = load_checkpoint_config(folder)
    loaded = load_model(spec, config, folder, CPU, torch.bfloat16, mode)
    expected = quantize_model(load_model(spec, config, folder, CPU, torch.bfloat16), mode)
    idx = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(idx), expected(idx)) and not loaded.training
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == config.tie_embeddings


class Shifted(GPT):
    """Has a buffer that its constructor computes and no checkpoint holds."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("shift", torch.arange(config.n_embd).float(), persistent=False)

    def embed(self, idx, ctx):
        return super().embed(idx, ctx) + self.shift


def test_quantised_model_keeps_what_its_constructor_computes(saved):
    pytest.importorskip("bitsandbytes")
    _, folder = saved
    spec, config = load_checkpoint_config(folder)
    spec = replace(spec, model=Shifted)
    loaded = load_model(spec, config, folder, CPU, torch.float32, "bnb.nf4")
    assert isinstance(loaded.transformer.h[0].mlp.proj, QuantizedLinear)
    assert torch.equal(loaded.shift, torch.arange(16).float()) and loaded(torch.arange(9)[None]).isfinite().all()


def test_loading_imports_neither_lightning_nor_a_compiler(saved):
    _, folder = saved
    code = f"""if True:
        import sys, torch
        from litgpt.generate import base
        folder = {str(folder)!r}
        model = base.load_model(*base.load_checkpoint_config(folder), folder, torch.device("cpu"), torch.float32)
        model.set_kv_cache(batch_size=1)
        base.generate(model, torch.tensor([1, 2]), 6, top_k=3, top_p=0.9)
        print([name for name in ("lightning", "torch._dynamo", "transformers") if name in sys.modules])
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (None, (torch.bfloat16, None)),
        ("32-true", (torch.float32, None)),
        ("16-true", (torch.float16, None)),
        ("bf16-mixed", (torch.float32, torch.bfloat16)),
        ("64-true", (torch.float64, None)),
    ],
)
def test_precision_names_weights_and_computation(precision, expected):
    assert parse_precision(precision) == expected


@pytest.mark.parametrize("precision", ["fp8", "32-mixed", "bf16-some", "", "bf16-"])
def test_unknown_precision_is_refused(precision):
    with pytest.raises(ValueError, match=f"precision '{precision}' is not known: choose 32-true"):
        parse_precision(precision)


def test_autocast_computes_in_its_dtype():
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    with autocast(CPU, torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with autocast(CPU, None):
        assert linear(x).dtype == torch.float32
