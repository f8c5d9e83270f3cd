"""Models, objectives and data modules by name: the built-in GPT, and what extensions register beside it."""

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch.nn as nn
import yaml

from litgpt.checkpoint.hf_config import config_from_hf, folder_name, read_hf_config
from litgpt.config import Config, name_to_config, nearest
from litgpt.extension import import_class, load_extension
from litgpt.model import GPT


@dataclass(frozen=True)
class ModelSpec:
    """Everything the commands need to know about a kind of model. What a GPT needs is the default."""

    name: str
    """Stands before the slash in `my-gpt/debug`, and in model_config.yaml as `model_type`."""
    model: type[nn.Module]
    """Built as `model(config)`; `forward(idx)` gives logits."""
    config: type[Config]
    """Its fields are YAML keys and flags."""
    sizes: Mapping[str, Mapping[str, Any]]
    """Named settings of the config's fields."""
    objective: str = "next-token"
    """Name of the registered objective that it is trained with."""
    parallel_plan: Callable[..., Any] | None = None
    """How its layers split over devices; None: as those of a GPT."""
    weight_map: Any = None
    """How its weights are named elsewhere; None: as those of a GPT."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of this model for optimizer, schedule, data and tokenizer; flags win."""


ENTRY_POINTS = "litgpt.extensions"
"""Entry point group under which an installed package names a module that registers things when imported."""

_models: dict[str, ModelSpec] = {"gpt": ModelSpec("gpt", GPT, Config, name_to_config)}
_objectives: dict[str, Any] = {"next-token": "litgpt.objective.NextToken"}
_data: dict[str, type] = {}
_sources = {("model", "gpt"): "litgpt", ("objective", "next-token"): "litgpt"}
_is_searched = False


def register_model(
    name: str, *, model: type[nn.Module], config: type[Config], sizes: Mapping[str, Mapping[str, Any]], **parts: Any
) -> ModelSpec:
    """Make `name` known to every command, as `litgpt pretrain name/size`.

    Args:
        name: Must not be taken by another source.
        model: Class built as `model(config)`.
        config: Its config class; gets `model_type = name`. A class that serves another model already is subclassed.
        sizes: Size name -> config fields.
        parts: `objective`, `parallel_plan`, `weight_map`, `recipe` of `ModelSpec`.

    Raises:
        ValueError: The name is taken; the message says by what.
    """
    _claim("model", name)
    if vars(config).get("model_type", name) != name or config.__module__ == Config.__module__:
        config = type(config.__name__, (config,), {"__module__": config.__module__, "__doc__": config.__doc__})
    config.model_type = name
    _models[name] = ModelSpec(name, model, config, sizes, **parts)
    return _models[name]


def register_objective(name: str, objective: type) -> None:
    """Make an `Objective` subclass known as `--objective name`."""
    _claim("objective", name)
    _objectives[name] = objective


def register_data(name: str, data: type) -> None:
    """Make a `DataModule` subclass known as `--data name`."""
    _claim("data", name)
    _data[name] = data


def get_model_spec(name: str) -> ModelSpec:
    """The registered model `name`; installed extensions are looked through before it is called unknown."""
    return _get("model", _models, name)


def get_objective(name: str) -> Any:
    """A new objective, by registered name or by class path."""
    found = name if "." in name and name not in _objectives else _get("objective", _objectives, name)
    return (import_class(found) if isinstance(found, str) else found)()


def get_data(name: str) -> type | None:
    """The registered data module class, or None."""
    return _data.get(name)


def resolve_model(name: str | None, overrides: Mapping[str, Any] | None = None) -> tuple[ModelSpec, Config]:
    """The model that a command line names, and its config.

    Args:
        name: `pythia-160m`, `org/name`, `my-gpt/debug`, or `my-gpt` where it has one size. None: the config class's
            defaults.
        overrides: Config fields that replace those of the named model.

    Raises:
        ValueError: Unknown name or field; the message has the nearest known ones.
    """
    overrides = dict(overrides or {})
    if name is None:
        return _models["gpt"], Config(**Config._checked(overrides, "--model_config"))
    prefix, _, size = name.partition("/")
    if prefix not in _models and _is_builtin(name):
        return _models["gpt"], Config.from_name(name, **overrides)
    if prefix not in _models:
        _load_entry_points()
    if prefix not in _models:
        raise ValueError(
            f"Unknown model {name!r}{_did_you_mean(name, model_names())} `litgpt pretrain list` shows all names; "
            "a model of your own needs --extend FILE_OR_MODULE."
        )
    spec = _models[prefix]
    size = size or (next(iter(spec.sizes)) if len(spec.sizes) == 1 else "")
    if size not in spec.sizes:
        raise ValueError(f"Model {prefix!r} has no size {size!r}{_did_you_mean(size, spec.sizes)}")
    if spec.name == "gpt":
        return spec, Config.from_name(size, **overrides)
    values = {"name": name, **spec.sizes[size], **spec.config._checked(overrides, f"overrides of {name}")}
    return spec, spec.config(**values)


def model_names() -> list[str]:
    """All names that `resolve_model` knows: the built-in ones, then `spec/size` of each registered model."""
    own = [f"{spec.name}/{size}" for spec in _models.values() if spec.name != "gpt" for size in spec.sizes]
    return [*name_to_config, *own]


def load_checkpoint_config(checkpoint_dir: str | Path) -> tuple[ModelSpec, Config]:
    """The model of a checkpoint folder, by its model_config.yaml, or config.json in a Hugging Face folder.

    Runs no code from that folder.
    """
    path = Path(checkpoint_dir) / "model_config.yaml"
    if not path.is_file() and path.with_name("config.json").is_file():
        return _models["gpt"], config_from_hf(read_hf_config(checkpoint_dir), folder_name(checkpoint_dir))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except yaml.YAMLError:
        values = None  # from_checkpoint says what is wrong
    name = values.get("model_type", "gpt") if isinstance(values, dict) else "gpt"
    if name not in _models:
        _load_entry_points()
    if name not in _models:
        raise ValueError(
            f"{path} describes a model of type {name!r}, which is not registered: add --extend with the file or module "
            f"that calls register_model({name!r}, ...)."
        )
    return _models[name], _models[name].config.from_checkpoint(checkpoint_dir)


def build_model(spec: ModelSpec, config: Config) -> nn.Module:
    """The model itself, on the current default device; meta is allowed."""
    return spec.model(config)


def _get(kind: str, table: dict[str, Any], name: str) -> Any:
    if name not in table:
        _load_entry_points()
    if name not in table:
        raise ValueError(
            f"Unknown {kind} {name!r}{_did_you_mean(name, table)} Registered: {', '.join(table)}. "
            "One of your own needs --extend FILE_OR_MODULE."
        )
    return table[name]


def _claim(kind: str, name: str) -> None:
    """Note who registers `name`. The same file or module may do so again, as a notebook cell does."""
    frame = sys._getframe(2)
    source = frame.f_globals.get("__file__") or frame.f_globals.get("__name__", "?")
    owner = _sources.get((kind, name), source)
    if owner != source:
        raise ValueError(f"The {kind} name {name!r} is taken by {owner}, and {source} registers it again: rename one.")
    _sources[kind, name] = source


def _load_entry_points() -> None:
    """Import the installed extensions, once. One that fails is reported and left out."""
    global _is_searched
    if _is_searched:
        return
    _is_searched = True
    for point in entry_points(group=ENTRY_POINTS):
        try:
            load_extension(point.module)
        except ValueError as error:
            warnings.warn(f"The installed extension {point.name!r} is left out: {error}", stacklevel=3)


def _is_builtin(name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(Config.from_name(name))
        except ValueError:
            return False


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    close = nearest(word, words)
    return f"; did you mean {' or '.join(close)}?" if close else "."
