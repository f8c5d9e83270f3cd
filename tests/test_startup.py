"""What starting up imports. Which modules are loaded is checked, not how long it takes: that depends on the machine.

tests/benchmarks/startup.py measures the time.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {"lightning", "lightning_fabric", "pytorch_lightning", "transformers", "pandas", "scipy", "sklearn", "litdata"}
HEAVY |= {"torchmetrics", "matplotlib", "datasets", "huggingface_hub", "tensorboard", "wandb", "requests"}

SCRIPT = """
import contextlib, io, json, sys

def loaded():
    return sorted({m.partition(".")[0] for m in sys.modules})

def quiet(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as page:
        litgpt.__main__.main(list(argv))
    return page.getvalue()

found = {}
import litgpt
found["import litgpt"] = loaded()
import litgpt.__main__
quiet("--help"), quiet("--version")
found["litgpt --help"] = loaded()
import torch
found["import torch"] = loaded()
litgpt.GPT, litgpt.Config
found["litgpt.GPT"] = loaded()
modules_of_torch = len([m for m in sys.modules if m.startswith("torch")])
page = quiet("pretrain", "--help")
found["litgpt pretrain --help"] = loaded()
found["page"] = [line for line in page.splitlines() if "--train.max_norm" in line]
quiet("generate", "--help"), quiet("train_tokenizer", "--help")
found["other help"] = loaded()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Top-level packages that are loaded after each step of one fresh process."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    return {step: set(names) for step, names in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.parametrize("step", ["import litgpt", "litgpt --help"])
def test_import_and_help_do_without_torch_and_parsers(loaded, step):
    assert not loaded[step] & ({"torch", "numpy", "jsonargparse", "tokenizers"} | HEAVY)


def test_model_and_config_cost_no_more_than_torch(loaded):
    added = loaded["litgpt.GPT"] - loaded["import torch"] - set(sys.stdlib_module_names)
    assert {name for name in added if not name.startswith("_")} <= {"litgpt", "yaml", "cython_runtime"}


@pytest.mark.parametrize("step", ["litgpt pretrain --help", "other help"])
def test_help_of_a_command_loads_nothing_heavy(loaded, step):
    assert loaded["page"]
    assert not (loaded[step] - loaded["import torch"]) & HEAVY
