"""`litgpt train_tokenizer`."""

from dataclasses import dataclass, field

import pytest

from litgpt.data.base import DataModule
from litgpt.scripts.train_tokenizer import bytes_per_token, setup
from litgpt.tokenizer import Tokenizer


@dataclass
class Sentences(DataModule):
    """Texts of each split, as a data module has them."""

    splits: dict = field(default_factory=dict)

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None, **kwargs):
        pass

    def train_dataloader(self):
        raise NotImplementedError

    def val_dataloader(self):
        raise NotImplementedError

    def texts(self, split="train"):
        return iter(self.splits[split]) if split in self.splits else super().texts(split)


TRAIN = ["the cat sees the dog", "the dog sees the cat and sleeps"] * 20


def test_command_writes_a_tokenizer_and_tells_the_compression(tmp_path, capsys):
    setup(Sentences({"train": TRAIN, "val": ["the cat sleeps", "the dog"]}), vocab_size=270, out_dir=tmp_path / "tok")
    tokenizer = Tokenizer(tmp_path / "tok")
    assert tokenizer.vocab_size == 270
    n_tokens = len(tokenizer.encode("the cat sleeps", bos=False)) + len(tokenizer.encode("the dog", bos=False))
    printed = capsys.readouterr().out
    assert "tokenizer of 270 tokens" in printed
    assert f"{21 / n_tokens:.2f} bytes" in printed


def test_command_does_without_held_out_text(tmp_path, capsys):
    setup(Sentences({"train": TRAIN}), vocab_size=270, out_dir=tmp_path)
    assert "held-out" not in capsys.readouterr().out


def test_command_says_when_the_text_gives_fewer_tokens(tmp_path, capsys):
    setup(Sentences({"train": ["aaaa"] * 3}), vocab_size=2000, out_dir=tmp_path)
    printed = capsys.readouterr().out
    assert "tokenizer of 2,000 tokens" not in printed
    assert "more text gives more" in printed


def test_data_without_text_is_told(tmp_path):
    with pytest.raises(ValueError, match="no raw text to train a tokenizer on"):
        setup(Sentences(), out_dir=tmp_path)


def test_bytes_per_token_counts_bytes_and_stops_in_time(tmp_path):
    setup(Sentences({"train": TRAIN}), vocab_size=258, out_dir=tmp_path)
    tokenizer = Tokenizer(tmp_path)
    assert bytes_per_token(tokenizer, ["é€"]) == 1.0
    assert bytes_per_token(tokenizer, []) is None

    def texts():
        yield "x" * 11
        raise AssertionError("read too far")

    assert bytes_per_token(tokenizer, texts(), max_bytes=10) == 1.0


def test_command_line_trains_on_text_files(tmp_path, capsys):
    from litgpt.__main__ import main

    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.txt").write_text("\n".join(TRAIN))
    flags = ["--data", "TextFiles", "--data.train_data_path", str(folder), "--vocab_size", "265"]
    main(["train_tokenizer", *flags, "--out_dir", str(tmp_path / "tok")])
    assert Tokenizer(tmp_path / "tok").vocab_size == 265
    assert "bytes" in capsys.readouterr().out


def test_command_line_refuses_a_small_vocabulary_in_one_line(tmp_path, capsys):
    from litgpt.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(["train_tokenizer", "--vocab_size", "100", "--out_dir", str(tmp_path / "tok")])
    assert caught.value.code == 1
    assert "vocab_size is 100" in capsys.readouterr().err
    assert not (tmp_path / "tok").exists()
