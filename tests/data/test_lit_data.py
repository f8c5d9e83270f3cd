import sys

import numpy as np
import pytest
import torch

from litgpt.data import LitData, lit_data
from litgpt.data.documents import Texts
from litgpt.data.lit_data import join
from litgpt.data.preparation import prepare_shards
from litgpt.data.shards import INDEX


def numbers(i):
    yield torch.arange(i * 90, (i + 1) * 90, dtype=torch.int32)


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """Chunks of litdata whose n-th token is n, in two folders."""
    litdata = pytest.importorskip("litdata")
    root = tmp_path_factory.mktemp("chunks")
    for name, first, last in (("train", 0, 20), ("val", 20, 24)):
        litdata.optimize(
            fn=numbers,
            inputs=list(range(first, last)),
            output_dir=str(root / name),
            num_workers=1,
            chunk_size=9 * 20,
            item_loader=litdata.TokensLoader(block_size=9),
            start_method="fork",
            verbose=False,
        )
    return root


def connected(*args, **kwargs):
    data = LitData(*args, num_workers=0, **kwargs)
    data.connect(batch_size=2, max_seq_length=8)
    data.prepare_data()
    data.setup()
    return data


def first_tokens(loader):
    return [int(row[0]) for batch in loader for row in batch]


def test_named_splits_are_read_from_their_folders(chunks):
    data = connected(chunks, split_names=("train", "val"))
    assert sorted(first_tokens(data.train_dataloader())) == list(range(0, 1800, 9))
    assert first_tokens(data.val_dataloader()) == list(range(1800, 2160, 9))
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (2, 9) and batch.dtype == torch.int64 and batch[0].diff().eq(1).all()


def test_without_split_names_validation_is_held_out(chunks):
    data = connected(chunks / "train")
    train, val = set(first_tokens(data.train_dataloader())), first_tokens(data.val_dataloader())
    assert len(val) == 10 and not train & set(val) and len(train) == 190
    assert first_tokens(connected(chunks / "train", seed=1).val_dataloader()) == val


def test_seed_decides_the_order(chunks):
    first, second, third = (
        first_tokens(connected(chunks, split_names=("train", "val"), seed=seed).train_dataloader())
        for seed in (1, 1, 2)
    )
    assert first == second != third


def test_shards_of_litgpt_are_read_too(tmp_path, tokenizer):
    for name in ("train", "val"):
        prepare_shards(tmp_path / name, [Texts((f"the {name} cat sat " * 40,))], tokenizer, name, eos=True)
    data = connected(tmp_path, split_names=("train", "val"))
    assert "the val cat" in tokenizer.decode(next(iter(data.val_dataloader())))
    assert next(iter(data.train_dataloader())).shape == (2, 9)
    with pytest.raises(ValueError, match=r"--data\.split_names"):
        connected(tmp_path / "train").train_dataloader()


def test_too_few_samples_to_hold_out_are_refused(chunks):
    data = LitData(chunks / "val")
    data.connect(batch_size=1, max_seq_length=89)
    with pytest.raises(ValueError, match=r"samples, too few to keep 5% .*--data\.split_names"):
        data.val_dataloader()


def test_folder_without_tokens_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{INDEX} is missing there"):
        connected(tmp_path).train_dataloader()


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / INDEX).write_text("{}")
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'litgpt\[data\]'"):
        connected(tmp_path).train_dataloader()


def test_split_names_are_two():
    with pytest.raises(ValueError, match="two names"):
        LitData(split_names=("train",))


def test_urls_stay_urls(tmp_path):
    assert join("s3://bucket/a/", "train") == "s3://bucket/a/train"
    assert join(tmp_path, "train") == tmp_path / "train"


def test_rows_become_int64():
    rows = [torch.tensor([1, 2], dtype=torch.int32), torch.from_numpy(np.array([3, 4], dtype=np.int16))]
    assert lit_data.stack(rows).tolist() == [[1, 2], [3, 4]] and lit_data.stack(rows).dtype == torch.int64
