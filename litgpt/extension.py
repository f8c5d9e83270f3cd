"""Running the files and modules that people extend litgpt with, with errors that name their file and line."""

import importlib
import importlib.util
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any

_loaded: set[str] = set()


def load_extension(file_or_module: str | Path) -> None:
    """Run a Python file, or import a module, that registers models, objectives or data. A second time does nothing.

    Raises:
        ValueError: It is not there, or it fails; the message has its file and line.
    """
    name = str(file_or_module)
    is_file = name.endswith(".py") or "/" in name or Path(name).is_file()
    key = str(Path(name).resolve()) if is_file else name
    if key in _loaded:
        return
    try:
        if is_file:
            _run_file(Path(key))
        else:
            importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"--extend {name}: {_where(error)}{type(error).__name__}: {error}") from error
    _loaded.add(key)


def import_class(path: str) -> Any:
    """The object at a dotted path such as `package.module.Class`."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"Cannot import {path!r}: {error}") from error


def _run_file(path: Path) -> None:
    """Import `path` under its own name, or under a longer one where that name belongs to another module."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = path.stem
    found = sys.modules.get(name) or importlib.util.find_spec(name)
    if found is not None and getattr(found, "__file__", getattr(found, "origin", None)) != str(path):
        name = f"{name}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _where(error: Exception) -> str:
    """`file, line n: ` of the outermost line outside this file that `error` passed through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    return f"{own[0].filename}, line {own[0].lineno}: " if own else ""
