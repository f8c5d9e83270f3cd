import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from litgpt.data.shards import INDEX, Shard, TokenShards, is_shards_folder, token_dtype, write_index

SIZES = (5, 0, 1, 17, 9)


@pytest.fixture
def folder(tmp_path):
    """Shards of unequal sizes, one empty, whose n-th token is n."""
    shards, first = [], 0
    for number, size in enumerate(SIZES):
        np.arange(first, first + size).astype("<u2").tofile(tmp_path / f"shard-{number:05d}.bin")
        shards.append(Shard(f"shard-{number:05d}.bin", size, 2, 3 * size))
        first += size
    write_index(tmp_path, shards, np.dtype("<u2"), "print")
    return tmp_path


def test_shards_read_as_one_sequence(folder):
    shards = TokenShards(folder)
    assert len(shards) == 32 and shards.n_documents == 10 and shards.n_bytes == 96 and shards.fingerprint == "print"
    for length in (1, 4, 32):
        starts = np.arange(33 - length)
        windows = shards.windows(starts, length)
        assert windows.dtype == np.int64 and (windows == starts[:, None] + np.arange(length)).all()


def test_shards_are_mapped_anew_in_another_process(folder):
    pickled = pickle.dumps(TokenShards(folder))
    assert len(pickled) < 500 and len(pickle.loads(pickled)) == 32


@pytest.mark.parametrize(
    ("vocab_size", "special", "dtype"),
    [(100, None, "uint16"), (65536, 65535, "uint16"), (65537, None, "uint32"), (65530, 65536, "uint32")],
)
def test_dtype_is_the_narrowest_that_holds_all_ids(vocab_size, special, dtype):
    assert token_dtype(SimpleNamespace(vocab_size=vocab_size, bos_id=None, eos_id=special)) == dtype


def test_dtype_counts_added_tokens(tokenizer):
    sizes = {True: 65537, False: 65000}
    processor = SimpleNamespace(get_vocab_size=lambda with_added_tokens: sizes[with_added_tokens])
    assert token_dtype(SimpleNamespace(vocab_size=65000, processor=processor)) == "uint32"
    assert token_dtype(tokenizer) == "uint16"


def test_missing_index_says_that_data_is_not_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare the data first"):
        TokenShards(tmp_path)
    assert not is_shards_folder(tmp_path)


def test_truncated_shard_is_named(folder):
    with open(folder / "shard-00003.bin", "ab") as file:
        file.truncate(20)
    with pytest.raises(ValueError, match=r"shard-00003\.bin has 20 bytes instead of 34"):
        TokenShards(folder)
    (folder / "shard-00003.bin").unlink()
    with pytest.raises(ValueError, match="has no bytes"):
        TokenShards(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("shards"), "damaged index"),
        (lambda i: i.update(version=9), "version 9"),
        (dict.clear, "damaged"),
    ],
)
def test_unusable_index_is_one_clear_line(folder, change, message):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as error:
        TokenShards(folder)
    assert "\n" not in str(error.value)


def test_index_of_another_kind_is_told_apart(folder):
    assert is_shards_folder(folder)
    (folder / INDEX).write_text(json.dumps({"chunks": [], "config": {}}))
    assert not is_shards_folder(folder)
