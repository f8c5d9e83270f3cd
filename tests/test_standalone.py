"""`model.py` and `config.py` copied into an empty folder run with torch and yaml, whether litgpt is there or not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys

if "--hide-litgpt" in sys.argv:
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "litgpt":
                raise ModuleNotFoundError(f"No module named {name!r}")
    sys.meta_path.insert(0, Hidden())
else:
    import importlib.util
    assert importlib.util.find_spec("litgpt") is not None

import torch
from config import Config
from model import GPT

torch.manual_seed(0)
config = Config(n_layer=2, n_embd=32, n_head=4, n_query_groups=2, block_size=32, padded_vocab_size=64, vocab_size=60,
                norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=48)
model = GPT(config)
idx = torch.randint(60, (2, 12))

total, n = model(idx, targets=idx.roll(-1, 1))
total.backward()
assert torch.isfinite(total) and n == 24
assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())

model.eval()
with torch.no_grad():
    whole = model(idx)
    model.set_kv_cache(2)
    parts = [model(idx[:, :5], torch.arange(5))]
    parts += [model(idx[:, i : i + 1], torch.tensor([i])) for i in range(5, 12)]
assert whole.shape == (2, 12, 64)
assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-5 * whole.abs().max()

assert Config.__module__ == "config" and GPT.__module__ == "model"
assert not [m for m in sys.modules if m.partition(".")[0] == "litgpt"], "the copy must not load litgpt"
assert Config.from_name("pythia-14m").n_layer == 6
print("ran")
"""


@pytest.mark.parametrize("flag", ["--with-litgpt", "--hide-litgpt"])
def test_copied_model_runs_forward_backward_and_cached_decode(tmp_path, flag):
    for name in ("model.py", "config.py"):
        shutil.copy(ROOT / "litgpt" / name, tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", flag], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"
