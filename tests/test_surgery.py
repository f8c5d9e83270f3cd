import pytest
import torch
from torch import nn

from litgpt.model import GPT
from litgpt.surgery import (
    WrappedLinear,
    cast_frozen,
    find_linears,
    freeze,
    is_match,
    keep,
    linear_names,
    swap_linears,
    unwrap,
)


class Own(nn.Module):
    """A model that knows nothing of ours."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 3, bias=False)})

    def forward(self, x):
        return self.heads["a"](self.encoder(x)) + self.heads["b"](self.encoder(x))


def wrap(name, linear):
    return WrappedLinear(linear)


@pytest.mark.parametrize(("target", "found"), [
    ("encoder.0", ["encoder.0"]), ("a", ["heads.a"]), ("heads.*", ["heads.a", "heads.b"]), ("*", 4),
    (r"heads\.[ab]", ["heads.a", "heads.b"]), (r"encoder\.\d", ["encoder.0", "encoder.2"]), ("enc.*", 2),
    (["b", "encoder.2"], ["encoder.2", "heads.b"]), ("*ads.*", ["heads.a", "heads.b"]),
])  # fmt: skip
def test_targets_are_names_globs_or_regular_expressions(target, found):
    names = find_linears(Own(), target)
    assert (len(names) if isinstance(found, int) else names) == found


def test_name_matches_whole_parts_of_a_path_only():
    assert is_match("h.1.mlp.fc", "mlp.fc")
    assert not is_match("h.1.mlp.fc_1", "fc")
    assert not is_match("h.1.mlp.fc_1", "1")
    assert is_match("h.1.mlp.fc_1", "h.*.fc_?")


@pytest.mark.parametrize("target", ["heads", ["a", "c"], "(", [], r"encoder\.9"])
def test_target_without_a_layer_is_an_error_that_lists_what_there_is(target):
    with pytest.raises(ValueError, match=r"encoder\.\*, heads\.a" if target != "(" else "neither a name") as error:
        find_linears(Own(), target)
    assert "\n" not in str(error.value)


def test_wrapped_model_computes_the_same_and_loads_plain_and_wrapped_names():
    model, x = Own(), torch.randn(2, 6)
    plain, wanted = model.state_dict(), model(x)
    assert swap_linears(model, ["encoder.*", "a"], wrap) == ["encoder.0", "encoder.2", "heads.a"]
    assert torch.equal(model(x), wanted)
    assert "encoder.0.linear.weight" in model.state_dict()
    assert model.heads["a"].in_features == 8 and model.heads["a"].weight is model.heads["a"].linear.weight
    other = Own()
    swap_linears(other, "*", wrap)
    for state in (plain, model.state_dict()):
        for parameter in other.parameters():
            parameter.data.zero_()
        assert not any(other.load_state_dict(state))
        assert torch.equal(other(x), wanted)
    unwrap(other)
    assert other.state_dict().keys() == plain.keys()
    assert torch.equal(other(x), wanted)


def test_wrapped_layer_is_not_wrapped_again():
    model = Own()
    swap_linears(model, "a", wrap)
    assert "heads.a.linear" not in linear_names(model)
    with pytest.raises(ValueError, match=r"called a; there are"):
        swap_linears(model, "a", wrap)


def test_layer_at_two_places_stays_one():
    model = Own()
    model.heads["b"] = model.heads["a"]
    swap_linears(model, "heads.*", wrap)
    assert model.heads["b"] is model.heads["a"]


def test_mode_of_the_layer_is_kept():
    model = Own().eval()
    swap_linears(model, "*", wrap)
    assert not any(module.training for module in model.modules())


def test_what_is_kept_is_trained_and_nothing_else():
    model = Own()
    freeze(model)
    keep(model, lambda name: name.endswith("bias"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "bias" in name
    }


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_layers_in_the_dtype_of_autocast_change_nothing(tiny_config, tied):
    config = tiny_config(tie_embeddings=tied)
    model, idx = GPT(config), torch.randint(0, 300, (2, 8))
    freeze(model)
    model.transformer.h[0].mlp.fc.weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(idx)
    cast_frozen(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(idx), wanted)
    assert model.transformer.h[0].attn.qkv.weight.dtype == torch.bfloat16
    assert model.transformer.h[0].mlp.fc.weight.dtype == torch.float32  # it is trained
    assert model.transformer.wte.weight.dtype == model.transformer.ln_f.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == (torch.float32 if tied else torch.bfloat16)
