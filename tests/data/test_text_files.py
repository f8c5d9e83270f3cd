import numpy as np
import pytest
import torch

from litgpt.data import TextFiles
from litgpt.data.text_files import tokenize, validate_tokenizer

STORY = "The cat sat on the mat number {}. The dog ran to the river.\n\n"


@pytest.fixture
def folder(tmp_path):
    """Three files of the same length; the first of them is for validation."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abc":
        (texts / f"{name}.txt").write_text("".join(f"{name} " + STORY.format(i) for i in range(60)))
    (texts / "notes.md").write_text("not a text file")
    return texts


def connected(tokenizer, *args, batch_size=2, max_seq_length=16, **kwargs):
    data = TextFiles(*args, **{"num_workers": 0, **kwargs})
    data.connect(tokenizer, batch_size=batch_size, max_seq_length=max_seq_length)
    data.prepare_data()
    data.setup()
    return data


def tokens(data, split):
    shards = data.shards[split]
    return shards.windows(np.array([0]), len(shards))[0]


def test_first_file_is_for_validation_and_each_file_begins_with_bos(folder, tokenizer):
    data = connected(tokenizer, folder, num_workers=1)
    expected = [tokenizer.encode((folder / f"{name}.txt").read_text(), bos=True) for name in "abc"]
    assert tokens(data, "val").tolist() == expected[0].tolist()
    assert tokens(data, "train").tolist() == torch.cat(expected[1:]).tolist()


def test_batches_have_the_published_form(folder, tokenizer):
    data = connected(tokenizer, folder, num_workers=0)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert batch.shape == (2, 17) and batch.dtype == torch.int64
    assert data.max_seq_length == 17
    assert "mat number" in tokenizer.decode(torch.cat(list(data.train_dataloader())).flatten())


def test_validation_path_is_used_and_nothing_held_out(folder, tmp_path, tokenizer):
    val = tmp_path / "val.txt"
    val.write_text("validation text " * 60)
    data = connected(tokenizer, folder, val)
    assert "".join(data.texts("val")) == val.read_text()
    assert "".join(data.texts("train")) == "".join((folder / f"{name}.txt").read_text() for name in "abc")


@pytest.mark.parametrize("by_file", [True, False])
def test_single_file_gives_its_end_for_validation(folder, tokenizer, capsys, by_file):
    for name in "bc":
        (folder / f"{name}.txt").unlink()
    data = connected(tokenizer, folder / "a.txt" if by_file else folder)
    assert "last 10% is used for validation" in capsys.readouterr().out
    train, val = "".join(data.texts("train")), "".join(data.texts("val"))
    assert train + val == (folder / "a.txt").read_text()
    assert train.endswith("\n\n") and 0.08 < len(val) / len(train + val) < 0.16


def test_folder_gets_nothing_but_a_hidden_folder(folder, tokenizer):
    before = {path.name for path in folder.iterdir()}
    connected(tokenizer, folder)
    assert {path.name for path in folder.iterdir()} == before | {".litgpt"}


def test_read_only_folder_keeps_its_tokens_in_the_cache(folder, tokenizer, cache):
    folder.chmod(0o555)
    data = connected(tokenizer, folder)
    folder.chmod(0o755)
    assert not (folder / ".litgpt").exists()
    assert data.shards["train"].folder.is_relative_to(cache)


def test_two_files_of_a_folder_do_not_share_tokens(folder, tokenizer):
    first = connected(tokenizer, folder / "a.txt")
    second = connected(tokenizer, folder / "b.txt")
    assert first.shards["train"].folder != second.shards["train"].folder


def test_tokens_are_reused_until_a_text_changes(folder, tokenizer, monkeypatch):
    first = tokens(connected(tokenizer, folder), "train")
    path = folder / ".litgpt"
    times = {file: file.stat().st_mtime_ns for file in path.rglob("*.bin")}
    assert (tokens(connected(tokenizer, folder), "train") == first).all()
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*.bin")} == times
    (folder / "c.txt").write_text((folder / "c.txt").read_text().replace("dog", "cow"))
    assert "cow" in tokenizer.decode(tokens(connected(tokenizer, folder), "train"))


def test_another_tokenizer_gets_tokens_of_its_own(folder, tokenizer, tmp_path):
    from litgpt.tokenizer import Tokenizer
    from litgpt.tokenizer_training import train_tokenizer

    train_tokenizer(["cat dog mat " * 9], 262, tmp_path / "other")
    other = Tokenizer(tmp_path / "other")
    for data, its in ((connected(tokenizer, folder), tokenizer), (connected(other, folder), other)):
        assert its.decode(tokens(data, "val")) == (folder / "a.txt").read_text()


def test_seed_decides_the_order(folder, tokenizer):
    batches = [list(connected(tokenizer, folder, seed=seed).train_dataloader()) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    assert not torch.equal(batches[0][0], batches[2][0])


def test_bytes_per_token_are_those_of_the_text(folder, tokenizer):
    data = connected(tokenizer, folder)
    text = (folder / "a.txt").read_text()
    assert data.bytes_per_token("val") == len(text.encode()) / len(tokenizer.encode(text, bos=True))


def test_large_files_are_shared_among_shards(folder, tokenizer, monkeypatch):
    whole = tokens(connected(tokenizer, folder), "train").tolist()
    monkeypatch.setattr(TextFiles, "shard_bytes", 1000)
    data = connected(tokenizer, folder)
    assert len(data.shards["train"].shards) > 4
    assert tokenizer.decode(tokens(data, "train")) == tokenizer.decode(torch.tensor(whole))
    assert data.shards["train"].n_documents == 2


def test_empty_files_are_passed_over(folder, tokenizer):
    (folder / "a.txt").write_text("")
    assert [path.path.name for path in TextFiles(folder).sources("val")] == ["b.txt"]


def prepare_with_message(tokenizer, error, match, *args, **kwargs):
    with pytest.raises(error, match=match) as caught:
        connected(tokenizer, *args, **kwargs).train_dataloader()
    assert "\n" not in str(caught.value)


def test_missing_path_is_named(tmp_path, tokenizer):
    prepare_with_message(
        tokenizer, FileNotFoundError, "nowhere does not exist: --data.train_data_path", tmp_path / "nowhere"
    )


def test_missing_validation_path_is_named(folder, tmp_path, tokenizer):
    prepare_with_message(tokenizer, FileNotFoundError, "--data.val_data_path", folder, tmp_path / "nowhere")


def test_folder_without_texts_is_named(tmp_path, tokenizer):
    prepare_with_message(tokenizer, FileNotFoundError, r"no \*\.txt files in", tmp_path)


def test_empty_texts_are_refused(tmp_path, tokenizer):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    prepare_with_message(tokenizer, ValueError, "all 2 text files of .* are empty", tmp_path)
    prepare_with_message(tokenizer, ValueError, "a.txt is empty", tmp_path / "a.txt")


def test_binary_file_is_named_with_the_offset(folder, tokenizer):
    (folder / "b.txt").write_bytes(b"text\0\1\2")
    prepare_with_message(tokenizer, ValueError, r"b\.txt is no text file: NUL byte at offset 4", folder)


def test_too_little_text_says_how_much_is_needed(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("cat dog " * 20)
    data = connected(tokenizer, tmp_path, max_seq_length=1000)
    n_tokens = len(data.shards["train"])
    with pytest.raises(
        ValueError, match=rf"{n_tokens} tokens, too few .* 1,000 \+ 1: .*--train\.max_seq_length"
    ) as caught:
        data.train_dataloader()
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_is_refused(folder):
    with pytest.raises(ValueError, match="--tokenizer_dir"):
        connected(None, folder)
    with pytest.raises(ValueError, match="--tokenizer_dir"):
        validate_tokenizer(None)


def test_training_on_the_validation_text_is_warned_of(folder, tokenizer):
    with pytest.warns(UserWarning, match="1 files are training and validation data"):
        connected(tokenizer, folder, folder / "b.txt")


def test_published_tokenize_gives_the_file_with_bos(folder, tokenizer):
    (ids,) = tokenize(str(folder / "a.txt"), tokenizer)
    assert ids.tolist() == tokenizer.encode((folder / "a.txt").read_text(), bos=True).tolist()
