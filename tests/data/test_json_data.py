import json
from dataclasses import fields

import pytest

from litgpt.data import JSON
from litgpt.data.json_data import load_split
from litgpt.tokenizer import Tokenizer
from tests.chat_templates import PLAIN, TOOLS, WITH_TOOLS, write_chat_tokenizer

ROWS = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(40)]


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text)
    return path


def connected(data, tokenizer, length=None):
    data.connect(tokenizer, 4, length)
    data.prepare_data()
    data.setup()
    return data


def test_published_fields():
    found = {f.name: f.default for f in fields(JSON)}
    assert found["val_split_fraction"] is None and found["mask_prompt"] is False and found["num_workers"] == 4
    assert found["val_dataset"] is None


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_one_file_is_split_by_the_seed(suffix, tmp_path, tokenizer):
    path = write(tmp_path / f"mine{suffix}", ROWS)
    data = connected(JSON(path, val_split_fraction=0.25), tokenizer)
    assert (len(data.train_dataset), len(data.val_dataset)) == (30, 10)
    assert data.val_dataset is data.test_dataset
    again = connected(JSON(str(path), val_split_fraction=0.25), tokenizer)
    assert data.val_dataset.data == again.val_dataset.data
    other = connected(JSON(path, val_split_fraction=0.25, seed=1), tokenizer)
    assert data.val_dataset.data != other.val_dataset.data
    seen = [row["output"] for row in [*data.train_dataset.data, *data.val_dataset.data]]
    assert sorted(seen, key=int) == [str(n) for n in range(40)]


def test_missing_fraction_is_a_twentieth_with_a_warning(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match=r"val_split_fraction is not given; 0\.05 of the samples"):
        data = JSON(write(tmp_path / "a.json", ROWS))
    assert len(connected(data, tokenizer).val_dataset) == 2


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_folder_with_train_and_val(suffix, tmp_path, tokenizer):
    train, val = write(tmp_path / f"train{suffix}", ROWS[:30]), write(tmp_path / f"val{suffix}", ROWS[30:])
    data = connected(JSON(tmp_path), tokenizer)
    assert data.train_dataset.data == ROWS[:30] and data.val_dataset.data == ROWS[30:]
    assert (data.find_split("train"), data.find_split("val")) == (train, val)
    with pytest.raises(ValueError, match="has validation samples of its own"):
        JSON(tmp_path, val_split_fraction=0.1)


def test_folder_with_train_only_is_split(tmp_path, tokenizer):
    write(tmp_path / "train.json", ROWS)
    data = connected(JSON(tmp_path, val_split_fraction=0.1), tokenizer)
    assert (len(data.train_dataset), len(data.val_dataset)) == (36, 4) and data.find_split("val") is None


def test_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data\.json_path .*gone\.json does not exist"):
        JSON(tmp_path / "gone.json")


def test_folder_without_data_is_named(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="no training data in"):
        connected(JSON(tmp_path), tokenizer)


@pytest.mark.parametrize("folder", [True, False])
def test_bad_sample_is_named_with_file_and_number(folder, tmp_path, tokenizer):
    rows = [*ROWS[:7], {"instruction": "no answer"}]
    path = write(tmp_path / "train.jsonl", rows)
    data = JSON(tmp_path) if folder else JSON(path, val_split_fraction=0.1)
    with pytest.raises(ValueError, match=r"train\.jsonl, line 8: the key 'output' is missing") as caught:
        connected(data, tokenizer)
    assert "\n" not in str(caught.value)


def test_load_split_checks_its_rows(tmp_path):
    assert load_split(write(tmp_path / "a.json", ROWS)) == ROWS
    with pytest.raises(ValueError, match="sample 1: has the keys a;"):
        load_split(write(tmp_path / "b.json", [{"a": 1}]))


def test_one_file_may_hold_every_form(tmp_path):
    tokenizer = Tokenizer(write_chat_tokenizer(tmp_path / "tokenizer", PLAIN["qwen"]))
    rows = [
        ROWS[0],
        {"messages": WITH_TOOLS, "tools": TOOLS},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "hi", "completion": "hello"},
    ]
    data = JSON(write(tmp_path / "a.jsonl", rows), val_split_fraction=0.25, prompt_style="template", mask_prompt=True)
    data = connected(data, tokenizer)
    assert len(data.train_dataset) == 3
    batch = next(iter(data.train_dataloader()))
    assert ((batch["labels"] != -100).sum(dim=1) > 0).all()


def test_validation_that_rounds_to_nothing_warns(tmp_path, tokenizer):
    with pytest.warns(UserWarning, match="validation split has 0 of 3 samples"):
        data = connected(JSON(write(tmp_path / "a.json", ROWS[:3]), val_split_fraction=0.0), tokenizer)
    assert data.val_dataloader() is None
