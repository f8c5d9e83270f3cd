import importlib

import pytest

import litgpt
import litgpt.utils

PUBLISHED_TODAY = ["GPT", "Config", "PromptStyle", "Tokenizer", "CheckpointValidationResult", "validate_checkpoint"]
PUBLISHED_LATER = ["LLM", "estimate_model_memory"]
FOR_OWN_MODELS = [
    *("Block", "CausalSelfAttention", "MLP", "LLaMAMLP", "GptNeoxMLP", "ModelSpec", "Objective", "NextToken"),
    *("register_model", "register_objective", "register_data"),
]


@pytest.mark.parametrize("name", [*PUBLISHED_TODAY, *FOR_OWN_MODELS])
def test_public_name_is_there_and_listed(name):
    assert getattr(litgpt, name).__name__ == name
    assert name in litgpt.__all__ and name in dir(litgpt)


def test_star_import_gives_all_public_names():
    names: dict = {}
    module = importlib.import_module("litgpt")
    names.update({name: getattr(module, name) for name in module.__all__})
    assert set(names) >= {*PUBLISHED_TODAY, *FOR_OWN_MODELS}


@pytest.mark.parametrize("name", PUBLISHED_LATER)
def test_published_name_is_there_or_says_that_it_is_not_yet(name):
    try:
        assert getattr(litgpt, name).__name__ == name
    except ImportError as error:
        assert f"litgpt.{name} is not in this version yet" in str(error)


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(litgpt, "no_such_name") and not hasattr(litgpt.utils, "no_such_name")


def test_import_error_inside_a_module_is_not_hidden(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr(litgpt.importlib, "import_module", broken)
    monkeypatch.delitem(vars(litgpt), "Tokenizer", raising=False)
    with pytest.raises(ModuleNotFoundError, match="tokenizers"):
        _ = litgpt.Tokenizer


@pytest.mark.parametrize("name", sorted(litgpt.utils._MODULE_OF))
def test_name_of_the_old_utils_is_handed_on(name):
    module = importlib.import_module(f"litgpt.{litgpt.utils._MODULE_OF[name]}")
    assert getattr(litgpt.utils, name) is getattr(module, name)
    assert name in dir(litgpt.utils)
