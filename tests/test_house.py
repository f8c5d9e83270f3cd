"""The house check (.ci/house.py) finds nothing here, and finds what it is there to find in a house built wrongly."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("house", ROOT / ".ci" / "house.py")
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)


def test_this_house_is_in_order():
    assert house.check(ROOT) == []


def test_every_floor_belongs_to_a_room_that_exists_or_is_planned():
    planned = {room for rooms in house.FLOORS.values() for room in rooms.split()}
    rooms = {p.stem for p in (ROOT / "litgpt").iterdir()}
    assert set(house.read_floors(ROOT)) - planned <= rooms


@pytest.mark.parametrize(
    ("files", "finding"),
    [
        ({"litgpt/model.py": "from litgpt.registry import x\n", "litgpt/registry.py": ""}, "upward: litgpt.model"),
        ({"litgpt/config.py": "def f():\n    import litgpt.model\n", "litgpt/model.py": ""}, "upward: litgpt.config"),
        ({"litgpt/model.py": "from .tokenizer import x\n", "litgpt/tokenizer.py": ""}, "alone: litgpt.model"),
        ({"litgpt/args.py": "from litgpt.utils import x\n", "litgpt/utils.py": ""}, "face: litgpt.args"),
        ({"litgpt/args.py": "from litgpt import GPT\n", "litgpt/__init__.py": ""}, "face: litgpt.args"),
        ({"litgpt/args.py": "from . import types\n", "litgpt/types.py": "from .args import x\n"}, "circle: "),
        (
            {"litgpt/data/a.py": "from .b import x\n", "litgpt/data/b.py": "from .c import x\n",
             "litgpt/data/c.py": "def f():\n    from litgpt.data.a import x\n"},
            "circle: litgpt.data.a <-> litgpt.data.b <-> litgpt.data.c",
        ),
        ({"litgpt/attic.py": "x = 1\n"}, "floor: litgpt.attic has none"),
        ({"litgpt/chat/base.py": "import extensions.mdlm\n", "extensions/mdlm.py": ""}, "does not know extensions"),
        ({"litgpt/args.py": "x = 1\n" * 501}, "length: litgpt/args.py has 501"),
        ({"litgpt/args.py": "def f():\n" + "    x = 1\n" * 80}, "length: litgpt/args.py:1 f has 81"),
        ({"litgpt/args.py": "import torch\ntorch.load('x')\n"}, "banned: litgpt/args.py:2 torch.load("),
        ({"litgpt/args.py": "import subprocess\nsubprocess.run('x', shell=True)\n"}, "shell=True"),
        ({"litgpt/args.py": "eval('1')\n"}, "banned: litgpt/args.py:1 eval("),
        ({"litgpt/pretrain.py": "import lightning as L\n"}, "heavy: litgpt/pretrain.py:1"),
        ({"litgpt/pretrain.py": "from transformers import x\n"}, "heavy: litgpt/pretrain.py:1"),
        ({"litgpt/args.py": "def f():\n    pass\n"}, "docstring: 1 of 1 public names"),
        ({"litgpt/args.py": "x = 1\n"}, "docstring: litgpt/args.py has none"),
    ],
)  # fmt: skip
def test_what_does_not_belong_is_found(tmp_path, files, finding):
    write(tmp_path, files)
    assert any(finding in found for found in house.check(tmp_path)), house.check(tmp_path)


def test_what_belongs_is_left_alone(tmp_path):
    write(
        tmp_path,
        {
            "litgpt/__init__.py": '"""Face."""\nfrom litgpt.model import x\n',
            "litgpt/model.py": '"""M."""\nif __package__:\n    from .config import x\nelse:\n    import config\n',
            "litgpt/config.py": '"""Config."""\n',
            "litgpt/checkpoint/__init__.py": "",
            "litgpt/checkpoint/io.py": '"""IO."""\nimport torch\n\ntorch.load("x")\n',
            "litgpt/args.py": '"""A."""\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import litgpt.api\n',
            "litgpt/api.py": '"""API."""\n',
            "litgpt/attic.py": '"""A room that pyproject.toml knows."""\nimport litgpt.model\n',
            "litgpt/data/__init__.py": '"""Data."""\nfrom .base import x\n',
            "litgpt/data/base.py": '"""Base."""\ndef f():\n    """Doc."""\n    import lightning\n',
        },
    )
    (tmp_path / "pyproject.toml").write_text("[tool.house.floors]\nattic = 5\n[tool.other]\nx = 1\n")
    assert house.check(tmp_path) == []


def test_no_committed_file_knows_the_machine_it_was_written_on():
    places = ["/" + name + "/" for name in ("work", "root", "home")]
    for folder in ("litgpt", "tests", "config_hub", "tutorials", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".yaml", ".toml", "") and path.is_file():
                text = path.read_text("utf-8", "replace")
                assert not [p for p in places if p in text], path


def write(root: Path, files: dict[str, str]) -> None:
    (root / "pyproject.toml").write_text("")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
