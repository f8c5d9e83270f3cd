import json
import random
import shutil

import pytest
import torch

from finetune.conftest import WORDS
from litgpt.checkpoint.io import load_weights
from litgpt.data import Preferences
from litgpt.finetune import dpo, reference
from litgpt.finetune.reference import reference_key
from litgpt.optimizers import read_optimizer
from litgpt.parser_config import run_command


@pytest.fixture
def json_path(tmp_path):
    """Pairs of which the better answer is a thing, and the worse one is not."""
    rng, rows = random.Random(0), []
    for _ in range(400):
        prompt, chosen, rejected = " ".join(rng.choices(WORDS, k=3)), rng.choice(WORDS[:3]), rng.choice(WORDS[3:])
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def dpo_settings(settings, json_path):
    """Builds the arguments of `setup`."""

    def build(**values):
        data = Preferences(json_path, val_split_fraction=0.1, prompt_style="default", num_workers=1)
        return settings(data=data, **values)

    return build


def rows_of(out_dir="out"):
    with open(f"{out_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_each_loss_runs_with_lora_and_reports_its_metrics(loss, dpo_settings):
    dpo.setup(**dpo_settings(loss=loss, eval={"final_validation": True}))
    last = rows_of()[-1]
    assert {"loss", "accuracy", "margin", "val_loss", "val_accuracy", "val_margin"} <= set(last)
    assert {path.name for path in (dpo_settings()["out_dir"] / "final").iterdir()} >= {
        "lit_model.pth", "lit_model.pth.lora", "prompt_style.yaml", "model_config.yaml", "hyperparameters.yaml"
    }  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full", "adapter", "adapter_v2"])
def test_untouched_model_of_each_method_is_its_own_reference(method, dpo_settings):
    still = {"class_path": "SGD", "init_args": {"lr": 0.0}}
    dpo.setup(**dpo_settings(method=method, optimizer=still, eval={"final_validation": True}, train={"max_steps": 2}))
    last = rows_of()[-1]
    assert last["val_margin"] == pytest.approx(0, abs=1e-6)
    assert last["val_loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_tuning_prefers_the_better_answer(method, dpo_settings):
    values = dict(method=method, lora_head=True, eval={"final_validation": True, "max_iters": 10})
    dpo.setup(**dpo_settings(**values, train=dict(global_batch_size=16, micro_batch_size=16, max_steps=40)))
    assert rows_of()[-1]["val_accuracy"] > 0.95


@pytest.mark.parametrize("method", ["lora", "full", "adapter"])
def test_resumed_run_ends_with_the_same_weights(method, dpo_settings, monkeypatch):
    name = {"full": "lit_model.pth"}.get(method, f"lit_model.pth.{method}")
    dpo.setup(**dpo_settings(out_dir="straight", method=method))
    dpo.setup(**dpo_settings(out_dir="out", method=method, train={"max_steps": 6, "save_interval": 3}))
    shutil.rmtree("out/final")
    shutil.rmtree("out/step-000006")
    dpo.setup(**dpo_settings(out_dir="out", method=method, resume=True, train={"max_steps": 6, "save_interval": 3}))
    first, second = (load_weights(f"{folder}/final/{name}") for folder in ("straight", "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_activation_checkpointing_changes_nothing(loss, dpo_settings):
    for folder, is_on in (("with", True), ("without", False)):
        dpo.setup(**dpo_settings(out_dir=folder, loss=loss, activation_checkpointing=is_on))
    first, second = (load_weights(f"{folder}/final/lit_model.pth.lora") for folder in ("with", "without"))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in second)
    assert any(tensor.abs().max() > 0 for name, tensor in second.items() if "lora_B" in name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_precomputed_reference_gives_the_same_run_and_is_kept(method, dpo_settings, monkeypatch):
    values = dict(method=method, eval={"final_validation": True})
    dpo.setup(**dpo_settings(out_dir="live", **values))
    dpo.setup(**dpo_settings(out_dir="early", precompute_reference=True, **values))
    for live, early in zip(rows_of("live"), rows_of("early"), strict=True):
        for name in ("loss", "margin", "val_loss"):
            assert live.get(name) == pytest.approx(early.get(name), abs=1e-4)
    monkeypatch.setattr(reference, "build_model", None)  # the second time nothing is worked out
    dpo.setup(**dpo_settings(out_dir="again", precompute_reference=True, **values))
    assert [row["loss"] for row in rows_of("again")] == [row["loss"] for row in rows_of("early")]


@pytest.mark.parametrize(
    ("flags", "name", "lr"),
    [
        ((), "AdamW", 5e-5),
        (("--optimizer.lr", "1e-3"), "AdamW", 1e-3),
        (("--method", "full"), "AdamW", 1e-6),
        (("--optimizer", "SGD"), "SGD", 5e-5),
    ],
)
def test_learning_rate_is_that_of_the_method_unless_a_flag_says_it(flags, name, lr, json_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(dpo, "launch", lambda command, method, values, *_: seen.update(values))
    run_command(dpo.setup, ["model", "--data", "Preferences", "--data.json_path", str(json_path), *flags])
    optimizer_class, arguments = read_optimizer(seen["optimizer"])
    assert (optimizer_class.__name__, arguments["lr"]) == (name, lr)


def test_reference_key_changes_with_the_weights(checkpoint_dir, tmp_path):
    from types import SimpleNamespace

    folder = shutil.copytree(checkpoint_dir, tmp_path / "copy")
    precision = SimpleNamespace(precision=SimpleNamespace(precision="32-true"))
    fabric = SimpleNamespace(strategy=precision, device=torch.device("cpu"))
    settings = SimpleNamespace(checkpoint_dir=folder, quantize=None)
    key = reference_key(fabric, settings)
    assert key == reference_key(fabric, settings)
    with open(folder / "lit_model.pth", "ab") as file:
        file.write(b"x")
    assert key != reference_key(fabric, settings)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(data=None), "--data is not given: try --data Preferences"),
        (dict(loss="kto", train={"micro_batch_size": 1}), "--train.micro_batch_size must be 2 or more"),
        (dict(loss="kto", precompute_reference=True), "kto needs the reference in each batch"),
        (dict(loss="orpo", precompute_reference=True), "--loss orpo has no reference"),
        (dict(method="full", quantize="bnb.nf4"), "use --method lora"),
        (dict(beta=-1.0), "--beta is -1.0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, message, dpo_settings, settings):
    build = settings if "data" in values else dpo_settings
    with pytest.raises(ValueError, match=message):
        dpo.setup(**build(**values))
