import math
import random

import pytest
import torch
import torch.nn as nn
from lightning.fabric import Fabric

from litgpt.checkpoint.io import load_torch, save_torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.registry import ModelSpec, get_model_spec
from litgpt.run_state import capture_rng, load_model, restore_rng, rotate_checkpoints

TINY = dict(n_layer=1, n_embd=32, n_head=4, block_size=16, vocab_size=60, padding_multiple=64)


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1, precision="32-true")


def test_random_state_survives_a_checkpoint_file(fabric, tmp_path):
    torch.manual_seed(5)
    random.seed(5)
    random.gauss(0, 1)
    save_torch({"rng": capture_rng(fabric)}, tmp_path / "x.pth")
    expected = [torch.rand(2), random.random(), random.gauss(0, 1)]
    torch.manual_seed(6)
    restore_rng(fabric, load_torch(tmp_path / "x.pth")["rng"])
    assert torch.equal(torch.rand(2), expected[0])
    assert [random.random(), random.gauss(0, 1)] == expected[1:]


def test_random_state_of_another_number_of_devices_is_not_used(fabric):
    state = capture_rng(fabric)
    torch.manual_seed(9)
    expected = torch.get_rng_state()
    restore_rng(fabric, {**state, "torch": state["torch"].repeat(2, 1)})
    assert torch.equal(torch.get_rng_state(), expected)


def test_model_is_initialised_like_one_that_is_built_directly(fabric):
    torch.manual_seed(1)
    direct = GPT(Config(**TINY))
    torch.manual_seed(2)
    direct.init_weights()
    torch.manual_seed(2)
    model = load_model(fabric, get_model_spec("gpt"), Config(**TINY), None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), direct.parameters(), strict=True))
    idx = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(model(idx), direct(idx))


def test_true_half_precision_builds_the_model_in_it():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    model = load_model(fabric, get_model_spec("gpt"), Config(**TINY), None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_module_without_init_weights_keeps_what_its_constructor_drew(fabric):
    class Plain(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2,), 3.0))

    model = load_model(fabric, ModelSpec("plain", Plain, Config, {}), Config(**TINY), None)
    assert model.weight.tolist() == [3.0, 3.0]


class OwnParts(GPT):
    """Has a parameter, a buffer and a number table that `init_weights` does not know."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Parameter(torch.full((3,), 0.5))
        self.register_buffer("positions", torch.arange(4) / 4)
        if config.n_layer == 2:
            self.register_buffer("table", torch.arange(4))


@pytest.mark.parametrize("n_layer", [1, 2])
def test_what_init_weights_leaves_alone_is_what_the_constructor_makes(fabric, n_layer):
    model = load_model(fabric, ModelSpec("own", OwnParts, Config, {}), Config(**{**TINY, "n_layer": n_layer}), None)
    assert model.gate.tolist() == [0.5] * 3 and model.positions.tolist() == [0, 0.25, 0.5, 0.75]
    assert n_layer == 1 or model.table.tolist() == [0, 1, 2, 3]
    assert abs(model.lm_head.weight.std().item() - math.sqrt(0.4 / 32)) < 0.01, "init_weights still draws the rest"
    assert all(p.requires_grad for p in model.parameters())


def test_model_whose_constructor_reads_tensors_is_built_in_memory(fabric):
    class Reads(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.largest = self.lm_head.weight.max().item()

    assert load_model(fabric, ModelSpec("reads", Reads, Config, {}), Config(**TINY), None).largest > 0


def test_rotation_keeps_the_newest_by_number_and_touches_nothing_else(fabric, tmp_path):
    for name in ("step-00000009", "step-00000010", "step-00000100", "final", "step-old"):
        (tmp_path / name).mkdir()
        save_torch({}, tmp_path / name / "lit_model.pth")
    rotate_checkpoints(fabric, tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 5
    rotate_checkpoints(fabric, tmp_path, 1)
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000100", "final", "step-old"}
