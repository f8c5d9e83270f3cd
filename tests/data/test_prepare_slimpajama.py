import json

import numpy as np
import pytest

from litgpt.data.prepare_slimpajama import SlimPajamaDataRecipe, prepare
from litgpt.data.shards import TokenShards

zstandard = pytest.importorskip("zstandard")


@pytest.fixture
def folder(tmp_path):
    """Three files; in each, one row of four is from GitHub."""
    sets = ("RedPajamaC4", "RedPajamaGithub", "RedPajamaBook", "RedPajamaWikipedia")
    for number in range(3):
        path = tmp_path / "in" / "train" / f"chunk{number}" / "a.jsonl.zst"
        path.parent.mkdir(parents=True)
        rows = [{"text": f"cat {number} {name}\n", "meta": {"redpajama_set_name": name}} for name in sets]
        path.write_bytes(zstandard.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return tmp_path / "in"


def expected(tokenizer, n_files):
    names = ("RedPajamaC4", "RedPajamaBook", "RedPajamaWikipedia")
    return [
        tokenizer.encode(f"cat {n} {name}\n", bos=False, eos=True).tolist() for n in range(n_files) for name in names
    ]


@pytest.mark.parametrize("fast_dev_run", [False, True])
def test_rows_but_those_of_github_become_shards(folder, tmp_path, tokenizer, tokenizer_folder, fast_dev_run):
    prepare(folder, tmp_path / "out", tokenizer_folder, chunk_size=10**6, fast_dev_run=fast_dev_run)
    shards = TokenShards(tmp_path / "out")
    rows = expected(tokenizer, 2 if fast_dev_run else 3)
    assert shards.windows(np.array([0]), len(shards))[0].tolist() == [id for row in rows for id in row]


def test_recipe_gives_the_same_rows(folder, tokenizer):
    recipe = SlimPajamaDataRecipe(tokenizer, chunk_size=100)
    rows = [ids.tolist() for name in recipe.prepare_structure(folder) for ids in recipe.prepare_item(name)]
    assert rows == expected(tokenizer, 3)


def test_damaged_file_is_named(folder, tmp_path, tokenizer_folder):
    path = folder / "train" / "chunk1" / "a.jsonl.zst"
    path.write_bytes(b"not compressed")
    with pytest.raises(ValueError, match=r"chunk1.a\.jsonl\.zst is damaged"):
        prepare(folder, tmp_path / "out", tokenizer_folder, chunk_size=10**6)


def test_folder_without_files_is_refused(tmp_path, tokenizer_folder):
    with pytest.raises(FileNotFoundError, match=r"no \*\.zst files below .*--input_dir"):
        prepare(tmp_path, tmp_path / "out", tokenizer_folder)
