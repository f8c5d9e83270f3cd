import numpy as np
import pytest

from litgpt.data.prepare_starcoder import StarcoderDataRecipe, prepare
from litgpt.data.shards import TokenShards

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path):
    from pyarrow.parquet import write_table

    for language in ("c", "python"):
        path = tmp_path / "in" / language
        path.mkdir(parents=True)
        texts = [f"def cat_{i}(): pass  # {language}\n" for i in range(300)]
        write_table(pyarrow.table({"id": list(range(300)), "content": texts}), path / "train.parquet")
    return tmp_path / "in"


def expected(tokenizer):
    texts = [f"def cat_{i}(): pass  # {language}\n" for language in ("c", "python") for i in range(300)]
    return [tokenizer.encode(text, bos=False, eos=True).tolist() for text in texts]


def test_rows_become_shards(folder, tmp_path, tokenizer, tokenizer_folder):
    prepare(folder, tmp_path / "out", tokenizer_folder, chunk_size=10**6)
    shards = TokenShards(tmp_path / "out")
    assert shards.windows(np.array([0]), len(shards))[0].tolist() == [id for row in expected(tokenizer) for id in row]
    assert shards.n_documents == 600


def test_recipe_gives_the_same_rows(folder, tokenizer):
    recipe = StarcoderDataRecipe(tokenizer, chunk_size=100)
    rows = [ids.tolist() for name in recipe.prepare_structure(folder) for ids in recipe.prepare_item(name)]
    assert rows == expected(tokenizer)


@pytest.mark.parametrize("content", [b"not parquet", None])
def test_damaged_file_is_named(folder, tmp_path, tokenizer_folder, content):
    path = folder / "c" / "train.parquet"
    path.write_bytes(content or path.read_bytes()[:-90])
    with pytest.raises(ValueError, match=r"c.train\.parquet is damaged"):
        prepare(folder, tmp_path / "out", tokenizer_folder, chunk_size=10**6)


def test_folder_without_files_is_refused(tmp_path, tokenizer_folder):
    with pytest.raises(FileNotFoundError, match=r"no \*\.parquet files below .*--input_dir"):
        prepare(tmp_path, tmp_path / "out", tokenizer_folder)
