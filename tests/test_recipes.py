"""The recipes of config_hub/finetune: each is parsed by its command and tried on a model without memory."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from litgpt.__main__ import ROWS
from litgpt.checkpoint.meta import meta_device
from litgpt.finetune.adapter import Adapter
from litgpt.finetune.lora import LoRA
from litgpt.finetune.method import Method
from litgpt.finetune.settings import Settings
from litgpt.optimizers import read_optimizer
from litgpt.parser_config import run_command
from litgpt.plan import RunSettings, plan_run
from litgpt.registry import build_model, resolve_model
from litgpt.scripts import plan
from litgpt.training import num_parameters

HUB = Path(__file__).parent.parent / "config_hub"
RECIPES = sorted((HUB / "finetune").glob("*/*.yaml"))
COMMANDS = {"full": "finetune_full", "lora": "finetune_lora", "qlora": "finetune_lora", "adapter": "finetune_adapter"}
METHODS = {"full": Method, "lora": LoRA, "qlora": LoRA, "adapter": Adapter}
PUBLISHED = [
    "falcon-7b", "gemma-2b", "gemma-7b", "gemma2-2b", "gemma2-9b", "llama-2-7b", "llama-3-8b", "llama-3.1-8b",
    "llama-3.2-1B", "llama-3.2-3B", "mistral-7b", "mistral-7b-v0.2", "phi-2", "phi-3", "stablelm-base-alpha-3b",
    "tiny-llama",
]  # fmt: skip
SWITCHES = ("query", "key", "value", "projection", "mlp", "head")

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def parse(recipe, monkeypatch, *flags):
    """The method and the arguments with which the command of `recipe` would start."""
    target, _, name = ROWS[COMMANDS[recipe.stem]][0].partition(":")
    module, found = importlib.import_module(target), {}

    def launch(command, method, values):
        found.update(method=method, values=dict(values))

    monkeypatch.setattr(module, "launch", launch)
    run_command(getattr(module, name), ["--config", str(recipe), *flags])
    return found["method"], found["values"]


def header(recipe):
    """The comment at the top, lines that go on joined."""
    lines = [line for line in recipe.read_text("utf-8").split("\n\n")[0].splitlines()]
    assert all(line.startswith("#") for line in lines)
    return "\n".join(line[1:].strip() for line in lines).replace("\\\n", " ")


def test_every_published_model_has_the_methods():
    for folder in PUBLISHED:
        assert {path.stem for path in (HUB / "finetune" / folder).glob("*.yaml")} == {
            "full",
            "lora",
            "qlora",
            "adapter",
        }
    assert {path.parent.name for path in RECIPES} > set(PUBLISHED)


@each_recipe
def test_recipe_is_understood_by_its_command(recipe, monkeypatch):
    method, values = parse(recipe, monkeypatch)
    assert type(method) is METHODS[recipe.stem]
    assert values["data"] is not None and values["out_dir"] == Path("out/finetune") / recipe.parent.name / recipe.stem
    assert (values.get("quantize") is not None) == (recipe.stem == "qlora")
    settings = {name: value for name, value in values.items() if name in Settings.__dataclass_fields__}
    Settings(**settings, command=parse).check()
    read_optimizer(values["optimizer"])
    train = values["train"]
    assert train.gradient_accumulation_iters(values["devices"]) >= 1
    assert train.max_seq_length <= resolve_model(str(values["checkpoint_dir"]))[1].block_size


@each_recipe
def test_recipe_trains_a_part_of_the_model_it_names(recipe, monkeypatch):
    method, values = parse(recipe, monkeypatch)
    spec, config = resolve_model(str(values["checkpoint_dir"]))
    assert not (config.tie_embeddings and values.get("lora_head")), "an update of a tied head unties it"
    with meta_device():
        model = build_model(spec, config)
        n_base = num_parameters(model)
        method.prepare(model, config)
    method.mark_trainable(model)
    n_trained = num_parameters(model, requires_grad=True)
    assert n_trained == n_base if recipe.stem == "full" else 0 < n_trained < 0.05 * n_base
    saved = {name for name, _ in model.named_parameters() if method.is_saved(name)}
    assert saved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@each_recipe
def test_recipe_says_how_it_is_started_and_what_it_needs(recipe, monkeypatch, capsys):
    _, values = parse(recipe, monkeypatch)
    text = header(recipe)
    assert (
        f"litgpt {COMMANDS[recipe.stem]} --config config_hub/finetune/{recipe.parent.name}/{recipe.stem}.yaml" in text
    )
    words = shlex.split(text[text.index("litgpt plan") :])
    assert resolve_model(words[2])[1] == resolve_model(str(values["checkpoint_dir"]))[1]
    flags = dict(zip((word.removeprefix("--") for word in words[3::2]), words[4::2], strict=True))
    train, task = values["train"], {"adapter": "lora"}.get(recipe.stem, recipe.stem)
    assert flags.pop("task") == task
    assert flags.pop("precision") == values["precision"]
    assert int(flags.pop("batch_size")) == train.micro_batch_size
    assert int(flags.pop("seq_length")) == train.max_seq_length
    assert int(flags.pop("devices", 1)) == values["devices"]
    assert (flags.pop("activation_checkpointing", "false") == "true") == values["activation_checkpointing"]
    if "lora_r" in values:
        assert int(flags.pop("lora_r")) == values["lora_r"]
        defaults = {"query": "true", "value": "true"}
        switches = {name: flags.pop(f"lora_{name}", defaults.get(name, "false")) == "true" for name in SWITCHES}
        assert switches == {name: values[f"lora_{name}"] for name in SWITCHES}
    assert not flags
    run_command(plan.setup, [*words[2:], "--json", "true"])
    total = json.loads(capsys.readouterr().out)["runs"][task]["total"]
    card, said = (float(n) for n in re.search(r"of (\d+) GB: (?:about )?([\d.]+) GB", text).groups())
    assert said == pytest.approx(total / 1e9, abs=0.06)
    assert total < 0.95 * card * 2**30


def test_unknown_key_of_a_recipe_is_refused(tmp_path, monkeypatch):
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(RECIPES[0].with_name("lora.yaml").read_text("utf-8").replace("lora_alpha:", "lora_alhpa:"))
    with pytest.raises(Exception, match=r"lora_alhpa.*lora_alpha"):
        parse(recipe, monkeypatch)


def test_memory_page_says_what_plan_computes():
    page = (HUB.parent / "tutorials" / "memory.md").read_text("utf-8")
    table = page.split("## What a model takes")[1].split("\n\n")[2].splitlines()[2:]
    lora = dict(lora_r=16, lora_parts=frozenset(SWITCHES) - {"head"})
    runs = [
        RunSettings("full", 1, 512, "bf16-mixed", activation_checkpointing=True),
        RunSettings("full", 1, 512, "bf16-true"),
        RunSettings("lora", 1, 512, "bf16-true", **lora),
        RunSettings("qlora", 1, 512, "bf16-true", **lora),
        RunSettings("generate", 1, 512, "bf16-true"),
    ]
    assert len(table) > 5
    for row in table:
        name, *said = (cell.strip() for cell in row.strip("|").split("|"))
        computed = [plan_run(resolve_model(name)[1], run).total / 1e9 for run in runs]
        assert [float(number.replace(",", "")) for number in said] == pytest.approx(computed, rel=0.005, abs=0.06)
