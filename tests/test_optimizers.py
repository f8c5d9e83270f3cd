import copy

import pytest
import torch
import torch.nn as nn

from litgpt.config import Config
from litgpt.model import GPT
from litgpt.optimizers import MuonAdamW, build_optimizer, instantiate_torch_optimizer, read_optimizer, split_for_muon

TINY = dict(n_layer=2, n_embd=32, n_head=4, block_size=16, vocab_size=60, padding_multiple=64)


@pytest.fixture
def model():
    model = GPT(Config(**TINY))
    model.init_weights()
    return model


def train(model, optimizer, steps, seed=0):
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        idx = torch.randint(60, (2, 9), generator=rng)
        loss, n = model(idx[:, :-1], targets=idx[:, 1:])
        (loss / n).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "given, name, lr",
    [
        ("AdamW", "AdamW", 1e-3),
        ("torch.optim.SGD", "SGD", 1e-3),
        ({"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}, "SGD", 0.1),
        ({"class_path": "torch.optim.SGD", "lr": "0.1"}, "SGD", 0.1),
        ({"lr": "1e-2"}, "AdamW", 0.01),
        ('{"class_path": "RAdam", "init_args": {"lr": 0.2}}', "RAdam", 0.2),
        ("Muon", "MuonAdamW", 1e-3),
    ],
)
def test_optimizer_is_found_in_every_way_of_saying_it(model, given, name, lr):
    optimizer = build_optimizer(given, model)
    assert type(optimizer).__name__ == name and optimizer.param_groups[0]["lr"] == lr


def test_numbers_given_as_text_become_numbers():
    _, arguments = read_optimizer({"class_path": "AdamW", "init_args": {"lr": "3e-4", "fused": "false", "eps": "1"}})
    assert arguments == {"lr": 3e-4, "fused": False, "eps": 1}


def test_adamw_is_fused_unless_told_otherwise(model):
    assert build_optimizer("AdamW", model).defaults["fused"]
    assert not build_optimizer({"class_path": "AdamW", "init_args": {"fused": False}}, model).defaults["fused"]


def test_frozen_parameters_are_left_out(model):
    model.lm_head.requires_grad_(False)
    trained = {id(p) for group in build_optimizer("AdamW", model).param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_parameters_may_be_given_as_a_list_with_arguments_that_the_class_may_lack(model):
    optimizer = instantiate_torch_optimizer("SGD", model.parameters(), lr=0.5, betas=(0.9, 0.9))
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "given, message",
    [
        ("AdamV", "AdamV.*did you mean.*Adam"),
        ("no.such.Class", "Cannot import 'no.such.Class'"),
        ("torch.nn.Linear", "no optimizer"),
        ({"class_path": "AdamW", "init_args": {"learning_rat": 1}}, "learning_rat"),
        ({"class_path": "Muon", "init_args": {"momentun": 1}}, "momentun.*momentum"),
        ({"class_path": "AdamW", "init_args": {"lr": -1.0}}, "learning rate"),
    ],
)
def test_bad_optimizers_are_refused(model, given, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(given, model)


def test_argument_of_another_optimizer_is_ignored_with_a_warning(model):
    with pytest.warns(UserWarning, match="SGD has no argument 'betas'"):
        optimizer = build_optimizer({"class_path": "SGD", "init_args": {"lr": 0.1, "betas": [0.9, 0.95]}}, model)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(model):
    hidden, rest = split_for_muon(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in hidden} == {"qkv", "proj", "fc"}
    assert {"lm_head.weight", "transformer.wte.weight", "transformer.ln_f.weight"} <= {names[id(p)] for p in rest}
    assert all(p.ndim == 2 for p in hidden) and len(hidden) == 2 * 4
    assert len(hidden) + len(rest) == len(list(model.parameters()))


def test_muon_leaves_a_tied_head_to_adamw():
    model = GPT(Config(**TINY, tie_embeddings=True))
    assert all(p is not model.lm_head.weight for p in split_for_muon(model)[0])


def test_muon_steps_are_those_of_its_two_halves(model):
    other = copy.deepcopy(model)
    train(model, build_optimizer({"class_path": "Muon", "init_args": {"lr": 0.01, "weight_decay": 0.2}}, model), 3)
    hidden, rest = split_for_muon(other)
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.2},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)

    class Both:
        def step(self):
            muon.step(), adamw.step()

        def zero_grad(self):
            muon.zero_grad(), adamw.zero_grad()

    train(other, Both(), 3)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_muon_goes_on_from_its_state_dict(model):
    given = {"class_path": "Muon", "init_args": {"lr": 0.01}}
    optimizer = build_optimizer(given, model)
    train(model, optimizer, 2)
    other = copy.deepcopy(model)
    resumed = build_optimizer(given, other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2, seed=1)
    train(other, resumed, 2, seed=1)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_learning_rate_of_each_muon_group_takes_effect(model):
    optimizer = build_optimizer({"class_path": "Muon", "init_args": {"lr": 0.01, "adamw_lr": 0.5}}, model)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5, 0.5]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_muon_without_hidden_matrices_or_without_the_model_says_so():
    with pytest.raises(ValueError, match="2-D weights inside the network"):
        build_optimizer("Muon", nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="needs the model itself"):
        instantiate_torch_optimizer("Muon", [nn.Parameter(torch.zeros(2, 2))])
    assert issubclass(MuonAdamW, torch.optim.Optimizer)
