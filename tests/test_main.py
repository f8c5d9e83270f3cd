import sys
import types
import warnings
from pathlib import Path

import pytest

from litgpt.__main__ import COMMANDS, ROWS, main
from litgpt.parser_config import parser_commands

COMING = [name for name, (target, _) in ROWS.items() if not target]
TODAY = [name for name, (target, _) in ROWS.items() if target]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line."""
    try:
        main(list(argv))
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def command(monkeypatch):
    """Puts a function of the test behind `litgpt models`."""

    def put(function) -> None:
        module = types.ModuleType("commands_of_the_test")
        module.run = function
        monkeypatch.setitem(sys.modules, "commands_of_the_test", module)
        monkeypatch.setitem(ROWS, "models", ("commands_of_the_test:run", ""))

    return put


def test_help_lists_every_command_and_marks_those_to_come(capsys):
    for argv in (["--help"], ["-h"], []):
        status, out, _ = run(capsys, *argv)
        assert status == 0
        assert all(group in out for group in COMMANDS)
        assert all(f"\n  {name} " in out for name in TODAY)
        coming = " ".join(part.split(")")[0] for part in out.split("(coming:")[1:])
        assert all(name in coming for name in COMING)


def test_table_has_the_published_commands_and_the_new_ones():
    new = [
        "models",
        "new",
        "configure",
        "check",
        "plan",
        "train_tokenizer",
        "report",
        "finetune_dpo",
        "quickstart",
        "upload",
    ]
    assert sorted(ROWS) == sorted([*parser_commands(), *new])
    assert {"pretrain", "generate", "train_tokenizer", "models", "quickstart"} <= set(TODAY)


def test_version_is_printed(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.startswith("litgpt ")


@pytest.mark.parametrize(("word", "meant"), [("pretrian", "pretrain"), ("generat", "generate"), ("model", "models")])
def test_unknown_command_names_the_nearest(capsys, word, meant):
    status, out, err = run(capsys, word, "--x", "1")
    assert status == 2 and out == ""
    assert f"unknown command '{word}'; did you mean {meant}?" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", COMING)
def test_command_to_come_says_so_in_one_line(capsys, name):
    status, out, err = run(capsys, name, "--help")
    assert status == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"litgpt {name}: not in this version yet") and "pretrain" in err


@pytest.mark.parametrize("name", [n for n in TODAY if n != "quickstart"])
def test_help_of_each_command_explains_each_parameter(capsys, name):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0 and out.startswith(f"usage: litgpt {name}")
    assert "--config" in out and "--extend" in out
    lines = out.splitlines()
    flags = [i for i, line in enumerate(lines) if line.startswith("  --") and "model_config" not in line]
    for i in flags:
        below = lines[i + 1] if i + 1 < len(lines) else ""
        assert len(lines[i].split("  ")) > 2 or below.startswith(" " * 8), f"no help for {lines[i]}"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("7 is above 3"), 1, "litgpt models: error: 7 is above 3\n"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 1, "error: No such file or directory: a/b\n"),
        (OSError("disk full: a/b"), 1, "error: disk full: a/b\n"),
        (ImportError("pip install matplotlib"), 1, "error: pip install matplotlib\n"),
        (NotImplementedError("no such device"), 1, "error: no such device\n"),
        (KeyError("x"), 1, "error: KeyError: 'x' (--debug shows where it comes from)\n"),
        (RuntimeError("odd"), 1, "error: RuntimeError: odd (--debug shows where it comes from)\n"),
        (KeyboardInterrupt(), 130, "litgpt models: interrupted\n"),
        (SystemExit(7), 7, ""),
    ],
)
def test_error_of_a_command_is_one_line_and_a_status(capsys, command, error, status, text):
    def fail(word: str = "x"):
        raise error

    command(fail)
    got, out, err = run(capsys, "models")
    assert (got, out) == (status, "") and err.endswith(text) and err.count("\n") <= 1


def test_traceback_is_shown_with_debug_only(capsys, command, monkeypatch):
    def fail():
        raise ValueError("7 is above 3")

    command(fail)
    assert "Traceback" not in run(capsys, "models")[2]
    assert "Traceback" in run(capsys, "models", "--debug")[2]
    assert "Traceback" in run(capsys, "--debug", "models")[2]
    monkeypatch.setenv("LITGPT_DEBUG", "1")
    assert "Traceback" in run(capsys, "models")[2]


def test_extension_is_loaded_before_the_command_runs(capsys, command, tmp_path):
    extension = tmp_path / "extension_of_main_test.py"
    extension.write_text(
        "from litgpt import Config, GPT, register_model\n"
        "register_model('main-test-gpt', model=GPT, config=Config, sizes={'debug': dict(n_layer=1)})\n"
    )

    def show():
        from litgpt.registry import model_names

        print("main-test-gpt/debug" in model_names())

    command(show)
    assert run(capsys, "models", "--extend", str(extension))[:2] == (0, "True\n")
    status, _, err = run(capsys, "models", "--extend", str(tmp_path / "nowhere.py"))
    assert status == 1 and "nowhere.py" in err and err.count("\n") == 1


def test_warnings_are_one_line_without_source(capsys, command):
    def warn():
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *rest: sys.stderr.write(warnings.formatwarning(message, *rest[:3]))
            warnings.warn("mind the step", stacklevel=1)

    before = warnings.formatwarning
    command(warn)
    status, _, err = run(capsys, "models")
    assert (status, err) == (0, "litgpt models: warning: mind the step\n")
    assert warnings.formatwarning is before


FLAGS = """
    --trian.epochs                      --train.epochs
    --train.lr_warmup_stepps            --train.lr_warmup_steps
    --train.lrwarmup_steps              --train.lr_warmup_steps
    --lr_warmup_steps                   --train.lr_warmup_steps
    --train.global_batchsize            --train.global_batch_size
    --global_batch_size                 --train.global_batch_size
    --train.micro_batches               --train.micro_batch_size
    --train.microbatch_size             --train.micro_batch_size
    --train.max_sequence_length         --train.max_seq_length
    --max_steps                         --train.max_steps
    --train.Max_norm                    --train.max_norm
    --train.min_learning_rate           --train.min_lr
    --train.tie_embedding_              --train.tie_embeddings
    --train.save_intervall              --train.save_interval
    --eval.intervals                    --eval.interval
    --eval.max_iter_                    --eval.max_iters
    --eval.intial_validation            --eval.initial_validation
    --evall.max_iters                   --eval.max_iters
    --log.projekt                       --log.project
    --loggername                        --logger_name
    --modelconfig.n_layer               --model_config.n_layer
    --model_config.n_layers             --model_config.n_layer
    --model_config.n_heads              --model_config.n_head
    --model_config.embd                 --model_config.n_embd
    --model_config.vocabsize            --model_config.vocab_size
    --model_config.rope_bases           --model_config.rope_base
    --n_layer                           --model_config.n_layer
    --outdir                            --out_dir
    --out-dir                           --out_dir
    --devies                            --devices
    --sed                               --seed
    --precison                          --precision
    --tokenizer_path                    --tokenizer_dir
    --initial_checkpoint_folder         --initial_checkpoint_dir
    --optmizer                          --optimizer
    --n_nodes                           --num_nodes
"""
KEYS = """
    tran: {max_steps: 3}                                                        train
    train: {max_step: 3}                                                        train.max_steps
    train: {lr_warmup_stepps: 3}                                                train.lr_warmup_steps
    train: {train: {max_steps: 3}}                                              train
    train: {minimal_lr: 0.1}                                                    train.min_lr
    eval: {max_steps: 3}                                                        max_steps
    evaluation: {interval: 3}                                                   eval
    log: {projct: a}                                                            log.project
    model_config: {rope_adjustment: {factor: 2}}                                model_config.rope_adjustments
    model_config: {nlayer: 2}                                                   model_config.n_layer
    model_config: {padded_vocabsize: 2}                                         model_config.padded_vocab_size
    model_config: {intermediate: 2}                                             model_config.intermediate_size
    model_name_: pythia-14m                                                     model_name
    data: {class_path: TextFiles, init_args: {train_path: a}}                   data.train_data_path
    data: {class_path: TextFiles, init_args: {train_data_path: a, foo: 1}}      data.foo
    data: {class_path: TextFiles, init_args: {train_data_path: a, sead: 1}}     data.seed
    data: {class_path: TextFile}                                                TextFiles
    data: {class_pth: TextFiles}                                                class_path
    data: Textfiles                                                             TextFiles
    max_tokens: 3                                                               train.max_tokens
    train.max_tokns: 3                                                          train.max_tokens
    loger_name: csv                                                             logger_name
    out_directory: x                                                            out_dir
    seeds: 1                                                                    seed
"""
MISSPELT = [tuple(line.split()) for line in FLAGS.strip().splitlines()]
MISPLACED = [tuple(part.strip() for part in line.rsplit("  ", 1)) for line in KEYS.strip().splitlines()]


def test_at_least_fifty_misspellings_are_tried():
    assert len(MISSPELT) + len(MISPLACED) >= 50


@pytest.mark.parametrize(("flag", "meant"), MISSPELT)
def test_misspelt_or_misplaced_flag_is_refused_with_the_nearest_name(capsys, flag, meant):
    status, _, err = run(capsys, "pretrain", "pythia-14m", flag, "1")
    assert status == 2 and err.count("\n") == 1
    assert err == f"litgpt pretrain: error: unknown flag {flag}; did you mean {meant}?\n"


@pytest.mark.parametrize(("text", "meant"), MISPLACED)
def test_misspelt_or_misplaced_key_is_refused_with_the_nearest_name(capsys, tmp_path, text, meant):
    config = tmp_path / "recipe.yaml"
    config.write_text(f"{text}\n")
    status, _, err = run(capsys, "pretrain", "pythia-14m", "--config", str(config))
    assert status == 2 and err.count("\n") == 1
    assert meant in err and "recipe.yaml" in err


def test_broken_pipe_is_no_traceback(command, capfd, monkeypatch):
    def fail():
        raise BrokenPipeError

    monkeypatch.setattr("os.dup2", lambda *_: None)
    command(fail)
    status, _, err = run(capfd, "models")
    assert (status, err) == (1, "")


def test_recipes_of_pretraining_are_read(capsys):
    import yaml

    recipes = sorted((Path(__file__).parent.parent / "config_hub" / "pretrain").glob("*.yaml"))
    assert len(recipes) >= 4
    for recipe in recipes:
        status, out, err = run(capsys, recipe.parent.name, "--config", str(recipe), "--print_config=skip_default")
        assert status == 0, err
        said, read = yaml.safe_load(recipe.read_text()), yaml.safe_load(out)
        assert set(read) <= set(said)
        assert read["train"]["max_tokens"] == said["train"]["max_tokens"]
        assert type(read["optimizer"]["init_args"]["lr"]) is float
