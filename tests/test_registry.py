import importlib.metadata
from dataclasses import dataclass

import pytest
import torch
import yaml

from litgpt import extension, registry
from litgpt.config import Config, LlamaConfig, MistralConfig, save_config
from litgpt.model import GPT
from litgpt.objective import NextToken, Objective
from litgpt.registry import (
    build_model,
    get_model_spec,
    get_objective,
    load_checkpoint_config,
    load_extension,
    model_names,
    register_data,
    register_model,
    register_objective,
    resolve_model,
)

TINY = dict(n_layer=2, n_embd=32, n_head=4, block_size=16, vocab_size=60, padding_multiple=64)


@dataclass
class GatedConfig(Config):
    gate_init: float = 0.5
    """Start value of the gate."""


class GatedGPT(GPT):
    pass


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """Each test registers into tables of its own."""
    for table in ("_models", "_objectives", "_data", "_sources"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    monkeypatch.setattr(registry, "_is_searched", True)
    monkeypatch.setattr(extension, "_loaded", set())


@pytest.fixture
def gated():
    return register_model(
        "gated", model=GatedGPT, config=GatedConfig, sizes={"debug": TINY, "wide": {**TINY, "n_embd": 64}}
    )


@pytest.mark.parametrize("name", ["pythia-14m", "EleutherAI/pythia-14m", "gpt/pythia-14m"])
def test_named_configs_are_sizes_of_the_built_in_model(name):
    spec, config = resolve_model(name, {"n_layer": 3})
    assert (spec.name, spec.model, config.name, config.n_layer) == ("gpt", GPT, "pythia-14m", 3)


def test_fields_without_a_name_change_the_defaults_of_the_config_class():
    spec, config = resolve_model(None, {"n_layer": 3})
    assert spec.name == "gpt" and config == Config(n_layer=3)


def test_registered_model_resolves_by_size_with_overrides(gated):
    spec, config = resolve_model("gated/wide", {"gate_init": 0.25, "n_layer": 1})
    assert spec is gated and type(config) is GatedConfig
    assert (config.n_embd, config.n_layer, config.gate_init, config.name) == (64, 1, 0.25, "gated/wide")
    model = build_model(spec, config)
    assert type(model) is GatedGPT and len(model.transformer.h) == 1
    assert {"gated/debug", "gated/wide", "pythia-14m"} <= set(model_names())


def test_model_with_one_size_needs_no_size():
    register_model("single", model=GPT, config=GatedConfig, sizes={"only": TINY})
    assert resolve_model("single")[1].n_embd == 32


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("pythia-14n", {}, "Unknown model 'pythia-14n'.*pythia-14m.*--extend"),
        ("gatd/debug", {}, "gated/debug"),
        ("gated/debg", {}, "no size 'debg'.*debug"),
        ("gated", {}, "no size ''"),
        ("gated/debug", {"gate_ini": 1}, "gate_ini.*gate_init"),
        ("pythia-14m", {"n_layr": 1}, "n_layr.*n_layer"),
        (None, {"n_layr": 1}, "n_layr.*n_layer"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(gated, name, overrides, message):
    with pytest.raises(ValueError, match=message):
        resolve_model(name, overrides)


def test_config_class_gets_the_model_type_and_a_shared_one_is_subclassed(gated):
    assert GatedConfig.model_type == "gated" and gated.config is GatedConfig
    other = register_model("other", model=GPT, config=Config, sizes={"a": TINY})
    assert other.config.model_type == "other" and issubclass(other.config, Config)
    assert Config.model_type == "gpt"
    assert register_model("third", model=GPT, config=GatedConfig, sizes={}).config.model_type == "third"
    assert GatedConfig.model_type == "gated"
    register_model("lama", model=GPT, config=LlamaConfig, sizes={})
    assert LlamaConfig.model_type == MistralConfig.model_type == "gpt", "the family classes are everybody's"


def test_checkpoint_config_leads_back_to_its_model(gated, tmp_path):
    save_config(resolve_model("gated/debug", {"gate_init": 0.25})[1], tmp_path)
    spec, config = load_checkpoint_config(tmp_path)
    assert spec is gated and type(config) is GatedConfig and config.gate_init == 0.25


def test_checkpoint_of_a_plain_gpt_needs_no_model_type(tmp_path):
    save_config(Config(**TINY), tmp_path)
    assert "model_type" not in yaml.safe_load((tmp_path / "model_config.yaml").read_text())
    assert load_checkpoint_config(tmp_path)[0].name == "gpt"


def test_checkpoint_of_an_unregistered_model_says_which_extension_is_missing(gated, tmp_path):
    save_config(resolve_model("gated/debug")[1], tmp_path)
    del registry._models["gated"]
    with pytest.raises(ValueError, match=r"model_config.yaml.*'gated'.*--extend.*register_model\('gated'"):
        load_checkpoint_config(tmp_path)


def test_name_claimed_by_two_sources_names_both(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "from litgpt import GPT, Config, register_model\n"
            "register_model('same', model=GPT, config=Config, sizes={})\n"
        )
    load_extension(tmp_path / "one.py")
    with pytest.raises(ValueError) as error:
        load_extension(tmp_path / "two.py")
    assert f"taken by {tmp_path / 'one.py'}" in str(error.value) and str(tmp_path / "two.py") in str(error.value)
    with pytest.raises(ValueError, match="'gpt' is taken by litgpt"):
        register_model("gpt", model=GPT, config=Config, sizes={})


def test_registering_again_from_the_same_file_replaces(gated):
    again = register_model("gated", model=GatedGPT, config=GatedConfig, sizes={"new": TINY})
    assert get_model_spec("gated") is again


def test_extension_file_runs_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counted.py").write_text("from pathlib import Path\nPath('log').open('a').write('x')\n")
    for name in ("counted.py", "./counted.py", tmp_path / "counted.py"):
        load_extension(name)
    assert (tmp_path / "log").read_text() == "x"


def test_extension_may_be_a_module_and_its_file_may_have_a_taken_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "mine.py").write_text(
        "from litgpt import NextToken, register_objective\nregister_objective('mine', NextToken)\n"
    )
    load_extension("pack.mine")
    assert type(get_objective("mine")) is NextToken
    (tmp_path / "json.py").write_text(
        "from dataclasses import dataclass\nfrom litgpt import Config, GPT, register_model\n"
        "@dataclass\nclass Mine(Config):\n    x: int = 3\n"
        "register_model('json', model=GPT, config=Mine, sizes={'a': dict(n_layer=1, n_embd=32, n_head=4)})\n"
    )
    load_extension(tmp_path / "json.py")
    import json

    assert resolve_model("json/a")[1].x == 3 and json.dumps([]) == "[]"


@pytest.mark.parametrize(
    "code, message",
    [
        ("x = 1\ny = = 2\n", r"broken.py, line 2: SyntaxError"),
        ("\n\nraise RuntimeError('no luck')\n", r"broken.py, line 3: RuntimeError: no luck"),
        ("import does_not_exist\n", r"broken.py, line 1: ModuleNotFoundError"),
    ],
)
def test_extension_that_fails_is_answered_with_file_and_line(tmp_path, code, message):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(ValueError, match=message):
        load_extension(tmp_path / "broken.py")
    (tmp_path / "broken.py").write_text("")
    load_extension(tmp_path / "broken.py")  # a second try is possible


def test_extension_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"--extend nowhere/x.py: .*no file"):
        load_extension("nowhere/x.py")
    with pytest.raises(ValueError, match="--extend no_such_module"):
        load_extension("no_such_module")


def test_objectives_by_name_and_by_class_path():
    assert type(get_objective("next-token")) is NextToken
    assert type(get_objective("litgpt.objective.Objective")) is Objective
    with pytest.raises(ValueError, match=r"next-tokn.*next-token"):
        get_objective("next-tokn")
    with pytest.raises(ValueError, match=r"Cannot import 'litgpt.objective.Nothing'"):
        get_objective("litgpt.objective.Nothing")


def test_data_modules_by_name():
    register_data("numbers", dict)
    assert registry.get_data("numbers") is dict and registry.get_data("letters") is None
    with pytest.raises(ValueError, match="objective name 'x' is taken"):
        registry._sources["objective", "x"] = "elsewhere.py"
        register_objective("x", NextToken)


def test_installed_extensions_are_looked_at_only_for_an_unknown_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "installed_family.py").write_text(
        "from litgpt import GPT, Config, register_model\n"
        "register_model('family', model=GPT, config=Config, sizes={'a': dict(n_layer=1, n_embd=32, n_head=4)})\n"
    )
    searched = []
    points = [
        importlib.metadata.EntryPoint("family", "installed_family", "litgpt.extensions"),
        importlib.metadata.EntryPoint("broken", "not_installed_at_all", "litgpt.extensions"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: searched.append(group) or points)
    monkeypatch.setattr(registry, "_is_searched", False)
    resolve_model("pythia-14m")
    assert searched == []
    with pytest.warns(UserWarning, match="'broken' is left out"):
        assert resolve_model("family/a")[1].n_layer == 1
    with pytest.raises(ValueError, match="Unknown model"):
        resolve_model("nobody/a")
    assert searched == ["litgpt.extensions"]


def test_built_model_gives_logits(gated):
    spec, config = resolve_model("gated/debug")
    assert build_model(spec, config)(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, 64)
