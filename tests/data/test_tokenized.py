import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from litgpt.data import tokenized
from litgpt.data.tokenized import TokenizedExamples, content_hash
from litgpt.tokenizer import Tokenizer

SAMPLES = [{"text": f"sample {i} " * (i % 7 + 1), "n": i} for i in range(40)]


def encode(sample, base=1000):
    """Ids that tell the sample; the first third is not trained."""
    ids = base + torch.arange(3 * (sample["n"] + 1))
    labels = ids.clone()
    labels[: sample["n"] + 1] = -100
    return {"input_ids": ids, "labels": labels, "token_counts": {"raw": 2 * sample["n"], "all": len(ids)}}


def encode_slowly(sample):
    time.sleep(0.01)
    return encode(sample)


def check(examples, samples=SAMPLES, encode=encode):
    assert len(examples) == len(samples)
    for example, sample in zip(examples, samples, strict=True):
        expected = encode(sample)
        assert list(example) == list(expected) and example["token_counts"] == expected["token_counts"]
        for key in ("input_ids", "labels"):
            assert example[key].dtype == torch.int64 and torch.equal(example[key], expected[key])


class Counting:
    """An encode that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, sample):
        self.calls += 1
        return encode(sample)


@pytest.mark.parametrize("in_memory", [False, True])
def test_examples_come_back_as_they_were_encoded(tmp_path, in_memory):
    examples = TokenizedExamples(SAMPLES, encode, None if in_memory else tmp_path)
    check(examples)
    assert examples.lengths.tolist() == [3 * (i + 1) for i in range(40)]
    assert examples.totals == {"token_counts/raw": sum(2 * i for i in range(40)), "token_counts/all": 3 * 820}
    assert torch.equal(examples[-1]["input_ids"], examples[39]["input_ids"])
    with pytest.raises(IndexError):
        examples[40]


def test_second_run_reads_the_file_and_says_so(tmp_path, capsys):
    count = Counting()
    TokenizedExamples(SAMPLES, count, tmp_path, "key")
    assert "Tokenised 40 examples" in capsys.readouterr().out
    again = TokenizedExamples(SAMPLES, count, tmp_path, "key")
    out = capsys.readouterr().out
    assert count.calls == 40 and "Using 40 examples tokenised before" in out and out.count("\n") == 1
    check(again)


@pytest.mark.parametrize(
    "samples,key",
    [
        (SAMPLES[:-1], "key"),
        ([*SAMPLES[:-1], {**SAMPLES[-1], "text": "other"}], "key"),
        (SAMPLES[::-1], "key"),
        (SAMPLES, "other key"),
        (SAMPLES, ["k", "ey"]),
    ],
    ids=["a sample less", "another text", "another order", "another key", "a divided key"],
)
def test_other_content_is_tokenised_anew(tmp_path, samples, key):
    first = TokenizedExamples(SAMPLES, encode, tmp_path, "key")
    count = Counting()
    other = TokenizedExamples(samples, count, tmp_path, key)
    assert count.calls == len(samples) and other.path != first.path
    check(other, samples)


def test_another_version_of_the_layout_is_not_read(tmp_path, monkeypatch):
    first = TokenizedExamples(SAMPLES, encode, tmp_path)
    monkeypatch.setattr(tokenized, "VERSION", tokenized.VERSION + 1)
    assert TokenizedExamples(SAMPLES, encode, tmp_path).path != first.path


@pytest.mark.parametrize("damage", ["truncated", "empty", "grown", "index"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    path = TokenizedExamples(SAMPLES, encode, tmp_path).path
    data = path.read_bytes()
    index = data.index(b'{"n"')
    broken = {
        "truncated": data[:-100],
        "empty": b"",
        "grown": data[:200] + data[100:],
        "index": data[:index] + b"x" + data[index + 1 :],
    }
    path.write_bytes(broken[damage])
    count = Counting()
    check(TokenizedExamples(SAMPLES, count, tmp_path))
    assert count.calls == 40 and path.read_bytes() == data


def test_file_is_compact(tmp_path):
    examples = TokenizedExamples(SAMPLES * 10, encode, tmp_path)
    assert examples.path.stat().st_size < 2 * examples.lengths.sum() + 64 * len(examples) + 500


@pytest.mark.parametrize(
    "values",
    [
        {"input_ids": torch.tensor([1, 70_000, 2]), "labels": torch.tensor([-100, 5, 2])},  # labels that are no ids
        {"input_ids": torch.tensor([1, 2**40]), "weights": torch.tensor([0.5, -2.0]), "score": 0.25},
        {"labels": torch.tensor([1, 2]), "input_ids": torch.tensor([1, 2]), "on": torch.tensor([True, False])},
        {"input_ids": torch.tensor([], dtype=torch.int64), "labels": torch.tensor([], dtype=torch.int64)},
        {"input_ids": torch.tensor([4, 5, 6]), "labels": torch.tensor([-100, -100, -100]), "delta": -3},
        {
            "chosen": {"input_ids": torch.tensor([4, 5, 6]), "labels": torch.tensor([-100, 5, -100])},
            "rejected": {"input_ids": torch.tensor([7, 8]), "labels": torch.tensor([-100, 8])},
        },
        {"input_ids": np.array([1, 2, 3], np.int32), "double": np.array([0.1, 0.2, 0.3])},
    ],
)
def test_values_of_every_kind_are_kept(values):
    examples = TokenizedExamples(["a", "b"], lambda sample: values, None)
    for example in examples:
        torch.testing.assert_close(example, as_tensors(values), rtol=0, atol=0)
        assert list(example) == list(values)
    n = values["input_ids"].size if isinstance(values.get("input_ids"), np.ndarray) else None
    n = n or (5 if "chosen" in values else len(values["input_ids"]))
    assert examples.lengths.tolist() == [n, n]


def as_tensors(value):
    if isinstance(value, dict):
        return {key: as_tensors(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.int64) if value.dtype.kind == "i" else value)
    return value


def test_samples_that_are_encoded_to_nothing_are_left_out_and_counted(tmp_path, capsys):
    def drop_odd(sample):
        return None if sample["n"] % 2 else encode(sample)

    examples = TokenizedExamples(SAMPLES, drop_odd, tmp_path)
    check(examples, SAMPLES[::2])
    assert examples.n_left_out == 20 and "20 samples left out" in capsys.readouterr().out
    assert len(TokenizedExamples(SAMPLES, lambda sample: None, tmp_path, "none")) == 0
    assert len(TokenizedExamples([], encode, tmp_path)) == 0


def test_a_sample_that_cannot_be_encoded_is_named_and_nothing_is_left_behind(tmp_path):
    def fail(sample):
        if sample["n"] == 7:
            raise ValueError("no output")
        return encode(sample)

    with pytest.raises(ValueError, match=r"^sample 8: no output$"):
        TokenizedExamples(SAMPLES, fail, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])


def test_examples_of_different_keys_are_refused():
    with pytest.raises(ValueError, match="sample 2: its example has"):
        TokenizedExamples([1, 2], lambda n: {"input_ids": torch.arange(3), **({} if n == 1 else {"more": 1})}, None)
    with pytest.raises(TypeError, match="only 1-D numbers"):
        TokenizedExamples([1], lambda n: {"input_ids": torch.zeros(2, 2)}, None)


@dataclass
class Turn:
    role: str
    content: str


def test_content_of_samples_is_told_by_value():
    assert content_hash([Turn("user", "a")], "k") == content_hash([Turn("user", "a")], "k")
    assert content_hash([Turn("user", "a")], "k") != content_hash([Turn("user", "b")], "k")
    assert content_hash([{"a": Path("x")}], "k") != content_hash([{"a": Path("y")}], "k")
    with pytest.raises(TypeError, match="whose content cannot be told"):
        content_hash([{"a": object()}], "k")


def test_several_processes_give_the_same_file_in_the_same_order(tmp_path, monkeypatch):
    here = TokenizedExamples(SAMPLES, encode, tmp_path / "here", num_workers=1)
    monkeypatch.setattr(tokenized, "CHUNK_SAMPLES", 8)
    monkeypatch.setattr(tokenized, "PAYS_SECONDS", 0.0)
    ticks = iter(range(10**6))
    monkeypatch.setattr(tokenized.time, "perf_counter", lambda: next(ticks) * 2.0)
    started = []
    monkeypatch.setattr(tokenized, "ProcessPoolExecutor", partial(start_pool, started))
    there = TokenizedExamples(SAMPLES, encode, tmp_path / "there", num_workers=2)
    assert started == [2]
    assert here.path.read_bytes() == there.path.read_bytes()
    check(there)


def start_pool(started, n, *args):
    from concurrent.futures import ProcessPoolExecutor

    started.append(n)
    return ProcessPoolExecutor(n, *args)


def die_in_a_worker(sample):
    if multiprocessing.parent_process() is not None and sample["n"] > 20:
        os._exit(1)
    return encode(sample)


def test_the_work_goes_on_here_when_the_processes_die(monkeypatch):
    monkeypatch.setattr(tokenized, "CHUNK_SAMPLES", 8)
    monkeypatch.setattr(tokenized, "PAYS_SECONDS", 0.0)
    ticks = iter(range(10**6))
    monkeypatch.setattr(tokenized.time, "perf_counter", lambda: next(ticks) * 2.0)
    with pytest.warns(UserWarning, match="processes that tokenise have died"):
        check(TokenizedExamples(SAMPLES, die_in_a_worker, None, num_workers=2))


def test_little_data_and_an_encode_that_cannot_be_sent_stay_in_this_process(monkeypatch):
    monkeypatch.setattr(tokenized, "ProcessPoolExecutor", None)
    check(TokenizedExamples(SAMPLES, encode, None, num_workers=8))
    monkeypatch.setattr(tokenized, "PAYS_SECONDS", 0.0)
    ticks = iter(range(10**6))
    monkeypatch.setattr(tokenized.time, "perf_counter", lambda: next(ticks) * 2.0)
    check(TokenizedExamples(SAMPLES, lambda sample: encode(sample), None, num_workers=8))


@dataclass
class EncodeText:
    tokenizer: Tokenizer

    def __call__(self, sample):
        return {"input_ids": self.tokenizer.encode(sample["text"], eos=True)}


def test_tokenizers_can_be_sent_to_other_processes(tmp_path, tiny_tokenizer_dir, monkeypatch):
    encode = EncodeText(Tokenizer(tiny_tokenizer_dir))
    here = TokenizedExamples(SAMPLES, encode, None, num_workers=1)
    monkeypatch.setattr(tokenized, "PAYS_SECONDS", 0.0)
    ticks = iter(range(10**6))
    monkeypatch.setattr(tokenized.time, "perf_counter", lambda: next(ticks) * 2.0)
    monkeypatch.setattr(tokenized, "CHUNK_SAMPLES", 16)
    there = TokenizedExamples(SAMPLES, encode, None, num_workers=2)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(here, there, strict=True))


def build_in_process(folder, calls):
    def count(sample):
        with open(calls, "a") as file:
            file.write("x")
        return encode_slowly(sample)

    check(TokenizedExamples(SAMPLES, count, folder))


def test_two_processes_at_once_tokenise_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=build_in_process, args=(tmp_path / "cache", tmp_path / "calls")) for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len((tmp_path / "calls").read_text()) == 40


def test_after_a_kill_the_work_is_redone_and_the_leftovers_go(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tests/data'); from test_tokenized import *; "
        f"TokenizedExamples(SAMPLES * 50, encode_slowly, {str(tmp_path)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.time() + 60
    while not list(tmp_path.glob(".*.tmp-*")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".*.tmp-*")) and not list(tmp_path.glob("*.examples"))
    check(TokenizedExamples(SAMPLES * 50, encode, tmp_path), SAMPLES * 50)
    assert not list(tmp_path.glob(".*.tmp-*"))


@pytest.mark.parametrize("in_memory", [False, True])
def test_workers_of_a_loader_get_the_examples(tmp_path, in_memory):
    examples = TokenizedExamples(SAMPLES, encode, None if in_memory else tmp_path)
    check(pickle.loads(pickle.dumps(examples)))
    loader = DataLoader(examples, 4, collate_fn=list, num_workers=1, multiprocessing_context="spawn")
    check([example for batch in loader for example in batch])


def test_a_full_disk_is_named_with_the_path(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenized, "write_examples", fail)
    with pytest.raises(OSError, match=r"cannot write .*\.examples: No space left"):
        TokenizedExamples(SAMPLES, encode, tmp_path)
    assert not list(tmp_path.glob("*.examples")) and not list(tmp_path.glob("*tmp*"))
