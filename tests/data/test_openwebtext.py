import sys
from types import ModuleType

import numpy as np
import pytest

from litgpt.data import OpenWebText, openwebtext

PAGES = [f"Page {i} about the cat and the dog. " * 3 for i in range(50)]


class Pages(list):
    """As much of `datasets.Dataset` as is used."""

    def train_test_split(self, test_size, seed, shuffle):
        assert shuffle
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        n_test = round(test_size * len(self))
        return {"train": Pages(self[i] for i in order[n_test:]), "test": Pages(self[i] for i in order[:n_test])}

    def __getitem__(self, key):
        return {"text": super().__getitem__(key)} if isinstance(key, slice) else super().__getitem__(key)


@pytest.fixture
def hub(monkeypatch):
    module = ModuleType("datasets")
    module.load_dataset = lambda name, split: (
        Pages(PAGES) if (name, split) == ("Skylion007/openwebtext", "train") else None
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(openwebtext, "ROWS_PER_SOURCE", 7)
    monkeypatch.setattr(openwebtext, "ROWS_PER_READ", 3)


def test_pages_are_split_and_each_ends_with_eos(hub, tmp_path, tokenizer):
    data = OpenWebText(tmp_path, val_split_fraction=0.2, num_workers=0)
    data.connect(tokenizer, batch_size=2, max_seq_length=16)
    data.prepare_data()
    data.setup()
    texts = {split: list(data.texts(split)) for split in ("train", "val")}
    assert sorted(texts["train"] + texts["val"]) == sorted(PAGES) and len(texts["val"]) == 10
    shards = data.shards["train"]
    expected = [id for text in texts["train"] for id in tokenizer.encode(text, bos=False, eos=True).tolist()]
    assert shards.windows(np.array([0]), len(shards))[0].tolist() == expected
    assert next(iter(data.val_dataloader())).shape == (2, 17)


def test_seed_decides_the_split(hub, tmp_path):
    val = [list(OpenWebText(tmp_path, val_split_fraction=0.2, seed=seed).texts("val")) for seed in (1, 1, 2)]
    assert val[0] == val[1] != val[2]


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'litgpt\[data\]'"):
        OpenWebText(tmp_path).splits()


def test_remote_folder_and_wrong_share_are_refused():
    with pytest.raises(ValueError, match="must be a local folder"):
        OpenWebText("s3://bucket/openwebtext")
    with pytest.raises(ValueError, match="val_split_fraction is 0"):
        OpenWebText(val_split_fraction=0)
