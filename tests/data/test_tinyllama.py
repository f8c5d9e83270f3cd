import numpy as np
import pytest
import torch

from litgpt.data import MicroLlama, TinyLlama
from litgpt.data.documents import Texts
from litgpt.data.preparation import prepare_shards
from litgpt.data.sampler import TokenLoader


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Shards in which the letter tells the corpus."""
    for name, letter, n in (("slimpajama/train", "s", 2400), ("slimpajama/val", "v", 200), ("starcoder", "c", 1600)):
        prepare_shards(tmp_path / name, [Texts((f"{letter} " * n,))], tokenizer, name, eos=True)
    return tmp_path


def connected(data):
    data.connect(batch_size=4, max_seq_length=8)
    data.prepare_data()
    data.setup()
    return data


def letters(loader, tokenizer):
    return [tokenizer.decode(row[1:3]).strip()[0] for batch in loader for row in batch]


def test_starcoder_is_mixed_in_with_its_share(folder, tokenizer):
    data = connected(TinyLlama(folder))
    found = letters(data.train_dataloader(), tokenizer)
    assert len(found) > 200 and set(found) == {"s", "c"}
    assert abs(found.count("s") / len(found) - 0.693584) < 0.02
    assert set(letters(data.val_dataloader(), tokenizer)) == {"v"}


def test_micro_llama_is_slimpajama_alone(folder, tokenizer):
    (folder / "starcoder").rename(folder / "unused")
    data = connected(MicroLlama(data_path=folder, seed=1, num_workers=2))
    assert set(letters(data.train_dataloader(), tokenizer)) == {"s"}
    assert not data.use_starcoder


def test_mixture_resumes_where_it_was(folder):
    data = connected(TinyLlama(folder))
    straight = list(data.train_dataloader())
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    resumed = data.train_dataloader()
    assert isinstance(resumed, TokenLoader)
    resumed.load_state_dict(loader.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(straight[5:], resumed, strict=True))


@pytest.mark.parametrize(("name", "script"), [("slimpajama/val", "slimpajama"), ("starcoder", "starcoder")])
def test_missing_folder_says_which_script_makes_it(folder, name, script):
    (folder / name).rename(folder / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=rf"{name} is missing: run `python -m litgpt\.data\.prepare_{script} --out"
    ):
        connected(TinyLlama(folder))


def numbers(i):
    yield torch.arange(i * 90, (i + 1) * 90, dtype=torch.int32)


def test_chunks_of_litdata_are_mixed_too(tmp_path):
    litdata = pytest.importorskip("litdata")
    for name, first, last in (("slimpajama/train", 0, 30), ("slimpajama/val", 30, 32), ("starcoder", 100, 130)):
        litdata.optimize(
            fn=numbers,
            inputs=list(range(first, last)),
            output_dir=str(tmp_path / name),
            num_workers=1,
            chunk_size=9 * 20,
            item_loader=litdata.TokensLoader(block_size=9),
            start_method="fork",
            verbose=False,
        )
    data = connected(TinyLlama(tmp_path, num_workers=0))
    firsts = np.array([int(row[0]) for batch in data.train_dataloader() for row in batch])
    assert len(set(firsts)) == len(firsts) > 100
    assert 0.5 < (firsts < 9000).mean() < 0.85
    assert [int(row[0]) for batch in data.val_dataloader() for row in batch] == list(range(2700, 2880, 9))


def test_unlike_folders_are_refused(folder):
    (folder / "starcoder" / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="prepare all alike"):
        connected(TinyLlama(folder)).train_dataloader()
