import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from litgpt.data import preparation
from litgpt.data.documents import Texts, hash_texts
from litgpt.data.preparation import document_marks, prepare_files, prepare_shards, tokenizer_hash
from litgpt.data.shards import INDEX, TokenShards


class ByteTokenizer:
    """A tokenizer that is no `litgpt.Tokenizer`: bytes, without a fast path."""

    vocab_size, bos_id, eos_id = 258, 256, 257

    def encode(self, text, bos=None, eos=False):
        return torch.tensor(list(text.encode()), dtype=torch.int)


class DyingTokenizer(ByteTokenizer):
    def encode(self, text, bos=None, eos=False):
        os._exit(3)


DOCUMENTS = [f"document {i}: " + "ab cd\n" * (i % 7) for i in range(60)]
SOURCES = [Texts(tuple(DOCUMENTS[i : i + 5])) for i in range(0, 60, 5)]
CONTENT = hash_texts(DOCUMENTS)


def prepare(folder, sources=SOURCES, tokenizer=None, content=CONTENT, **kwargs):
    settings = {"shard_bytes": 200, "bos": True, **kwargs}
    return prepare_shards(folder, sources, tokenizer or ByteTokenizer(), content, **settings)


def all_tokens(shards):
    return shards.windows(np.array([0]), len(shards))[0].tolist()


def count_written(monkeypatch):
    """List that grows by the name of each shard that is written from now on."""
    written, original = [], preparation.write_shard
    monkeypatch.setattr(
        preparation, "write_shard", lambda job, *args: (written.append(job.name), original(job, *args))[1]
    )
    return written


def test_shards_hold_all_documents_in_order(tmp_path):
    shards = prepare(tmp_path / "s")
    assert all_tokens(shards) == [id for text in DOCUMENTS for id in [256, *text.encode()]]
    assert len(shards.shards) > 5
    assert shards.n_documents == 60 and shards.n_bytes == sum(len(text) for text in DOCUMENTS)
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == sorted([INDEX, *(shard.file for shard in shards.shards)])


def test_bytes_are_counted_in_utf8(tmp_path):
    assert prepare(tmp_path / "s", [Texts(("é漢",))]).n_bytes == 5


def test_processes_write_the_same_shards_as_this_one(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    alone = prepare(tmp_path / "alone", tokenizer=tokenizer, num_workers=0)
    together = prepare(tmp_path / "together", tokenizer=tokenizer, num_workers=2)
    assert alone.shards == together.shards and all_tokens(alone) == all_tokens(together)


def test_a_process_that_dies_is_explained(tmp_path):
    jobs = preparation.plan_jobs(tmp_path, SOURCES, ByteTokenizer(), True, False, 200)
    with pytest.raises(RuntimeError, match="num_workers=1"):
        preparation.write_in_processes(jobs[:2], DyingTokenizer(), 2, lambda *counts: None)


def test_error_in_a_process_reaches_the_user(tmp_path):
    missing = preparation.Job(tmp_path / "gone", 0, (SOURCES[0],), np.dtype("<u2"), (), ())
    with pytest.raises(FileNotFoundError):
        preparation.write_in_processes([missing], ByteTokenizer(), 1, lambda *counts: None)


@pytest.mark.parametrize(
    ("ids", "bos", "eos", "marks"),
    [
        ((1, 2), True, False, ((1,), ())),
        ((1, 2), False, True, ((), (2,))),
        ((1, 2), True, True, ((1,), (2,))),
        ((None, 2), True, False, ((), (2,))),
        ((1, None), False, True, ((1,), ())),
        ((5, 5), True, True, ((5,), ())),
        ((0, 0), False, True, ((), (0,))),
        ((None, None), True, True, ((), ())),
        ((1, 2), False, False, ((), ())),
    ],
)
def test_documents_are_kept_apart_by_the_marks_there_are(ids, bos, eos, marks):
    assert document_marks(SimpleNamespace(bos_id=ids[0], eos_id=ids[1]), bos, eos) == marks


def test_preparation_is_reused_while_nothing_changes(tmp_path, monkeypatch):
    first = prepare(tmp_path / "s")
    written = count_written(monkeypatch)
    assert all_tokens(prepare(tmp_path / "s")) == all_tokens(first)
    assert written == []


@pytest.mark.parametrize("change", [{"content": "other"}, {"bos": False}, {"shard_bytes": 300}, "tokenizer"])
def test_preparation_is_repeated_when_something_changes(tmp_path, monkeypatch, tokenizer, change):
    prepare(tmp_path / "s")
    written = count_written(monkeypatch)
    change = {"tokenizer": tokenizer} if change == "tokenizer" else change
    shards = prepare(tmp_path / "s", **change)
    assert len(written) == len(shards.shards) > 1


def test_no_shard_of_the_old_input_is_left(tmp_path):
    prepare(tmp_path / "s")
    shards = prepare(tmp_path / "s", SOURCES[:2], content="less")
    assert {path.name for path in (tmp_path / "s").glob("*.bin")} == {shard.file for shard in shards.shards}


def test_damaged_shard_is_made_again(tmp_path):
    expected = all_tokens(prepare(tmp_path / "s"))
    (tmp_path / "s" / "shard-00002.bin").write_bytes(b"x")
    assert all_tokens(prepare(tmp_path / "s")) == expected


def test_interrupted_preparation_keeps_its_finished_shards(tmp_path, monkeypatch):
    original = preparation.write_shard

    def interrupted(job, *args):
        if job.number == 3:
            raise KeyboardInterrupt
        return original(job, *args)

    monkeypatch.setattr(preparation, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        TokenShards(tmp_path / "s")
    monkeypatch.setattr(preparation, "write_shard", original)
    written = count_written(monkeypatch)
    shards = prepare(tmp_path / "s")
    assert written == [f"shard-{i:05d}" for i in range(3, len(shards.shards))]
    assert all_tokens(shards) == all_tokens(prepare(tmp_path / "straight"))


def test_finished_shards_of_other_input_are_not_used(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparation, "write_index", interrupted)
        prepare(tmp_path / "s", content="before", sources=[Texts(("x" * 300,))] * 12)
    assert (tmp_path / "s" / "shard-00011.bin").exists()
    assert all_tokens(prepare(tmp_path / "s")) == all_tokens(prepare(tmp_path / "straight"))


KILLED = """
import sys, time
from pathlib import Path
import torch
from litgpt.data.documents import Texts
from litgpt.data.preparation import prepare_shards

class Slow:
    vocab_size, bos_id, eos_id = 258, 256, 257
    def encode(self, text, bos=None, eos=False):
        time.sleep(float(sys.argv[2]))
        return torch.tensor(list(text.encode()), dtype=torch.int)
    def encode_batch(self, texts, bos=None, eos=False):
        return [self.encode(text).tolist() for text in texts]

sources = [Texts((f"document {i} " * 20,)) for i in range(12)]
prepare_shards(Path(sys.argv[1]), sources, Slow(), "same", shard_bytes=100)
"""


def test_killed_preparation_goes_on_where_it_was(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "s"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, script, folder, "0.2"], env=environment)
    deadline = time.time() + 60
    while len(list(folder.glob("shard-*.json"))) < 3 and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / INDEX).exists()
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.bin")}
    assert 3 <= len(finished) < 12
    for name in ("s", "straight"):
        subprocess.run([sys.executable, script, tmp_path / name, "0"], env=environment, check=True)
    assert all_tokens(TokenShards(folder)) == all_tokens(TokenShards(tmp_path / "straight"))
    reused = [name for name, time_ns in finished.items() if (folder / name).stat().st_mtime_ns == time_ns]
    assert len(reused) >= len(finished) - 1  # the last may have lacked its record
    assert not list(folder.glob(".shard-*"))


def test_two_runs_at_once_prepare_once(tmp_path, monkeypatch):
    written = count_written(monkeypatch)
    with ThreadPoolExecutor(2) as threads:
        results = [thread.result() for thread in [threads.submit(prepare, tmp_path / "s") for _ in range(2)]]
    assert all_tokens(results[0]) == all_tokens(results[1]) and len(written) == len(results[0].shards)


def test_full_disk_is_one_clear_line_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    def replace(old, new, original=os.replace):
        if str(new).endswith(".bin"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(old, new)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"disk full while writing .*shard-00000\.bin: free"),
    ):
        patch.setattr(preparation.os, "replace", replace)
        prepare(tmp_path / "s")
    assert not list((tmp_path / "s").glob("*.bin")) and not list((tmp_path / "s").glob(".shard*"))
    assert len(prepare(tmp_path / "s")) > 0


def test_id_beyond_the_vocabulary_is_refused(tmp_path):
    class Wrong(ByteTokenizer):
        def encode(self, text, bos=None, eos=False):
            return torch.tensor([70000])

    with pytest.raises(ValueError, match="70000 does not fit vocab_size 258"):
        prepare(tmp_path / "s", tokenizer=Wrong())


def test_tokenizer_hash_tells_tokenizers_apart(tokenizer, tokenizer_folder, tmp_path):
    from litgpt.tokenizer import Tokenizer
    from litgpt.tokenizer_training import train_tokenizer

    train_tokenizer(["other text " * 9], 262, tmp_path / "other")
    other = Tokenizer(tmp_path / "other")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(Tokenizer(tokenizer_folder))
    assert len({tokenizer_hash(t) for t in (tokenizer, other, ByteTokenizer())}) == 3


class NamedTexts:
    def __init__(self, path):
        self.path, self.n_bytes = path, path.stat().st_size

    def pieces(self):
        return Texts((self.path.read_text(),)).pieces()


def test_files_are_prepared_with_an_end_mark_each(tmp_path, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    sources = [NamedTexts(tmp_path / name) for name in ("a", "b", "c")]
    shards = prepare_files(tmp_path / "out", sources, ByteTokenizer(), 100, False, "files")
    assert all_tokens(shards) == [97, 257, 98, 257, 99, 257]
    assert "6 tokens of 3 documents" in capsys.readouterr().out
    shards = prepare_files(tmp_path / "out", sources, ByteTokenizer(), 100, True, "files")
    assert shards.n_documents == 2


def test_output_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    (tmp_path / "a").write_text("a")
    with pytest.raises(ValueError, match="another --output_dir"):
        prepare_files(tmp_path / "out", [NamedTexts(tmp_path / "a")], ByteTokenizer(), 100, False, "files")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    with pytest.raises(FileNotFoundError, match="--input_dir"):
        prepare_files(tmp_path / "new", [], ByteTokenizer(), 100, False, "files")


def test_index_says_what_is_in_it(tmp_path):
    prepare(tmp_path / "s")
    index = json.loads((tmp_path / "s" / INDEX).read_text())
    assert index["version"] == 1 and index["dtype"] == "uint16" and index["shards"][0]["documents"] > 0
