import os
from pathlib import Path

import pytest
import yaml

from litgpt.__main__ import ROWS
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule, TextFiles
from litgpt.parameters import UsageError
from litgpt.parser_config import (
    CLI,
    capture_hparams,
    parser_commands,
    plain,
    remember_hyperparameters,
    run_command,
    save_hyperparameters,
)

PUBLISHED = (
    "download chat finetune finetune_lora finetune_full finetune_adapter finetune_adapter_v2 pretrain generate "
    "generate_full generate_adapter generate_adapter_v2 generate_sequentially generate_speculatively generate_tp "
    "convert_to_litgpt convert_from_litgpt convert_pretrained_checkpoint merge_lora evaluate serve validate"
)

calls: list[dict] = []


def command(
    name: str,
    model_config: Config | dict | None = None,
    out_dir: Path = Path("out"),
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(save_interval=5),
    optimizer: str | dict = "AdamW",
    seed: int = 42,
    access_token: str | None = os.getenv("HF_TOKEN"),
) -> str:
    """Do something with a model.

    Args:
        name: Which model.
        access_token: For private models.
    """
    values = dict(locals())
    remember_hyperparameters(command, values)
    calls.append(values)
    save_hyperparameters(command, out_dir)
    return "done"


def saved(folder: Path) -> dict:
    return yaml.safe_load((folder / "hyperparameters.yaml").read_text())


def test_commands_are_the_published_ones_and_all_have_a_row():
    assert parser_commands() == PUBLISHED.split()
    assert set(PUBLISHED.split()) <= set(ROWS)


def test_run_command_calls_with_what_was_given_and_returns_the_result(tmp_path):
    assert run_command(command, ["x", "--out_dir", str(tmp_path), "--seed", "3"]) == "done"
    assert calls[-1]["name"] == "x" and calls[-1]["seed"] == 3 and calls[-1]["train"] == TrainArgs(save_interval=5)


def test_hyperparameters_hold_the_whole_run_without_nulls_and_secrets(tmp_path):
    argv = ["x", "--out_dir", str(tmp_path), "--data", "TextFiles", "--data.train_data_path", "d"]
    run_command(command, [*argv, "--access_token", "hf_private", "--optimizer.lr", "0.1", "--train.max_norm", "1"])
    assert "hf_private" not in (tmp_path / "hyperparameters.yaml").read_text()
    values = saved(tmp_path)
    assert list(values) == ["name", "out_dir", "data", "train", "optimizer", "seed"]
    assert values["data"] == {
        "class_path": "litgpt.data.TextFiles",
        "init_args": {"train_data_path": "d", "seed": 42, "num_workers": TextFiles(Path("d")).num_workers},
    }
    assert values["train"]["max_norm"] == 1.0 and values["train"]["save_interval"] == 5
    assert "max_steps" not in values["train"]
    assert values["optimizer"] == {"class_path": "AdamW", "init_args": {"lr": 0.1}}


def test_hyperparameters_serve_as_config_and_give_the_same_run(tmp_path):
    (tmp_path / "again").mkdir()
    argv = [
        "--data",
        "TextFiles",
        "--data.train_data_path",
        "d",
        "--model_config.n_layer",
        "3",
        "--optimizer.lr",
        "1e-5",
    ]
    run_command(command, ["x", "--out_dir", str(tmp_path), *argv])
    again = ["--config", str(tmp_path / "hyperparameters.yaml"), "--out_dir", str(tmp_path / "again")]
    run_command(command, again)
    first, second = calls[-2:]
    assert {k: v for k, v in first.items() if k != "out_dir"} == {k: v for k, v in second.items() if k != "out_dir"}


def test_call_from_python_is_recorded_from_its_own_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["host", "--unrelated", "words"])
    command("x", out_dir=tmp_path, data=TextFiles(Path("d")), model_config=Config(n_layer=3), access_token="hf_private")
    values = saved(tmp_path)
    assert values["data"]["class_path"] == "litgpt.data.TextFiles"
    assert values["data"]["init_args"]["train_data_path"] == "d"
    assert values["model_config"]["n_layer"] == 3
    assert "access_token" not in values


def test_record_of_the_command_line_wins_and_ends_with_the_run(tmp_path):
    run_command(command, ["x", "--out_dir", str(tmp_path), "--model_config.n_layer", "3"])
    assert saved(tmp_path)["model_config"] == {"n_layer": 3}
    command("y", out_dir=tmp_path)
    assert saved(tmp_path)["name"] == "y"


def test_saving_a_run_that_nobody_recorded_warns_and_writes_nothing(tmp_path):
    def other():
        pass

    with pytest.warns(UserWarning, match="No run of"):
        save_hyperparameters(other, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_value_of_the_token_in_the_environment_is_never_stored(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    assert plain({"note": "with hf_abc inside", "deep": [{"password": 1, "x": "hf_abc"}], "ok": 1}) == {
        "note": None,
        "deep": [{"x": None}],
        "ok": 1,
    }


def test_capture_hparams_gives_plain_locals():
    def caller(seed, train, out_dir, access_token):
        return capture_hparams()

    found = caller(1, TrainArgs(), Path("a/b"), "hf_x")
    assert found["out_dir"] == "a/b" and found["train"]["global_batch_size"] == 64 and found["seed"] == 1
    assert "access_token" not in found


def test_help_shows_docs_groups_choices_and_no_secret(monkeypatch, capsys):
    monkeypatch.setattr(command, "__defaults__", (*command.__defaults__[:-1], "hf_private"))
    monkeypatch.setenv("COLUMNS", "100")
    assert run_command(command, ["--help"], "litgpt command") is None
    page = capsys.readouterr().out
    assert page.startswith("usage: litgpt command NAME [--flag VALUE ...]\n\nDo something with a model.\n")
    assert "hf_private" not in page and "For private models." in page
    assert "--train.max_norm float or null" in page and "--model_config.n_layer int" in page
    assert "TextFiles" in page and "(default: AdamW)" in page and "(default: 5)" in page
    assert all(len(line) <= 100 for line in page.splitlines())


def test_class_help_lists_classes_or_shows_one(capsys):
    run_command(command, ["--data.help"])
    assert "TextFiles" in capsys.readouterr().out.split()
    run_command(command, ["--data.help", "TextFiles"])
    page = capsys.readouterr().out
    assert "--data.train_data_path path" in page and "(required)" in page
    with pytest.raises(UsageError, match=r"unknown flag --date\.help; did you mean data"):
        run_command(command, ["--date.help"])


def test_print_config_shows_everything_and_can_be_read_back(tmp_path, capsys):
    calls.clear()
    argv = ["x", "--seed", "3", "--data", "TextFiles", "--data.train_data_path", "d", "--print_config"]
    run_command(command, argv)
    text = capsys.readouterr().out
    values = yaml.safe_load(text)
    assert values["seed"] == 3 and values["model_config"] is None and values["train"]["save_interval"] == 5
    assert not calls, "the command itself must not run"
    (tmp_path / "c.yaml").write_text(text)
    run_command(command, ["--config", str(tmp_path / "c.yaml"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == values


def test_print_config_can_leave_out_defaults_and_nulls(capsys):
    run_command(command, ["--seed", "3", "--model_config.n_layer", "2", "--print_config=skip_default,skip_null"])
    assert yaml.safe_load(capsys.readouterr().out) == {"model_config": {"n_layer": 2}, "seed": 3}
    run_command(command, ["--print_config=skip_null"])
    assert "model_config" not in yaml.safe_load(capsys.readouterr().out)
    with pytest.raises(UsageError, match="skip_default, skip_null"):
        run_command(command, ["--print_config=everything"])


def test_script_of_ones_own_ends_with_status_2_on_wrong_usage(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/some/where/script.py", "--sed", "1"])
    with pytest.raises(SystemExit) as end:
        CLI(command)
    assert end.value.code == 2
    assert capsys.readouterr().err == "script.py: error: unknown flag --sed; did you mean --seed?\n"
