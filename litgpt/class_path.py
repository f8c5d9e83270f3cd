"""Objects as YAML: the import path of a class and the arguments that make another such object."""

import importlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import yaml


def class_path(of: type) -> str:
    """The import path of a class."""
    return f"{of.__module__}.{of.__name__}"


def init_args(instance: Any, where: str) -> dict[str, Any]:
    """The arguments, other than the defaults, that make another `instance`, as far as YAML can hold them.

    An argument is read from the attribute of its name. `where` is the file that the warning about others names.
    """
    parameters = inspect.signature(type(instance)).parameters.values()
    parameters = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    has_defaults = all(p.default is not p.empty for p in parameters)
    untouched = type(instance)() if has_defaults and parameters else None
    arguments = {}
    for parameter in parameters:
        name = parameter.name
        default = getattr(untouched, name, parameter.default)
        try:
            value = getattr(instance, name)
            if value != default:
                yaml.safe_dump(value)
                arguments[name] = value
        except (AttributeError, yaml.YAMLError):
            warnings.warn(
                f"{where} will lack the argument {name!r} of {type(instance).__name__}: it must be stored as"
                f" self.{name}, and be a text, number, list or dictionary.",
                stacklevel=4,
            )
    return arguments


def find_subclass(path: str, base: type, where: str) -> type:
    """The subclass of `base` called `path`: one already defined, else from a module that can be imported.

    Raises:
        ValueError: It cannot be imported, or is no subclass; the message begins with `where`.
    """
    for known in _subclasses(base):
        if class_path(known) == path:
            return known
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # the module may fail in any way
        raise ValueError(
            f"{where}: {path!r} cannot be imported ({error}); put its file on PYTHONPATH or load it with --extend."
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{where}: {path!r} is not a subclass of {class_path(base)}.")
    return found


def _subclasses(base: type) -> Iterator[type]:
    """All classes below `base`; of two with one name the later definition comes first."""
    for child in reversed(base.__subclasses__()):
        yield child
        yield from _subclasses(child)
