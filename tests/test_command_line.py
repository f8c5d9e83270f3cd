from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import pytest

from litgpt.args import LogArgs, TrainArgs
from litgpt.command_line import Line, Settings, load_yaml, read_line, take_common_flags
from litgpt.config import Config
from litgpt.data import DataModule, TextFiles
from litgpt.parameters import UsageError, read_signature


def command(
    name: str,
    model_config: Config | dict | None = None,
    out_dir: Path = Path("out"),
    precision: Literal["bf16-true", "32-true"] | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: DataModule | None = None,
    train: TrainArgs = TrainArgs(save_interval=5),
    log: LogArgs = LogArgs(),
    optimizer: str | dict = "AdamW",
    devices: int | str = "auto",
    example: str | int = "first",
    compile: bool = False,
    seed: int = 42,
    stop: list[str] | None = None,
):
    """A command."""


def parse(*argv: str, function=command) -> dict[str, Any]:
    settings = Settings(read_signature(function))
    settings.take_line(read_line(list(argv)))
    return settings.typed()[0]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_words_flags_and_values_are_told_apart():
    line = read_line(["a", "--x", "1", "--y=2=3", "--z", "-1", "--flag", "--w", "", "--", "--b"])
    assert line.words == ["a", "--b"]
    assert [(n, v) for n, v in line.flags if n != "flag"] == [("x", "1"), ("y", "2=3"), ("z", "-1"), ("w", "")]


def test_flags_that_ask_for_a_page_are_recognised():
    assert read_line(["--print_config"]).print_config == ""
    assert read_line(["--print_config=skip_null"]).print_config == "skip_null"
    assert read_line(["--data.help", "TextFiles"]).class_help == ("data", "TextFiles")
    assert read_line(["--data.help", "--x", "1"]).class_help == ("data", None)
    assert read_line(["x", "-h"]).help
    assert read_line([]) == Line()


def test_common_flags_are_taken_out_wherever_they_stand():
    words, extensions, debug = take_common_flags(
        ["pretrain", "--extend", "a.py", "x", "--debug", "--extend=b", "--y", "1"]
    )
    assert (words, extensions, debug) == (["pretrain", "x", "--y", "1"], ["a.py", "b"], True)
    with pytest.raises(UsageError, match="--extend needs a value"):
        take_common_flags(["pretrain", "--extend"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seed", "7"], {"seed": 7}),
        (["--seed=7"], {"seed": 7}),
        (["--se", "7"], {"seed": 7}),
        (["--seed", "7", "--seed", "8"], {"seed": 8}),
        (["--compile", "true"], {"compile": True}),
        (["--compile"], {"compile": True}),
        (["--compile", "--seed", "7"], {"compile": True, "seed": 7}),
        (["--out", "x/y"], {"out_dir": Path("x/y")}),
        (["--resume", "auto"], {"resume": "auto"}),
        (["--resume", "true"], {"resume": True}),
        (["--resume"], {"resume": True}),
        (["--resume", "step-1"], {"resume": Path("step-1")}),
        (["--precision", "null"], {"precision": None}),
        (["--devices", "2"], {"devices": 2}),
        (["--devices", "auto"], {"devices": "auto"}),
        (["--example", "3"], {"example": 3}),
        (["--example", "random"], {"example": "random"}),
        (["--stop", "[a, b]"], {"stop": ["a", "b"]}),
        (["--stop", '["\\n"]'], {"stop": ["\n"]}),
    ],
)
def test_flags_give_typed_values(argv, expected):
    assert parse("x", *argv) == {"name": "x", **expected}


@pytest.mark.parametrize(
    ("value", "number"), [("3e9", 3_000_000_000), ("1_000", 1000), ("1.5e3", 1500), ("20", 20), ("2E2", 200)]
)
def test_whole_numbers_may_be_written_with_an_exponent(value, number):
    tokens = parse("x", "--train.max_tokens", value)["train"].max_tokens
    assert tokens == number and type(tokens) is int


def test_group_flags_change_single_fields_of_the_default():
    train = parse("x", "--train.max_norm", "1", "--train.min_lr", "1e-4")["train"]
    assert train == TrainArgs(save_interval=5, max_norm=1.0, min_lr=1e-4)
    assert type(train.max_norm) is float


def test_overrides_are_only_the_fields_that_were_given():
    given = parse("x", "--model_config.n_layer", "3", "--model_config.intermediate_size", "null")
    assert given["model_config"] == {"n_layer": 3, "intermediate_size": None}
    assert parse("x", "--model_config", "{n_layer: 3, bias: false}")["model_config"] == {"n_layer": 3, "bias": False}
    assert "model_config" not in parse("x")


def test_overrides_become_an_object_where_the_command_takes_no_map():
    def other(model_config: Config | None = None):
        pass

    config = parse("--model_config.n_layer", "3", function=other)["model_config"]
    assert isinstance(config, Config) and config.n_layer == 3 and config.n_embd == Config().n_embd


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optimizer", "SGD"], "SGD"),
        (["--optimizer", "SGD", "--optimizer.lr", "0.1"], {"class_path": "SGD", "init_args": {"lr": 0.1}}),
        (["--optimizer.lr", "1e-4"], {"class_path": "AdamW", "init_args": {"lr": 1e-4}}),
        (["--optimizer.lr", "0.1", "--optimizer", "SGD"], {"class_path": "SGD", "init_args": {"lr": 0.1}}),
        (
            ["--optimizer.class_path", "torch.optim.SGD", "--optimizer.init_args.lr", "0.1"],
            {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        ),
        (
            ["--optimizer.betas", "[0.9, 0.95]", "--optimizer.foreach", "true"],
            {"class_path": "AdamW", "init_args": {"betas": [0.9, 0.95], "foreach": True}},
        ),
        (
            ["--optimizer", "{class_path: torch.optim.SGD, init_args: {lr: 1e-2}}"],
            {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}},
        ),
    ],
)
def test_optimizer_flags_say_class_and_typed_arguments(argv, expected):
    assert parse("x", *argv)["optimizer"] == expected


def test_optimizer_flags_change_single_arguments_of_a_file(tmp_path):
    config = write(tmp_path, "c.yaml", "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1e-2, momentum: 0.9}}")
    given = parse("x", "--config", config, "--optimizer.lr", "3e-4")["optimizer"]
    assert given == {"class_path": "torch.optim.SGD", "init_args": {"lr": 3e-4, "momentum": 0.9}}
    other = parse("x", "--config", config, "--optimizer", "AdamW", "--optimizer.lr", "3e-4")["optimizer"]
    assert other == {"class_path": "AdamW", "init_args": {"lr": 3e-4}}


@pytest.mark.parametrize(
    "argv",
    [
        ["--data", "TextFiles", "--data.train_data_path", "d", "--data.seed", "7"],
        ["--data.seed", "7", "--data.train_data_path", "d", "--data", "TextFiles"],
        ["--data", "litgpt.data.TextFiles", "--data.init_args.train_data_path=d", "--data.init_args.seed=7"],
        ["--data.class_path", "litgpt.data.text_files.TextFiles", "--data.train_d", "d", "--data.se", "7"],
        ["--data", "{class_path: TextFiles, init_args: {train_data_path: d, seed: 7}}"],
    ],
)
def test_data_is_a_class_with_typed_fields(argv):
    assert parse("x", *argv)["data"] == TextFiles(Path("d"), seed=7)


def test_data_from_a_file_keeps_its_fields_unless_the_class_changes(tmp_path):
    config = write(tmp_path, "c.yaml", "data: {class_path: TextFiles, init_args: {train_data_path: d, seed: 7}}")
    assert parse("x", "--config", config, "--data.seed", "8")["data"] == TextFiles(Path("d"), seed=8)
    assert parse("x", "--config", config, "--data", "TextFiles")["data"].seed == 7
    assert parse("x", "--config", config, "--data", "PythonDocs")["data"].seed == 42
    assert parse("x", "--config", config, "--data", "null")["data"] is None


def test_own_data_class_is_found_by_name_and_by_registered_name():
    @dataclass
    class MyOwnData(DataModule):
        path: Path
        size: int = 3

        def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
            pass

        def train_dataloader(self):
            pass

        def val_dataloader(self):
            pass

    assert parse("x", "--data", "MyOwnData", "--data.path", "p", "--data.size", "4")["data"] == MyOwnData(Path("p"), 4)
    settings = Settings(read_signature(command), {"mine": MyOwnData}.get)
    settings.take_line(read_line(["x", "--data", "mine", "--data.path", "p"]))
    assert settings.typed()[0]["data"] == MyOwnData(Path("p"))


def test_flags_win_over_config_files_and_later_files_over_earlier_ones(tmp_path):
    one = write(tmp_path, "one.yaml", "name: a\nseed: 1\ntrain: {max_steps: 1, max_norm: 1.0}\n")
    two = write(tmp_path, "two.yaml", "seed: 2\ntrain:\n  max_steps: 2\ntrain.epochs: 3\n")
    given = parse("--seed", "3", "--config", one, "--config", two)
    assert (given["name"], given["seed"]) == ("a", 3)
    assert given["train"] == TrainArgs(save_interval=5, max_steps=2, max_norm=1.0, epochs=3)
    assert parse("b", "--config", one)["name"] == "b"


def test_group_may_be_a_file_of_its_own_also_relative_to_the_config(tmp_path):
    write(tmp_path, "train.yaml", "max_steps: 9\n")
    config = write(tmp_path, "c.yaml", "train: train.yaml\nmodel_config: model.yaml\n")
    write(tmp_path, "model.yaml", "n_layer: 2\nmodel_type: mine\n")
    given = parse("x", "--config", config)
    assert given["train"].max_steps == 9 and given["model_config"] == {"n_layer": 2}
    assert parse("x", "--train", str(tmp_path / "train.yaml"), "--train.epochs", "1")["train"].max_steps == 9


def test_config_may_come_from_a_url():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/c.yaml" else 404)
            self.end_headers()
            self.wfile.write(b"name: far\nseed: 5\n")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert parse("--config", f"{url}/c.yaml") == {"name": "far", "seed": 5}
        with pytest.raises(UsageError, match=r"cannot be read: .*404"):
            parse("--config", f"{url}/other.yaml")
    finally:
        server.shutdown()
        server.server_close()


def test_numbers_in_yaml_need_no_dot():
    assert load_yaml("[1e-4, 1e4, -2E+3, 1.5e-3, 1e, '1e3']", "") == [1e-4, 1e4, -2000.0, 1.5e-3, "1e", "1e3"]


def test_number_in_a_file_may_stand_where_text_is_meant(tmp_path):
    config = write(tmp_path, "c.yaml", "log: {project: 2024, metadata: {a: 1, b: {c: [1]}}}")
    log = parse("x", "--config", config, "--log.metadata.d", "5")["log"]
    assert log.project == "2024" and log.metadata == {"a": 1, "b": {"c": [1]}, "d": 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [1\n", "line 2: not valid YAML"),
        ("- a\n- b\n", "holds list, not a map"),
        ("train: 3\n", "train: 3 is neither a map"),
        ("train: nowhere.yaml\n", "nowhere.yaml: cannot be read: No such file"),
        ("train: null\n", "train: None is neither a map"),
        ("seed: null\n", "seed: None is not int"),
        ("seed: 1.5\n", "seed: 1.5 is not int"),
        ("seed: true\n", "seed: True is not int"),
        ("compile: 1\n", "compile: 1 is not true|false"),
        ("data: {seed: 1}\n", "data: class_path is missing"),
        ("data: {class_path: TextFiles, init_args: {sed: 1}}\n", "unknown key 'data.sed'; did you mean data.seed"),
        ("model_config: {n_layr: 1}\n", "unknown key 'model_config.n_layr'; did you mean model_config.n_layer"),
        ("train: {max_steps: 1, epoch: 3}\n", "unknown key 'train.epoch'; did you mean train.epochs"),
        ("3: 4\n", "unknown key '3'"),
    ],
)
def test_wrong_config_file_is_refused_by_name(tmp_path, text, message):
    config = write(tmp_path, "c.yaml", text)
    with pytest.raises(UsageError) as error:
        parse("x", "--config", config)
    assert message in str(error.value)
    assert "c.yaml" in str(error.value) or "nowhere" in message
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "NAME is missing"),
        (["x", "y"], "unexpected argument 'y'"),
        (["x", "-q"], "unknown flag -q"),
        (["x", "--seed"], "--seed needs a value"),
        (["x", "--train.max", "1"], "--train.max is not unique: it could be --train.max_tokens"),
        (["x", "--seed", "abc"], "--seed: 'abc' is not int."),
        (
            ["x", "--precision", "bf16"],
            "--precision: 'bf16' is not {bf16-true,32-true} or null; did you mean bf16-true?",
        ),
        (["x", "--data", "TextFile"], "--data: 'TextFile' is not known; did you mean TextFiles?"),
        (["x", "--data", "litgpt.args.TrainArgs"], "is no DataModule"),
        (["x", "--data", "no.such.Class"], "--extend FILE.py"),
        (["x", "--data", "DataModule"], "'DataModule' is not known"),
        (["x", "--data", "TextFiles"], "--data TextFiles needs --data.train_data_path"),
        (["x", "--data.seed", "1"], "say --data NAME too"),
        (["x", "--train.global_batch_size", "-1"], "--train.global_batch_size is -1"),
        (["x", "--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read: No such file"),
        (["x", "--train.max_tokens", "1.5e0"], "'1.5e0' is not int or null"),
        (["x", "--data", "TextFiles", "--data.train_data_path", "a", "--data.num_workers", "x"], "'x' is not int"),
    ],
)
def test_wrong_command_line_is_refused_in_one_line(argv, message):
    with pytest.raises(UsageError) as error:
        parse(*argv)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_value_of_a_secret_never_appears_in_an_error():
    def other(api_key: int = 1):
        pass

    with pytest.raises(UsageError) as error:
        parse("--api_key", "hf_verysecret", function=other)
    assert "verysecret" not in str(error.value) and "--api_key" in str(error.value)
