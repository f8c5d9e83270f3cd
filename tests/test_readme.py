"""Every python and bash block of the README and the tutorials is run, in order, in one folder for each page.

`litgpt ...` runs inside this process, which saves the seconds that torch and lightning take to import.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from litgpt.__main__ import ROWS, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "tutorials").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not executed: (?P<reason>.+?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)
REASONS = ("package index", "several GPUs", "network")


class CodeBlock(NamedTuple):
    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> list[CodeBlock]:
    return [CodeBlock(m["language"], m["text"], m["reason"]) for m in BLOCK.finditer(page.read_text("utf-8"))]


def run_python(text: str) -> None:
    name = re.match(r"# (\w+\.py)\n", text)
    if name:
        Path(name[1]).write_text(text)
        subprocess.run([sys.executable, "-m", "py_compile", name[1]], check=True)
    else:
        exec(compile(text, "<block>", "exec"), {"__name__": "__main__"})


def run_bash(text: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "litgpt", f"cannot run {line!r} here; mark the block as not executed"
        main(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_on_the_page_runs(page, tmp_path, tmp_path_factory, monkeypatch, capsys):
    found = blocks(page)
    shutil.copytree(ROOT / "config_hub", tmp_path / "config_hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE", str(tmp_path_factory.getbasetemp() / "readme-cache"))
    for block in found:
        if block.reason is None and block.language in ("python", "bash"):
            (run_python if block.language == "python" else run_bash)(block.text)
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_language_and_skipped_ones_a_reason(page):
    text = page.read_text("utf-8")
    assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(page)), "a block without a language"
    assert all(any(known in block.reason for known in REASONS) for block in blocks(page) if block.reason)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_table_of_commands_says_what_works_today():
    table = (ROOT / "README.md").read_text("utf-8").split("## Commands")[1].split("## ")[0]
    rows = [line.split("|")[2:4] for line in table.splitlines() if line.startswith("|")][2:]
    today, coming = (set(re.findall(r"`(\w+)`", " ".join(row[i] for row in rows))) for i in range(2))
    assert today == {name for name, (target, _) in ROWS.items() if target}
    assert coming == {name for name, (target, _) in ROWS.items() if not target}
