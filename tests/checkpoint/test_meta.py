import subprocess
import sys

import torch
from torch import nn

from litgpt.checkpoint.meta import meta_device

BUILD = """
import sys
from litgpt import GPT, Config
from litgpt.checkpoint.meta import meta_device
with meta_device():
    GPT(Config(n_layer=1, n_embd=8, n_head=2, block_size=8, vocab_size=16))
print(any(name.startswith(("torch._dynamo", "torch._inductor", "sympy")) for name in sys.modules))
"""


def test_models_have_shapes_but_no_memory_and_afterwards_all_is_as_before():
    with meta_device():
        layer = nn.Linear(10**6, 10**6)
    assert layer.weight.is_meta and layer.weight.shape == (10**6, 10**6)
    torch.manual_seed(0)
    weight = nn.Linear(4, 4).weight
    assert not weight.is_meta and weight.abs().sum() > 0 and weight.std() > 0.1


def test_building_imports_no_compiler():
    out = subprocess.run([sys.executable, "-c", BUILD], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "False"
