"""What a command accepts: the tree of names behind its flags, YAML keys and help, read from a function's signature."""

import ast
import difflib
import functools
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

REQUIRED = inspect.Parameter.empty
LEAVES = (str, int, float, bool, complex, bytes, list, tuple, dict, set, Path, Enum, type(None))


class UsageError(ValueError):
    """The command line or a config file says something that the command cannot take. One line, exit status 2."""


@dataclass
class Parameter:
    """One name that a user may say, as a flag and as a YAML key."""

    path: str
    """Full name with dots: `train.save_interval`."""
    type: Any
    default: Any = REQUIRED
    help: str = ""
    kind: Literal["value", "group", "overrides", "class", "name"] = "value"
    """value: one typed value. group: a dataclass that is always built. overrides: single fields of a dataclass that are
    handed on as they are given. class: a class of the user's choice, built with its arguments. name: a class and its
    arguments too, but as text or map, which the command itself makes sense of."""
    of: Any = None
    """The dataclass of a group and of overrides; the base class of a class."""
    children: dict[str, "Parameter"] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def package(self) -> str:
        """Module in which a class may be named without its path."""
        return self.of.__module__.rpartition(".")[0] or self.of.__module__

    def takes_map(self) -> bool:
        """Whether keys below this one are values of the user's making, as in a dict."""
        members = get_args(self.type) if is_union(self.type) else (self.type,)
        return any(m is Any or (get_origin(m) or m) is dict or _is_own_class(m) for m in members)

    def walk(self) -> Iterator["Parameter"]:
        """This parameter and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()


def read_signature(function: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a function, groups and overrides with their fields."""
    hints, docs = get_type_hints(function), docstring_args(function)
    return {
        name: _parameter(name, hints.get(name, Any), p.default, docs.get(name, ""))
        for name, p in inspect.signature(function).parameters.items()
    }


def class_parameters(cls: type, prefix: str) -> dict[str, Parameter]:
    """The constructor arguments of a class, as parameters below `prefix`. `**kwargs` are those of the base classes."""
    if is_dataclass(cls):
        return _fields(cls, prefix)
    found: dict[str, Parameter] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" not in base.__dict__:
            continue
        hints, docs = _hints_or_none(base.__init__), {**docstring_args(base), **docstring_args(base.__init__)}
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for p in parameters:
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in found:
                path, kind_of = f"{prefix}.{p.name}", hints.get(p.name, Any)
                found[p.name] = _parameter(path, kind_of, p.default, docs.get(p.name, ""))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _parameter(path: str, kind_of: Any, default: Any, doc: str) -> Parameter:
    parameter = Parameter(path, kind_of, default, doc)
    members = [m for m in (get_args(kind_of) if is_union(kind_of) else (kind_of,)) if m is not type(None)]
    groups = [m for m in members if inspect.isclass(m) and is_dataclass(m)]
    if len(members) == 1 and groups and (default is REQUIRED or is_dataclass(default)):
        parameter.kind, parameter.of = "group", groups[0]
        parameter.children = _fields(groups[0], path, default)
    elif groups and all(m is dict or m in groups for m in members):
        parameter.kind, parameter.of = "overrides", groups[0]
        parameter.children = _fields(groups[0], path)
        for cls in _subclasses(groups[0]):
            if any(f.name not in parameter.children for f in fields(cls) if f.init):
                parameter.children = {**_fields(cls, path), **parameter.children}
    elif len(members) == 1 and _is_own_class(members[0]):
        parameter.kind, parameter.of = "class", members[0]
    elif set(members) == {str, dict}:
        parameter.kind = "name"
    return parameter


def _fields(cls: type, prefix: str, instance: Any = None) -> dict[str, Parameter]:
    """The fields of a dataclass that its constructor takes; defaults are those of `instance` if there is one."""
    hints, docs, found = get_type_hints(cls), field_docs(cls), {}
    for f in fields(cls):
        if not f.init:
            continue
        default = f.default if f.default is not MISSING else REQUIRED
        if f.default_factory is not MISSING:
            default = f.default_factory()
        if is_dataclass(instance):
            default = getattr(instance, f.name)
        found[f.name] = _parameter(f"{prefix}.{f.name}", hints[f.name], default, docs.get(f.name, ""))
    return found


def is_union(annotation: Any) -> bool:
    """Whether a type is `A | B`, `Union[A, B]` or `Optional[A]`."""
    return get_origin(annotation) in (Union, types.UnionType)


def _is_own_class(annotation: Any) -> bool:
    return (
        inspect.isclass(annotation)
        and get_origin(annotation) is None
        and not issubclass(annotation, LEAVES)
        and annotation is not object
        and annotation is not Any
    )


def _hints_or_none(function: Callable[..., Any]) -> dict[str, Any]:
    """Resolved annotations; empty where a foreign constructor has some that exist for type checkers only."""
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


# Classes by name


def find_class(
    parameter: Parameter, name: str, registered: Callable[[str], type | None] | None = None, where: str | None = None
) -> type:
    """The class that the user means by `name`: registered, in the parameter's package, imported, or a full path.

    Args:
        parameter: Says what kind of class is wanted.
        name: As the user spells it.
        registered: Finds classes that extensions have registered under a name.
        where: Where the user has said it; default: in the flag.

    Raises:
        UsageError: There is none, or it is of another kind; the message has the nearest known name.
    """
    where = where or f"--{parameter.path}"
    found = registered(name) if registered else None
    if found is None and "." not in name:
        found = known_classes(parameter).get(name)
    elif found is None:
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(
                f"{where}: cannot import {name!r} ({error}). A class in a file of your own needs --extend FILE.py."
            ) from None
    if not inspect.isclass(found) or not issubclass(found, parameter.of):
        reason = "is not known" if found is None else f"is no {parameter.of.__name__}"
        raise UsageError(f"{where}: {name!r} {reason}{did_you_mean(name, known_classes(parameter))}")
    return found


def known_classes(parameter: Parameter) -> dict[str, type]:
    """Classes that go by their bare name: the public ones of the parameter's package, and imported subclasses."""
    package = importlib.import_module(parameter.package)
    names = getattr(package, "__all__", None) or [n for n in dir(package) if not n.startswith("_")]
    found = {}
    for name in names:
        value = getattr(package, name, None)
        if inspect.isclass(value) and issubclass(value, parameter.of):
            found[name] = value
    for cls in _subclasses(parameter.of):
        found.setdefault(cls.__name__, cls)
    return {name: cls for name, cls in found.items() if not inspect.isabstract(cls) and cls is not parameter.of}


# Names that are nearly right


def did_you_mean(word: str, words: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean x?`, or a full stop where nothing is near."""
    folded = {w.lower(): w for w in words}
    close = difflib.get_close_matches(word.lower(), folded, n=1, cutoff=cutoff)
    return f"; did you mean {folded[close[0]]}?" if close else "."


def nearest_path(path: str, known: Iterable[str]) -> str | None:
    """The full name that a misspelt or misplaced one most likely stands for."""

    def likeness(other: str) -> float:
        (parent, _, name), (other_parent, _, other_name) = path.rpartition("."), other.rpartition(".")
        alike = difflib.SequenceMatcher(None, name.lower(), other_name.lower()).ratio()
        return alike + 0.2 * difflib.SequenceMatcher(None, parent, other_parent).ratio()

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


_SECRET = re.compile(
    r"secret|passw|credential|(?:api|private|access)_?key|(?:access|auth|api|hf|bearer|refresh)_?tokens"
    r"|(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!per_)token(?![is])"
)


def is_secret(name: str) -> bool:
    """Whether values of this name must never be shown or stored: access_token, api_key; not max_tokens, eos_token."""
    return bool(_SECRET.search(name.lower()))


def positionals(tree: dict[str, Parameter]) -> list[Parameter]:
    """What may be said without a flag: the parameters without default, or else the very first one."""
    required = [p for p in tree.values() if p.kind == "value" and p.default is REQUIRED]
    return required or [p for p in list(tree.values())[:1] if p.kind == "value"]


def type_text(annotation: Any) -> str:
    """A type as a user reads it: `int or null`, `{bnb.nf4,bnb.int8} or null`, `true|false`."""
    if annotation is REQUIRED or annotation is Any or isinstance(annotation, TypeVar):
        return "value"
    if is_union(annotation):
        return " or ".join(
            dict.fromkeys(type_text(m) for m in sorted(get_args(annotation), key=lambda m: m is type(None)))
        )
    if get_origin(annotation) is Literal:
        choices = [str(c) for c in get_args(annotation) if c is not None]
        return (f"{{{','.join(choices)}}}" if len(choices) > 1 else choices[0]) + (
            " or null" if None in get_args(annotation) else ""
        )
    names = {str: "text", int: "int", float: "float", bool: "true|false", dict: "map", list: "list", tuple: "list"}
    if annotation is type(None):
        return "null"
    origin = get_origin(annotation) or annotation
    if origin in (list, tuple) and get_args(annotation):
        inner = [type_text(a) for a in get_args(annotation) if a is not ...]
        return f"list of {' or '.join(dict.fromkeys(inner))}"
    if inspect.isclass(origin) and issubclass(origin, Path):
        return "path"
    return names.get(origin, getattr(origin, "__name__", str(origin)))


# Docstrings


def field_docs(cls: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of its bases."""
    return {name: text for base in reversed(cls.__mro__[:-1]) for name, text in _own_field_docs(base).items()}


@functools.cache
def _own_field_docs(cls: type) -> dict[str, str]:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    except (OSError, TypeError, SyntaxError, IndexError):  # no source: made by a function, or typed at a prompt
        return {}
    found = {}
    for node, after in pairwise(body):
        is_text = isinstance(after, ast.Expr) and isinstance(getattr(after.value, "value", None), str)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
            found[node.target.id] = " ".join(after.value.value.split())
    return found


def docstring_args(function: Any) -> dict[str, str]:
    """The `Args:` section of a Google docstring."""
    doc = inspect.getdoc(function) or ""
    section = re.search(r"^(?:Args|Arguments):\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if not section:
        return {}
    entries = re.split(r"^(\w+)(?: \([^)]*\))?:", textwrap.dedent(section[1]), flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(entries[1::2], entries[2::2])}


def summary(function: Any) -> str:
    """A docstring without its sections."""
    doc = inspect.getdoc(function) or ""
    return re.split(r"^(?:Args|Arguments|Returns|Raises|Yields|Example|Examples):\s*$", doc, flags=re.MULTILINE)[
        0
    ].strip()
