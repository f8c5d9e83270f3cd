"""What the command line prints about itself: the pages of `--help`, and the text of an error."""

import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from litgpt.parameters import REQUIRED, Parameter, is_secret, known_classes, positionals, summary, type_text


def format_help(function: Callable[..., Any], prog: str, tree: dict[str, Parameter], width: int) -> str:
    """The page that `--help` prints."""
    first = positionals(tree)
    names = [p.name.upper() if p.default is REQUIRED else f"[{p.name.upper()}]" for p in first]
    lines = [f"usage: {' '.join([prog, *names])} [--flag VALUE ...]", ""]
    for paragraph in re.split(r"\n\s*\n", summary(function)):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
    for p in first:
        lines += _entry(p.name.upper(), _help_text(p), width)
    lines += ["", "options:"]
    lines += _entry("-h, --help", "Show this page.", width)
    lines += _entry("--config FILE_OR_URL", "YAML with any of these names as keys; flags win over it.", width)
    lines += _entry("--print_config[=skip_default,skip_null]", "Print the resulting settings as YAML and stop.", width)
    lines += _entry("--extend FILE_OR_MODULE", "Python that registers models, data or objectives. Repeatable.", width)
    lines += _entry("--debug", "Show where an error comes from.", width)
    for p in tree.values():
        if p.kind in ("value", "class", "name") and p not in first:
            lines += _entry(f"--{p.path} {type_text(p.type) if p.kind == 'value' else 'NAME'}", _help_text(p), width)
    for kind in ("group", "overrides"):
        for p in (p for p in tree.values() if p.kind == kind):
            lines += ["", *textwrap.wrap(f"{p.path}: {p.help or summary(p.of).splitlines()[0]}", width)]
            lines += _entry(f"--{p.path} FILE", "YAML file with any of the names below.", width)
            for child in p.children.values():
                text = _help_text(child) if p.kind == "group" else child.help
                lines += _entry(f"--{child.path} {type_text(child.type)}", text, width)
    return "\n".join(lines)


def format_class_help(cls: type, tree: dict[str, Parameter], width: int) -> str:
    """The page that `--data.help NAME` prints."""
    lines = [f"{cls.__module__}.{cls.__qualname__}", "", *textwrap.wrap(" ".join(summary(cls).split()), width), ""]
    for p in tree.values():
        lines += _entry(f"--{p.path} {type_text(p.type)}", _help_text(p), width)
    return "\n".join(lines)


def _help_text(p: Parameter) -> str:
    parts = [p.help] if p.help else []
    if p.kind == "class":
        parts.append(f"Known: {', '.join(sorted(known_classes(p)))}. Their settings: --{p.path}.help NAME.")
    if p.kind == "name":
        parts.append(f"Arguments of the class follow as --{p.path}.NAME VALUE.")
    if p.default is REQUIRED:
        parts.append("(required)")
    elif p.default is not None and not is_secret(p.path) and p.kind != "group":
        parts.append(
            f"(default:\N{NO-BREAK SPACE}{str(p.default).lower() if isinstance(p.default, bool) else p.default})"
        )
    return " ".join(parts)


def _entry(head: str, text: str, width: int) -> list[str]:
    """One flag: its text beside it, or below where the flag is too long for the column."""
    indent = " " * 34
    below = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    below = [line.replace("\N{NO-BREAK SPACE}", " ") for line in below]
    if len(head) > 30 or not below:
        return [f"  {head}", *below]
    return [f"  {head:<32}{below[0].lstrip()}", *below[1:]]


def format_commands(groups: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    """The page that `litgpt --help` prints.

    Args:
        groups: Group -> command -> (where it is implemented, or empty; what it does).
    """
    lines = ["usage: litgpt COMMAND [arguments]", "", "Language models to read, train, use and change."]
    for group, rows in groups.items():
        lines += ["", f"{group}:"]
        lines += [f"  {name:<17} {text}" for name, (target, text) in rows.items() if target]
        coming = ", ".join(name for name, (target, _) in rows.items() if not target)
        lines += (
            textwrap.wrap(f"(coming: {coming})", 96, initial_indent="  ", subsequent_indent="   ") if coming else []
        )
    lines += ["", "`litgpt COMMAND --help` shows what a command takes. Every command also takes"]
    lines += ["  --extend FILE_OR_MODULE   Python that registers models, data or objectives of your own"]
    lines += ["  --debug                   show where an error comes from"]
    return "\n".join(lines)


def error_text(error: Exception) -> str:
    """What a user reads of an error: its message; the kind of error only where nobody has foreseen it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, (ValueError, OSError, ImportError, NotImplementedError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (--debug shows where it comes from)"
