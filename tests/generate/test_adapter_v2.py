import pytest
import torch

from litgpt.adapter import adapter_filter as prompt_filter
from litgpt.adapter import add_adapter
from litgpt.adapter_v2 import adapter_filter, add_adapter_v2
from litgpt.checkpoint.io import save_torch
from litgpt.config import Config
from litgpt.generate.adapter import load_adapter
from litgpt.model import GPT

CONFIG = Config(n_layer=3, n_embd=16, n_head=2, vocab_size=20, padded_vocab_size=20, block_size=16)


def save(model, is_part, path):
    save_torch({"model": {name: value for name, value in model.state_dict().items() if is_part(name, None)}}, path)


def test_an_adapter_whose_norms_learned_loads_onto_the_base(tmp_path):
    base, idx = GPT(CONFIG).eval(), torch.arange(8)[None]
    tuned = add_adapter_v2(GPT(CONFIG)).eval()
    tuned.load_state_dict(base.state_dict(), strict=False)
    for name, parameter in tuned.named_parameters():
        if adapter_filter(name, None):
            torch.nn.init.normal_(parameter)
    save(tuned, adapter_filter, tmp_path / "a")
    load_adapter(base, tmp_path / "a", add_adapter_v2, adapter_filter)
    assert torch.equal(base(idx), tuned(idx))


def test_an_adapter_of_the_first_version_is_refused(tmp_path):
    save(add_adapter(GPT(CONFIG)), prompt_filter, tmp_path / "a")
    with pytest.raises(ValueError, match=r"does not fit the model \(missing: .*another method"):
        load_adapter(GPT(CONFIG), tmp_path / "a", add_adapter_v2, adapter_filter)
