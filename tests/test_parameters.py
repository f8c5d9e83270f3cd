from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.parameters import (
    REQUIRED,
    class_parameters,
    did_you_mean,
    docstring_args,
    field_docs,
    is_secret,
    nearest_path,
    positionals,
    read_signature,
    type_text,
)


@dataclass
class Inner:
    """Inner settings."""

    depth: int = 1
    """How deep."""
    names: list[str] = field(default_factory=lambda: ["a"])
    hidden: int = field(default=0, init=False)


def command(
    name: str,
    inner: Inner = Inner(depth=7),
    model_config: Config | dict | None = None,
    data: DataModule | None = None,
    optimizer: str | dict = "AdamW",
    extra: dict | None = None,
):
    """Do something.

    Longer.

    Args:
        name: What it is
            called.
        extra: More of it.
    """


def test_signature_becomes_a_tree_of_kinds():
    tree = read_signature(command)
    kinds = {name: p.kind for name, p in tree.items()}
    assert kinds == {
        "name": "value",
        "inner": "group",
        "model_config": "overrides",
        "data": "class",
        "optimizer": "name",
        "extra": "value",
    }
    assert tree["name"].default is REQUIRED and tree["name"].help == "What it is called."
    assert [p.path for p in tree["inner"].walk()] == ["inner", "inner.depth", "inner.names"]
    assert tree["inner"].children["depth"].default == 7
    assert tree["inner"].children["depth"].help == "How deep."
    assert tree["model_config"].children["n_layer"].type is int
    assert tree["extra"].takes_map() and not tree["name"].takes_map()


def test_fields_of_registered_config_subclasses_are_overrides_too():
    @dataclass
    class GatedConfig(Config):
        gate_init_of_this_test: float = 0.5
        """Start value of the gate."""

    children = read_signature(command)["model_config"].children
    assert children["gate_init_of_this_test"].type is float
    assert children["gate_init_of_this_test"].help == "Start value of the gate."
    assert list(children).index("gate_init_of_this_test") >= len(fields(Config)), "our own fields come first"


def test_class_parameters_follow_keyword_arguments_into_base_classes():
    class Base:
        def __init__(self, a: int = 1, b: str = "x"):
            """Args:
            a: The first."""

    class Child(Base):
        def __init__(self, c: Path, **kwargs: Any):
            super().__init__(**kwargs)

    found = class_parameters(Child, "data")
    assert [p.path for p in found.values()] == ["data.c", "data.a", "data.b"]
    assert found["c"].default is REQUIRED and found["a"].default == 1 and found["c"].type is Path


def test_positionals_are_the_required_parameters_or_the_first_one():
    def optional(model_name: str | None = None, seed: int = 1):
        pass

    def none(data: DataModule | None = None, seed: int = 1):
        pass

    assert [p.name for p in positionals(read_signature(command))] == ["name"]
    assert [p.name for p in positionals(read_signature(optional))] == ["model_name"]
    assert positionals(read_signature(none)) == []


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int | None, "int or null"),
        (None | int, "int or null"),
        (Literal["bnb.nf4", "bnb.int8"] | None, "{bnb.nf4,bnb.int8} or null"),
        (Literal["a", "b", None], "{a,b} or null"),
        (bool | Literal["auto"] | Path, "true|false or auto or path"),
        (list[int], "list of int"),
        (tuple[str, ...], "list of text"),
        (dict[str, Any], "map"),
        (Any, "value"),
        (TrainArgs, "TrainArgs"),
    ],
)
def test_types_read_as_words(annotation, text):
    assert type_text(annotation) == text


def test_field_docs_come_from_the_class_and_its_bases():
    assert field_docs(TrainArgs)["max_norm"].startswith("Gradients are scaled down")

    @dataclass
    class More(Inner):
        width: int = 2
        """How wide,
        in tokens."""

    assert field_docs(More) == {"depth": "How deep.", "width": "How wide, in tokens."}


def test_docstring_args_end_with_their_section():
    def documented(a, b):
        """Title.

        Arguments:
            a: First: with a colon.

                More.
            b (int): Second.

        Returns:
            c: Nothing.
        """

    assert docstring_args(documented) == {"a": "First: with a colon. More.", "b": "Second."}


@pytest.mark.parametrize(
    "name",
    ["access_token", "HF_TOKEN", "token", "api_key", "wandb_api_key", "password", "client_secret", "auth_tokens"],
)
def test_secret_names_are_recognised(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "tokenizer_dir",
        "tokenizer_only",
        "eos_token",
        "max_new_tokens",
        "seed",
        "bytes_per_token",
        "tokenize",
    ],
)
def test_ordinary_names_are_no_secrets(name):
    assert not is_secret(name)


def test_nearest_path_finds_misspelt_and_misplaced_names():
    known = ["train.lr_warmup_steps", "train.max_steps", "eval.interval", "seed", "model_config.n_layer"]
    assert nearest_path("train.lr_warmup_stepps", known) == "train.lr_warmup_steps"
    assert nearest_path("lr_warmup_steps", known) == "train.lr_warmup_steps"
    assert nearest_path("n_layers", known) == "model_config.n_layer"
    assert nearest_path("zzz", known) is None


def test_did_you_mean_ignores_case_and_stays_silent_when_nothing_is_near():
    assert did_you_mean("textfiles", ["TextFiles", "JSON"]) == "; did you mean TextFiles?"
    assert did_you_mean("xyz", ["TextFiles"]) == "."
