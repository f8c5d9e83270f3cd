"""The byte-level BPE of one's own."""

import json
import os
import random
import subprocess
import sys

import pytest

from litgpt.tokenizer import Tokenizer
from litgpt.tokenizer_training import train_tokenizer

FILES = {"tokenizer.json", "tokenizer_config.json"}


def documents(n: int = 200) -> list[str]:
    rng = random.Random(0)
    text = "the cat a dog sees runs and sleeps under old trees café 日本語 <|endoftext|>s"
    words = text.split()
    return [" ".join(rng.choices(words, k=12)) + "." for _ in range(n)]


def test_trained_tokenizer_spells_any_text_and_frames_it(tmp_path):
    train_tokenizer(documents(), 300, tmp_path / "new" / "folder")
    tokenizer = Tokenizer(tmp_path / "new" / "folder")
    assert tokenizer.vocab_size == 300
    assert tokenizer.use_bos
    assert tokenizer.bos_id == tokenizer.eos_id == tokenizer.token_to_id("<|endoftext|>")
    for text in ["the cat", "", " Ωmega 😀\n\t", "\x00"]:
        ids = tokenizer.encode(text, eos=True)
        assert (ids == tokenizer.eos_id).nonzero().flatten().tolist() == [0, len(ids) - 1]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode(" the the the", bos=False)) == 3


def test_hugging_face_reads_the_trained_tokenizer_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    train_tokenizer(documents(), 300, tmp_path)
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*documents(5), " é  ,  don't . 😀\n"]:
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_same_texts_give_the_same_bytes_in_another_process(tmp_path):
    train_tokenizer(iter(documents()), 320, tmp_path / "a")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_tokenizer_training import documents, train_tokenizer\n"
        "train_tokenizer(documents(), 320, sys.argv[2])"
    )
    environment = os.environ | {
        "RAYON_NUM_THREADS": "3",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", script, os.path.dirname(__file__), str(tmp_path / "b")]
    subprocess.run(command, check=True, env=environment)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_other_files_of_the_folder_stay_and_nothing_else_is_left(tmp_path):
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    (folder / "tokenizer.json").write_text("old")
    train_tokenizer(documents(), 300, folder)
    assert (folder / "notes.txt").read_text() == "keep me"
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert {file.name for file in folder.iterdir()} == FILES | {"notes.txt"}
    assert [file.name for file in tmp_path.iterdir()] == ["tok"]


def test_failed_training_leaves_the_old_tokenizer(tmp_path):
    train_tokenizer(documents(), 300, tmp_path / "tok")
    before = (tmp_path / "tok" / "tokenizer.json").read_bytes()

    def texts():
        yield "one"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_tokenizer(texts(), 310, tmp_path / "tok")
    assert (tmp_path / "tok" / "tokenizer.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tok"]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_is_an_error_that_writes_nothing(tmp_path, texts):
    with pytest.raises(ValueError, match="no text to train the tokenizer on"):
        train_tokenizer(texts, 300, tmp_path / "tok")
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 257])
def test_vocabulary_without_room_for_a_merge_is_refused_before_reading(tmp_path, vocab_size):
    def never():
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}, .* at least 258"):
        train_tokenizer(never(), vocab_size, tmp_path)


def test_smallest_vocabulary_has_one_merge(tmp_path):
    train_tokenizer(["abab abab"], 258, tmp_path)
    assert Tokenizer(tmp_path).vocab_size == 258


def test_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "tok").touch()
    with pytest.raises(ValueError, match=r"tok' is a file; name a folder"):
        train_tokenizer(documents(), 300, tmp_path / "tok")


def test_end_token_can_be_chosen(tmp_path):
    train_tokenizer(documents(), 300, tmp_path, eos_token="</doc>")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_id == tokenizer.token_to_id("</doc>")
    assert tokenizer.encode("a</doc>b").tolist().count(tokenizer.eos_id) == 2


def test_half_a_surrogate_pair_does_not_stop_the_training(tmp_path):
    train_tokenizer([*documents(), "broken \ud83d text"], 300, tmp_path)
    assert Tokenizer(tmp_path).vocab_size == 300
