import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from litgpt.checkpoint import atomic
from litgpt.checkpoint.atomic import atomic_folder, remove_leftovers
from litgpt.checkpoint.io import check_crc, load_torch, save_torch


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(params=["exchange", "two renames"])
def renaming(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    return request.param


def test_folder_appears_whole_and_replaces_an_older_one(tmp_path, renaming):
    target = tmp_path / "run" / "final"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)
            assert folder.parent == target.parent and not (target / "sub" / content).exists()
        assert [path.name for path in (target / "sub").iterdir()] == [content]
    assert [path.name for path in target.parent.iterdir()] == ["final"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_the_older_folder_and_no_leftover(tmp_path, error):
    with atomic_folder(tmp_path / "final") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(error), atomic_folder(tmp_path / "final") as folder:
        (folder / "x").write_text("new")
        raise error
    assert (tmp_path / "final" / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"cannot write .*file/final: Not a directory"),
        atomic_folder(tmp_path / "file" / "final"),
    ):
        pass
    with pytest.raises(OSError, match=r"cannot write .*/file: "), atomic_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").is_file() and len(list(tmp_path.iterdir())) == 1


def test_failing_rename_keeps_the_older_folder(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "final") as folder:
        (folder / "x").write_text("old")

    def fail(*names):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic, "_exchange", fail)
    with pytest.raises(OSError, match=r"cannot write .*final: Input/output error"), atomic_folder(tmp_path / "final"):
        pass
    assert (tmp_path / "final" / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_dead_processes_go_and_others_stay(tmp_path, dead_pid):
    dead_folder, dead_file = tmp_path / f".final.tmp-{dead_pid}", tmp_path / f".x.pth.tmp-{dead_pid}"
    own, living = tmp_path / f".step-1.tmp-{os.getpid()}", tmp_path / f".step-1.tmp-{os.getppid()}"
    others = [tmp_path / name for name in ("final", ".hidden", ".x.tmp-", f"y.tmp-{dead_pid}")]
    for folder in (dead_folder, own, living, *others):
        folder.mkdir()
    (dead_folder / "part").write_text("x")
    dead_file.write_text("x")
    assert sorted(remove_leftovers(tmp_path)) == sorted([dead_folder, own, dead_file])
    assert sorted(tmp_path.iterdir()) == sorted([living, *others])
    assert remove_leftovers(tmp_path / "none") == []


def test_kill_between_the_two_renames_is_mended(tmp_path, dead_pid):
    (tmp_path / f".final.old-{dead_pid}").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    (tmp_path / f".final.old-{dead_pid}").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, renaming):
    """One folder and one file are replaced over and over by a child that is killed at random moments."""
    payloads = [{"model": {f"{i}": torch.full((20_000,), float(n)) for i in range(4)}, "iter_num": n} for n in range(4)]
    target, single = tmp_path / "final", tmp_path / "single.pth"
    rng, seen = random.Random(0), set()
    n_leftovers = 0
    for n_kill in range(20):
        if (child := os.fork()) == 0:
            n = n_kill
            while True:
                n += 1
                with atomic_folder(target) as folder:
                    save_torch(payloads[n % 4], folder / "lit_model.pth")
                    (folder / "version").write_text(str(n % 4))
                save_torch(payloads[n % 4], single)
        while n_kill == 0 and not single.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        n_leftovers += any(path.name.startswith(".") for path in tmp_path.iterdir())
        if renaming == "two renames":  # there the next start mends what a kill between them leaves
            remove_leftovers(tmp_path)
        for file in (target / "lit_model.pth", single):
            check_crc(file)
            loaded = load_torch(file)
            assert all((tensor == loaded["iter_num"]).all() for tensor in loaded["model"].values())
        loaded = load_torch(target / "lit_model.pth")
        assert (target / "version").read_text() == str(loaded["iter_num"])
        seen.add(loaded["iter_num"])
    assert len(seen) > 1  # the child did get to replace the folder
    assert n_leftovers > 1  # and was killed while it wrote
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "single.pth"]
    shutil.rmtree(target)
