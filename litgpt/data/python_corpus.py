"""The English prose that every Python brings along: language reference and docstrings of the standard library."""

import ast
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from litgpt.data.base import cache_folder
from litgpt.data.documents import hash_texts, write_json

VERSION = 1
"""Changed together with what the corpus contains."""

MIN_CHARACTERS = 40

SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "site-packages", "lib-dynload"),
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data"),
    "encodings",  # a hundred times the same sentence about another code page
}

BUILT_IN = (
    "builtins",
    "array",
    "binascii",
    "cmath",
    "errno",
    "gc",
    "itertools",
    "marshal",
    "math",
    "sys",
    "time",
    "zlib",
)
"""Modules without Python source, whose docstrings are read off the objects."""


class Document(NamedTuple):
    """A described thing: a topic of the language reference, or a module, class or function."""

    name: str
    signature: str
    """The parameters in parentheses; empty for all but functions."""
    text: str

    def __str__(self) -> str:
        return f"{self.name}{self.signature}\n\n{self.text}\n"


def python_documents() -> list[Document]:
    """All documents of this Python without duplicates, in an order that is always the same.

    Parsing the library takes about two seconds once; the result is kept in the cache folder.
    """
    root = Path(sysconfig.get_path("stdlib"))
    key = hash_texts([sys.version, str(root), str(VERSION)])[:12]
    kept = cache_folder() / "python_docs" / f"documents-{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Document(*row) for row in json.loads(kept.read_text())]
    documents = {}
    for document in (*topics(), *source_documents(root), *built_in_documents()):
        if len(document.text) >= MIN_CHARACTERS:
            documents.setdefault(document.text, document)
    with contextlib.suppress(OSError):  # only costs the time of parsing again
        write_json(kept, list(documents.values()))
    return list(documents.values())


def is_held_out(text: str, fraction: float) -> bool:
    """Whether `text` belongs to the validation share. Depends on nothing else, so each text keeps its side forever."""
    first = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(first, "big") < fraction * 2**64


def topics() -> Iterator[Document]:
    """Chapters of the language reference, as `help()` shows them."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:  # some distributions leave it out
        return
    for name, text in sorted(texts.items()):
        yield Document(name, "", clean(text))


def source_documents(root: Path) -> Iterator[Document]:
    """Docstrings in the Python sources below `root`; nothing is imported."""
    for path in sorted(source_files(root)):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        yield from tree_documents(tree, "os.path" if name == "posixpath" else name)


def source_files(root: Path) -> Iterator[Path]:
    """Python files below `root`; folders that do not belong to the corpus are not entered, as they may be large."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py") and name != "__main__.py")


def tree_documents(node: ast.AST, name: str) -> Iterator[Document]:
    """Docstrings of a module, class or function and of what is defined in it."""
    is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    if text := ast.get_docstring(node, clean=False):
        yield Document(name, f"({ast.unparse(node.args)})" if is_function else "", clean(text))
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from tree_documents(child, f"{name}.{child.name}")


def built_in_documents() -> Iterator[Document]:
    """Docstrings of the modules written in C that are part of every Python."""
    for module_name in BUILT_IN:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        yield from object_documents(module, module_name)


def object_documents(owner: ModuleType | type, name: str) -> Iterator[Document]:
    """Docstrings of a module or class written in C, and of its members."""
    if isinstance(owner.__doc__, str):
        yield Document(name, "", clean(owner.__doc__))
    for key, member in sorted(vars(owner).items()):
        full = key if name == "builtins" else f"{name}.{key}"
        if isinstance(member, type) and isinstance(owner, ModuleType):
            yield from object_documents(member, full)
        elif inspect.isroutine(member) and not inspect.isfunction(member) and isinstance(text := member.__doc__, str):
            signature = getattr(member, "__text_signature__", None) or ""
            yield Document(full, signature.replace("$self", "self").replace("$module, ", ""), clean(text))


def clean(text: str) -> str:
    """Text without the indentation of the source and without blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in inspect.cleandoc(text).splitlines()).strip()
