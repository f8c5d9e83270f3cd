"""From a function to a command: parses the command line for it, runs it, and records what was run.

`parameters.py` says which names a function has, `command_line.py` what the user gave for them (flag before `--config`
file before default), `command_help.py` prints the help page.
"""

import inspect
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from litgpt.command_help import format_class_help, format_help
from litgpt.command_line import Registered, Settings, class_path, read_line
from litgpt.parameters import (
    REQUIRED,
    Parameter,
    UsageError,
    class_parameters,
    did_you_mean,
    find_class,
    is_secret,
    known_classes,
    read_signature,
)

_records: dict[str, dict[str, Any]] = {}
_running: set[str] = set()


def run_command(
    function: Callable[..., Any],
    argv: list[str] | None = None,
    prog: str | None = None,
    *,
    registered: Registered | None = None,
) -> Any:
    """Call `function` with what the command line says, and return what it returns.

    Args:
        function: Its signature and docstrings are the command's flags and help.
        argv: The words after the command's name; default: those of this process.
        prog: How the command is called, for the help page.
        registered: Finds classes that extensions have registered under a name.

    Raises:
        UsageError: A name is unknown, a value has the wrong type, or something required is missing.
    """
    tree, prog = read_signature(function), prog or function.__name__
    line = read_line(sys.argv[1:] if argv is None else argv)
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    if line.help:
        print(format_help(function, prog, tree, width))
        return None
    if line.class_help:
        _print_class_help(tree, *line.class_help, width, registered)
        return None
    settings = Settings(tree, registered)
    settings.take_line(line)
    arguments, record = settings.typed(complete=line.print_config is None)
    record = plain(record)
    if line.print_config is not None:
        print(_to_yaml(_shown(record, settings.given, line.print_config)), end="")
        return None
    key = _key(function)
    _records[key] = record
    _running.add(key)
    try:
        return function(**arguments)
    finally:
        _running.discard(key)


def CLI(function: Callable[..., Any], args: list[str] | None = None, **_: Any) -> Any:
    """Run `function` as the command of a script: `if __name__ == "__main__": CLI(main)`."""
    prog = Path(sys.argv[0]).name
    try:
        return run_command(function, args, prog)
    except UsageError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


# The record of a run


def parser_commands() -> list[str]:
    """The published commands."""
    return [
        "download",
        "chat",
        "finetune",
        "finetune_lora",
        "finetune_full",
        "finetune_adapter",
        "finetune_adapter_v2",
        "pretrain",
        "generate",
        "generate_full",
        "generate_adapter",
        "generate_adapter_v2",
        "generate_sequentially",
        "generate_speculatively",
        "generate_tp",
        "convert_to_litgpt",
        "convert_from_litgpt",
        "convert_pretrained_checkpoint",
        "merge_lora",
        "evaluate",
        "serve",
        "validate",
    ]


def remember_hyperparameters(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Record the arguments of a call from Python. While the command line runs `function`, its own record stays.

    Args:
        function: The `setup` of a command.
        values: Argument name -> value, as `locals()` gives them at the top of `function`.
    """
    if _key(function) in _running:
        return
    record = {}
    for name, p in read_signature(function).items():
        value = values.get(name, p.default)
        if is_secret(name) or value is REQUIRED:
            continue
        is_choice = p.kind == "class" and not isinstance(value, (type(None), str, dict))
        record[name] = _class_record(value) if is_choice else plain(value)
    _records[_key(function)] = record


def save_hyperparameters(
    function: Callable[..., Any], checkpoint_dir: str | Path, known_commands: list[str] | None = None
) -> None:
    """Write the settings of the present run of `function` as `hyperparameters.yaml`, a file that `--config` takes.

    Args:
        function: The `setup` of a command, which the command line runs or which has called `remember_hyperparameters`.
        checkpoint_dir: An existing folder.
        known_commands: Without effect; callers of older versions pass it.
    """
    record = _records.get(_key(function))
    if record is None:
        warnings.warn(f"No run of {_key(function)} is recorded, hyperparameters.yaml is not written.", stacklevel=2)
        return
    (Path(checkpoint_dir) / "hyperparameters.yaml").write_text(_to_yaml(_without_null(record)), encoding="utf-8")


def capture_hparams() -> dict[str, Any]:
    """The local variables of the caller as plain values for a logger, without secrets."""
    return plain(dict(inspect.currentframe().f_back.f_locals))


def plain(value: Any) -> Any:
    """`value` as something that YAML can hold, without entries of a secret's name and without the value of HF_TOKEN."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items() if not is_secret(str(k))}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in fields(value) if f.init})
    if isinstance(value, str) or not isinstance(value, (int, float, bool, type(None))):
        value = str(value)
        tokens = (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"))
        return None if any(t and t in value for t in tokens) else value
    return value


def _key(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _class_record(instance: Any) -> dict[str, Any]:
    cls = type(instance)
    names = [n for n in class_parameters(cls, "") if hasattr(instance, n)]
    return {"class_path": class_path(cls), "init_args": plain({n: getattr(instance, n) for n in names})}


def _without_null(record: dict[str, Any]) -> dict[str, Any]:
    kept = {k: _without_null(v) if isinstance(v, dict) else v for k, v in record.items()}
    return {k: v for k, v in kept.items() if v is not None}


def _to_yaml(record: dict[str, Any]) -> str:
    return yaml.safe_dump(record, sort_keys=False, allow_unicode=True)


def _shown(record: dict[str, Any], settings: dict[str, Any], options: str) -> dict[str, Any]:
    unknown = set(filter(None, options.split(","))) - {"skip_default", "skip_null"}
    if unknown:
        raise UsageError(f"--print_config={options}: it can be followed by skip_default, skip_null or both.")
    if "skip_default" in options:
        record = _only(record, settings)
    return _without_null(record) if "skip_null" in options else record


def _only(record: dict[str, Any], settings: Any) -> dict[str, Any]:
    """The part of `record` that `settings` name."""
    return {
        k: _only(v, settings[k]) if isinstance(v, dict) and isinstance(settings[k], dict) else v
        for k, v in record.items()
        if k in settings
    }


def _print_class_help(
    tree: dict[str, Parameter], path: str, name: str | None, width: int, registered: Registered | None
) -> None:
    parameter = tree.get(path)
    if parameter is None or parameter.kind != "class":
        raise UsageError(f"unknown flag --{path}.help{did_you_mean(path, [p.path for p in tree.values() if p.of])}")
    if name is None:
        print("\n".join(sorted(known_classes(parameter))))
        return
    cls = find_class(parameter, name, registered)
    print(format_class_help(cls, class_parameters(cls, path), width))
