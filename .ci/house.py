"""The house check: what may import what, how long files and functions may be, calls that are never made, docstrings.

    python .ci/house.py [PROJECT_ROOT]        prints what it finds and exits 1 if there is anything

It reads source text only and needs no installed package. CONTRIBUTING.md explains the floors; a new module says its
floor in pyproject.toml under [tool.house.floors].
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FLOORS = {
    0: "types constants args parser_config losses surgery tokenizer",
    1: "config",
    2: "model prompts chat_template",
    3: "lora adapter quantize parallel checkpoint data",
    4: "adapter_v2 registry objective",
    5: "generate training loggers hardware plan scripts",
    6: "finetune pretrain quickstart chat eval api testing",
    7: "deploy __main__",
}
FACES = {"__init__", "utils"}
MAX_FUNCTION_LINES = 80
MAX_FILE_LINES = {"litgpt/model.py": 1000, "litgpt/config.py": 1000, "litgpt/__main__.py": 120}
MAX_OTHER_FILE_LINES = 500
MAX_SHARE_WITHOUT_DOCSTRING = 0.1
BANNED = {  # call -> the one place where it may stand
    "torch.load": "litgpt/checkpoint/",
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "yaml.load": None,
    "os.system": None,
    "jinja2.Template": None,
    "eval": None,
    "exec": None,
}
HEAVY = {"lightning", "transformers", "datasets", "litdata", "matplotlib", "requests", "bitsandbytes", "starlette"}
HEAVY |= {"uvicorn", "wandb", "mlflow", "tensorboard", "sentencepiece", "jsonargparse", "pandas", "pyarrow", "lm_eval"}


def read_floors(root: Path) -> dict[str, int]:
    """Room (a module, or a folder, directly below litgpt) -> floor; pyproject.toml adds to the plan above."""
    floors = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
    project = root / "pyproject.toml"
    section = re.search(r"^\[tool\.house\.floors\]\n(.*?)(?=^\[|\Z)", project.read_text("utf-8"), re.M | re.S)
    for room, floor in re.findall(r"^([\w.]+)\s*=\s*(\d+)", section[1] if section else "", re.M):
        floors[room] = int(floor)
    return floors


def module_name(path: Path, root: Path) -> str:
    """`litgpt.data.base` for `litgpt/data/base.py`; a package goes by its own name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """The part of a module name that has a floor: `data` for `litgpt.data.base`."""
    return module.split(".")[1] if "." in module else "__init__"


def type_checking_nodes(tree: ast.Module) -> set[int]:
    """Nodes that only a type checker sees."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return {id(node) for block in blocks for statement in block.body for node in ast.walk(statement)}


def imported_names(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[ast.AST, str]]:
    """Each imported module, or `module.name` of a from-import, with its node."""
    hidden = type_checking_nodes(tree)
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level + is_package or None]
                base = ".".join([*above, *([base] if base else [])])
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)


def import_graph(trees: dict[Path, ast.Module], root: Path) -> dict[str, set[str]]:
    """Our modules -> our modules that they import, at any depth of the file."""
    known = {module_name(path, root): path for path in trees}
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        graph[module] = set()
        for _, name in imported_names(trees[path], module, path.stem == "__init__"):
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by taking away what imports nothing that is left, from both ends."""
    left = {m: {n for n in found if n in graph} for m, found in graph.items()}
    while True:
        imported = {n for found in left.values() for n in found}
        loose = [m for m, found in left.items() if not found or m not in imported]
        if not loose:
            break
        for m in loose:
            del left[m]
        left = {m: {n for n in found if n in left} for m, found in left.items()}
        if not left:
            return []
    return [sorted(left)]


def check_imports(graph: dict[str, set[str]], floors: dict[str, int]) -> Iterator[str]:
    """Circles, upward imports, imported faces, rooms without a floor."""
    for circle in find_circles(graph):
        yield f"circle: {' <-> '.join(circle)}"
    for module, found in sorted(graph.items()):
        if not module.startswith("litgpt"):
            continue
        room = room_of(module)
        if room not in floors and room not in FACES:
            yield f"floor: {module} has none; say it in pyproject.toml, [tool.house.floors]"
        for other in sorted(found):
            if not other.startswith("litgpt"):
                yield f"upward: {module} imports {other}; the core does not know extensions"
                continue
            above = room_of(other)
            if room in FACES:
                continue
            if above in FACES:
                yield f"face: {module} imports {other}, which only hands names on"
            elif floors.get(above, 0) > floors.get(room, 9):
                yield f"upward: {module} (floor {floors.get(room)}) imports {other} (floor {floors.get(above)})"
            elif room in ("config", "model") and above not in ("config", room):
                yield f"alone: {module} imports {other}; people copy model.py and config.py, and nothing else"


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such an expression, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""


def check_file(path: Path, tree: ast.Module, root: Path) -> Iterator[str]:
    """Lengths, banned calls and heavy imports of one file."""
    rel, text = path.relative_to(root).as_posix(), path.read_text("utf-8")
    limit, n_lines = MAX_FILE_LINES.get(rel, MAX_OTHER_FILE_LINES), len(text.splitlines())
    if n_lines > limit:
        yield f"length: {rel} has {n_lines} lines, at most {limit}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            n_lines = node.end_lineno - node.lineno + 1
            if n_lines > MAX_FUNCTION_LINES and node.name != "setup":
                yield f"length: {rel}:{node.lineno} {node.name} has {n_lines} lines, at most {MAX_FUNCTION_LINES}"
        elif isinstance(node, ast.Call):
            call = dotted(node.func)
            if call in BANNED and not (BANNED[call] and rel.startswith(BANNED[call])):
                yield f"banned: {rel}:{node.lineno} {call}("
            if any(k.arg == "shell" and getattr(k.value, "value", False) is True for k in node.keywords):
                yield f"banned: {rel}:{node.lineno} shell=True"
    hidden = type_checking_nodes(tree)
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in hidden:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in HEAVY:
                    yield f"heavy: {rel}:{node.lineno} imports {name} for everybody; import it where it is used"
    if not ast.get_docstring(tree) and text.strip():
        yield f"docstring: {rel} has none"


def check_docstrings(trees: dict[Path, ast.Module], root: Path) -> Iterator[str]:
    """A finding when too many public names have no docstring. Small classes of a table may do without."""
    public, bare = 0, []
    for path, tree in trees.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                public += 1
                if not ast.get_docstring(node):
                    bare.append(f"{path.relative_to(root).as_posix()}:{node.lineno} {node.name}")
    if len(bare) > MAX_SHARE_WITHOUT_DOCSTRING * public:
        yield f"docstring: {len(bare)} of {public} public names have none: {', '.join(bare[:5])} ..."


def check(root: Path) -> list[str]:
    """All findings in the project at `root`."""
    paths = sorted(path for folder in ("litgpt", "extensions") for path in (root / folder).rglob("*.py"))
    trees = {path: ast.parse(path.read_text("utf-8"), str(path)) for path in paths}
    found = list(check_imports(import_graph(trees, root), read_floors(root)))
    for path, tree in trees.items():
        found += check_file(path, tree, root)
    return [*found, *check_docstrings(trees, root)]


def main() -> int:
    """Print the findings; the exit status says whether there are any."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    found = check(root)
    print("\n".join(found) if found else "house: nothing to remark")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
