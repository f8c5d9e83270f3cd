import pytest
import torch

from litgpt.data import PythonDocs, python_docs
from litgpt.data.python_corpus import Document


@pytest.fixture(autouse=True)
def corpus(monkeypatch):
    """A small corpus in place of the real one, which test_python_corpus.py reads."""
    documents = [Document(f"thing.number_{i}", "(x)", f"The cat number {i} sat on the mat.") for i in range(300)]
    monkeypatch.setattr(python_docs, "python_documents", lambda: documents)
    return documents


def connected(tokenizer, **kwargs):
    data = PythonDocs(**kwargs)
    data.connect(tokenizer, batch_size=4, max_seq_length=32)
    data.prepare_data()
    data.setup()
    return data


def test_splits_are_disjoint_complete_and_the_same_for_every_seed(corpus):
    train, val = (list(PythonDocs(seed=1).texts(split)) for split in ("train", "val"))
    assert sorted(train + val) == sorted(map(str, corpus)) and not set(train) & set(val)
    assert 3 < len(val) < 30
    assert list(PythonDocs(seed=2).texts("val")) == val


def test_batches_and_bytes_per_token(tokenizer, cache):
    data = connected(tokenizer)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader)).shape == (4, 33)
    text = list(data.texts("val"))
    n_tokens = sum(len(tokenizer.encode(t, bos=True)) for t in text)
    assert data.bytes_per_token("val") == sum(len(t.encode()) for t in text) / n_tokens
    assert data.shards["val"].folder.is_relative_to(cache)


def test_validation_loader_is_always_the_same(tokenizer):
    data = connected(tokenizer)
    first, second = (torch.cat(list(data.val_dataloader())) for _ in range(2))
    assert torch.equal(first, second)


def test_share_for_validation_must_be_a_share():
    with pytest.raises(ValueError, match=r"--data\.val_split_fraction is 1\.5"):
        PythonDocs(val_split_fraction=1.5)
