"""Reading what the user says, in flags and YAML files, and turning it into the arguments of a function."""

import re
import sys
import urllib.request
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from litgpt.parameters import (
    REQUIRED,
    Parameter,
    UsageError,
    class_parameters,
    did_you_mean,
    find_class,
    is_secret,
    is_union,
    nearest_path,
    positionals,
    type_text,
)

Registered = Callable[[str], type | None]
"""Finds a class by the name under which an extension has registered it."""


@dataclass
class Line:
    """The words of a command line, not yet understood."""

    words: list[str] = field(default_factory=list)
    flags: list[tuple[str, str]] = field(default_factory=list)
    help: bool = False
    class_help: tuple[str, str | None] | None = None
    print_config: str | None = None


def read_line(argv: list[str]) -> Line:
    """Tell flags with their values from bare words. A flag takes the next word, also one that begins with one dash."""
    line, rest = Line(), list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--":
            line.words += rest
            break
        if word in ("-h", "--help"):
            line.help = True
        elif not word.startswith("--"):
            if re.match(r"-[A-Za-z]", word):
                raise UsageError(f"unknown flag {word}; flags begin with two dashes.")
            line.words.append(word)
        elif name == "print_config":
            line.print_config = value
        elif name.endswith(".help"):
            if not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            line.class_help = (name.removesuffix(".help"), value or None)
        elif equals:
            line.flags.append((name, value))
        else:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else MISSING
            line.flags.append((name, value))
    return line


def take_common_flags(argv: list[str]) -> tuple[list[str], list[str], bool]:
    """The line without `--extend X` and `--debug`, what is to be loaded, and whether tracebacks are wanted."""
    words, extensions, debug = [], [], False
    while argv:
        word = argv.pop(0)
        if word == "--extend" and not argv:
            raise UsageError("--extend needs a value: the file or module to load.")
        if word == "--extend" or word.startswith("--extend="):
            extensions.append(argv.pop(0) if word == "--extend" else word.partition("=")[2])
        elif word == "--debug":
            debug = True
        else:
            words.append(word)
    return words, extensions, debug


MISSING = "\0"
"""In place of the value that a flag lacks: `true` for yes-or-no flags; an error for others, if they exist at all."""


class _Loader(yaml.SafeLoader):
    """The safe YAML loader, for which 1e-4 is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_yaml(text: str, where: str) -> Any:
    """What a YAML text says; `where` is named in the error if it is not YAML."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{where}{at}: not valid YAML: {problem or error}") from None
    finally:
        if loader:
            loader.dispose()


def load_config_file(name: str, flag: str = "--config", folder: Path | None = None) -> dict[str, Any]:
    """The map in a YAML file, or at a URL. A relative name is looked for in `folder` first.

    Raises:
        UsageError: It cannot be read, or is not a map.
    """
    path = folder / name if folder and (folder / name).is_file() else Path(name).expanduser()
    try:
        if re.match(r"https?://", name):
            with urllib.request.urlopen(name, timeout=30) as response:
                text = response.read(10_000_000).decode("utf-8")
        else:
            text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{flag} {name}: cannot be read: {reason}.") from None
    found = load_yaml(text, name)
    if found is not None and not isinstance(found, dict):
        raise UsageError(f"{flag} {name}: holds {type(found).__name__}, not a map of names and values.")
    return found or {}


class Settings:
    """What the user has said so far: `given` as nested maps of raw values, and for each name where it was said."""

    def __init__(self, tree: dict[str, Parameter], registered: Registered | None = None) -> None:
        self.tree = tree
        self.registered = registered
        self.given: dict[str, Any] = {}
        self.origins: dict[str, str] = {}

    def take_line(self, line: Line) -> None:
        """Config files first, then bare words, then the classes that flags choose, then all other flags: flags win."""
        flags = [(self._full_name(n, strict=False) or n, v) for n, v in line.flags]
        for name, value in flags:
            if name == "config" and value != MISSING:
                folder = None if re.match(r"https?://", value) else Path(value).expanduser().parent
                self._take(self.tree, load_config_file(value), self.given, value, folder)
        places = positionals(self.tree)
        if len(line.words) > len(places):
            raise UsageError(f"unexpected argument {line.words[len(places)]!r}: a setting needs its --flag before it.")
        self._take(self.tree, dict(zip([p.name for p in places], line.words)), self.given, "")
        classes = [p.path for p in self.tree.values() if p.kind in ("class", "name")]
        choices = [*classes, *(f"{path}.class_path" for path in classes)]
        for name, value in flags:
            if name in choices and value != MISSING:
                self._take(self.tree, _nested(name, value), self.given, "")
        self._open_classes()
        for name, value in flags:
            full = self._full_name(name)
            if value == MISSING:
                p = self._all().get(full)
                if p is None or bool not in (p.type, *get_args(p.type)):
                    raise UsageError(f"--{name} needs a value, as in --{name} VALUE.")
                value = "true"
            if full not in ("config", *choices):
                self._take(self.tree, _nested(full, value), self.given, "")

    def typed(self, complete: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments to call the function with, and all settings, defaults included, in a form to write down.

        Args:
            complete: Refuse if something required is missing, and build the objects.
        """
        arguments, record = {}, {}
        for name, p in self.tree.items():
            if name in self.given:
                arguments[name], record[name] = self._typed(p, self.given[name], complete)
            elif p.default is not REQUIRED:
                record[name] = p.default
            elif complete:
                raise UsageError(f"{name.upper()} is missing: {p.help or type_text(p.type)}")
            else:
                record[name] = None
        return arguments, record

    def _typed(self, p: Parameter, raw: Any, complete: bool) -> tuple[Any, Any]:
        """The value for the function, and the value for the record."""
        if p.kind == "value" or raw is None:
            return convert(raw, p, self._where(p.path))
        if p.kind == "class":
            return self._typed_class(p, raw, complete)
        if p.kind == "name":
            arguments = {k: _scalar(v, self._where(f"{p.path}.{k}")) for k, v in raw["init_args"].items()}
            value = {"class_path": raw["class_path"], "init_args": arguments} if arguments else raw["class_path"]
            return value, value
        pairs = {k: self._typed(p.children[k], v, complete) for k, v in raw.items()}
        values, shown = {k: v for k, (v, _) in pairs.items()}, {k: s for k, (_, s) in pairs.items()}
        if p.kind == "overrides" and dict in get_args(p.type):
            return values, shown
        try:
            value = replace(p.default, **values) if is_dataclass(p.default) else p.of(**values)
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from None
        return value, shown if p.kind == "overrides" else value

    def _typed_class(self, p: Parameter, raw: dict[str, Any], complete: bool) -> tuple[Any, Any]:
        cls, values, shown = self._class_of(p, raw), {}, {}
        for name, child in p.children.items():
            if name in raw["init_args"]:
                values[name], shown[name] = self._typed(child, raw["init_args"][name], complete)
            elif child.default is not REQUIRED:
                shown[name] = child.default
            elif complete:
                what = child.help or type_text(child.type)
                raise UsageError(f"--{p.path} {cls.__name__} needs --{child.path}: {what}")
        return cls(**values) if complete else None, {"class_path": class_path(cls), "init_args": shown}

    def _take(
        self,
        tree: dict[str, Parameter],
        given: dict[str, Any],
        into: dict[str, Any],
        origin: str,
        folder: Path | None = None,
    ) -> None:
        """Add the map `given` to `into`, names checked against `tree`. `origin` is the file, or empty for a flag."""
        for key, value in given.items():
            p = tree.get(key)
            if p is None and isinstance(key, str) and key.partition(".")[0] in tree:  # "train.epochs: 1" in a file
                self._take(tree, _nested(key, value), into, origin, folder)
                continue
            if p is None:
                parent = next(iter(tree.values())).path.rpartition(".")[0] if tree else ""
                raise UsageError(self._unknown(f"{parent}.{key}".lstrip("."), origin))
            self.origins[p.path] = origin
            if p.kind == "value":
                into[key] = _merged(into.get(key), value)
            elif p.kind in ("class", "name"):
                into[key] = self._take_class(p, value, into.get(key), origin, folder)
            elif value in (None, "null") and p.kind == "overrides":
                into[key] = None
            else:
                value = _as_map(value, self._where(p.path), folder)
                if p.kind == "overrides":  # a saved model_config.yaml may say model_type, other tools say class_path
                    value = {**(value.get("init_args") or {}), **value}
                    value = {k: v for k, v in value.items() if k not in ("class_path", "init_args", "model_type")}
                into[key] = into.get(key) or {}
                self._take(p.children, value, into[key], origin, folder)

    def _take_class(
        self, p: Parameter, value: Any, old: dict[str, Any] | None, origin: str, folder: Path | None
    ) -> dict[str, Any] | None:
        """A class and its arguments; arguments said before for another class are dropped."""
        if value in (None, "null"):
            return None
        is_name = (
            isinstance(value, str) and not value.startswith("{") and not value.endswith((".yaml", ".yml", ".json"))
        )
        given = {"class_path": value} if is_name else dict(_as_map(value, self._where(p.path), folder))
        old = old or {"class_path": p.default if p.kind == "name" else None, "init_args": {}}
        path = given.pop("class_path", None) or old["class_path"]
        is_same = not old["class_path"] or path.rpartition(".")[2] == old["class_path"].rpartition(".")[2]
        arguments = dict(old["init_args"]) if is_same else {}
        for name, argument in {**(given.pop("init_args", None) or {}), **given}.items():
            self.origins[f"{p.path}.{name}"] = origin
            arguments[name] = _merged(arguments.get(name), argument)
        return {"class_path": path, "init_args": arguments}

    def _open_classes(self) -> None:
        """Find the chosen classes and check the names of the arguments that files have given for them."""
        for p in self.tree.values():
            chosen = self.given.get(p.name) if p.kind == "class" else None
            if not chosen:
                continue
            if not chosen["class_path"]:
                raise UsageError(f"{self._where(p.path)}: class_path is missing, it says which class is meant.")
            p.children = class_parameters(self._class_of(p, chosen), p.path)
            for name in chosen["init_args"]:
                if name not in p.children:
                    raise UsageError(self._unknown(f"{p.path}.{name}", self.origins.get(f"{p.path}.{name}", "")))

    def _class_of(self, p: Parameter, chosen: dict[str, Any]) -> type:
        return find_class(p, str(chosen["class_path"]), self.registered, self._where(p.path))

    def _all(self) -> dict[str, Parameter]:
        return {q.path: q for p in self.tree.values() for q in p.walk()}

    def _full_name(self, name: str, strict: bool = True) -> str | None:
        """The name that a flag stands for: itself, or the one name that begins with it."""
        name = name.replace(".init_args.", ".")
        known = self._all()
        root = known.get(name.partition(".")[0])
        if (
            name in known
            or name == "config"
            or (root and root.kind in ("class", "name") and name.endswith(".class_path"))
        ):
            return name
        above = [p for path, p in known.items() if name.startswith(f"{path}.")]
        if any(p.kind == "name" or (p.kind == "value" and p.takes_map()) for p in above):
            return name
        begun = [k for k in (*known, "config") if k.startswith(name)]
        begun = [k for k in begun if k.count(".") == name.count(".")] or begun
        if len(begun) == 1:
            return begun[0]
        if not strict:
            return None
        if begun:
            raise UsageError(f"--{name} is not unique: it could be {', '.join('--' + b for b in begun[:6])}.")
        if root and root.kind == "class" and not root.children:
            raise UsageError(
                f"--{name} is a setting of a class: say --{root.path} NAME too, or see --{root.path}.help."
            )
        raise UsageError(self._unknown(name, ""))

    def _unknown(self, path: str, origin: str) -> str:
        dashes = "" if origin else "--"
        near = nearest_path(path, self._all())
        said = f"{origin}: unknown key {path!r}" if origin else f"unknown flag --{path}"
        return f"{said}; did you mean {dashes}{near}?" if near else f"{said}."

    def _where(self, path: str) -> str:
        origin = self.origins.get(path, "")
        return f"{origin}: {path}" if origin else f"--{path}"


def class_path(cls: type) -> str:
    """The shortest path under which a class can be imported: `litgpt.data.TextFiles`."""
    module = cls.__module__
    for package in (module.rpartition(".")[0], module):
        if package in sys.modules and getattr(sys.modules[package], cls.__name__, None) is cls:
            return f"{package}.{cls.__name__}"
    return f"{module}.{cls.__qualname__}"


def _nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def _merged(old: Any, new: Any) -> Any:
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def _as_map(value: Any, where: str, folder: Path | None) -> dict[str, Any]:
    """A map given as such, as inline YAML, or as the name of a YAML file."""
    if isinstance(value, str):
        value = load_yaml(value, where) if value.startswith("{") else load_config_file(value, where, folder)
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {value!r} is neither a map nor the name of a YAML file.")
    return value


# Types


def convert(raw: Any, p: Parameter, where: str) -> tuple[Any, Any]:
    """`raw` as the type of `p`: the value itself, and a form of it for the record.

    Raises:
        UsageError: It is not of that type.
    """
    from jsonargparse import ArgumentParser

    kind = _text_last(p.type)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        found = parser.parse_object({"value": _simple(raw, kind)})
    except (ArgumentError, ValueError, TypeError) as error:
        raise UsageError(_type_error(raw, p, where, error)) from None
    if found["value"] is None and not _allows_null(kind):
        raise UsageError(_type_error(raw, p, where))
    shown = found["value"].as_dict() if hasattr(found["value"], "as_dict") else found["value"]
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return build(found)["value"], shown


def _simple(raw: Any, kind: Any) -> Any:
    """Whole numbers written as 3e9, numbers in YAML where text is meant, and the texts in a map given by flags."""
    members = get_args(kind) if is_union(kind) else (kind,)
    if int in members and float not in members:
        if isinstance(raw, float) and raw.is_integer():
            return int(raw)
        if isinstance(raw, str) and re.fullmatch(r"[-+]?\d+(?:\.\d+)?[eE]\+?\d+", raw) and float(raw).is_integer():
            return int(float(raw))
    if str in members and isinstance(raw, (int, float)) and not {type(raw), float, Any} & set(members):
        return str(raw)
    if isinstance(raw, dict) and any((get_origin(m) or m) is dict for m in members):
        return {k: _scalar(v, str(k)) for k, v in raw.items()}
    return raw


def _scalar(raw: Any, where: str) -> Any:
    """A text as YAML reads it: number, true, null, list, or the text itself."""
    return load_yaml(raw, where) if isinstance(raw, str) and raw else raw


def _text_last(kind: Any) -> Any:
    """A union in which text comes last, since any word would be text otherwise."""
    return Union[tuple(sorted(get_args(kind), key=lambda m: m is str))] if is_union(kind) else kind  # noqa: UP007


def _allows_null(kind: Any) -> bool:
    return kind in (None, type(None), Any) or None in get_args(kind) or any(_allows_null(m) for m in get_args(kind))


def _type_error(raw: Any, p: Parameter, where: str, error: Exception | None = None) -> str:
    text = f"{where}: {'this' if is_secret(p.path) else repr(raw)} is not {type_text(p.type)}"
    literals = [c for m in (p.type, *get_args(p.type)) if get_origin(m) is Literal for c in get_args(m) if c]
    if literals and isinstance(raw, str):
        return text + did_you_mean(raw, map(str, literals))
    details = [d.strip(" -") for d in str(error).splitlines() if "not accepted" in d or "not expected" in d]
    return f"{text} ({details[0]})." if details else f"{text}."
