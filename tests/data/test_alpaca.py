import json
from dataclasses import fields

import pytest

from litgpt.data import Alpaca, AlpacaGPT4, alpaca, alpaca_gpt4
from litgpt.data.alpaca import download_if_missing
from tests.data.file_server import running_server

ROWS = [{"instruction": f"Say {n}.", "input": "loud" * (n % 2), "output": str(n)} for n in range(50)]

PUBLISHED = {
    Alpaca: (0.03865, "data/alpaca", alpaca._URL, "alpaca_data_cleaned_archive.json"),
    AlpacaGPT4: (0.03847, "data/alpacagpt4", alpaca_gpt4._URL, "alpacagpt4_data_cleaned_archive.json"),
}


@pytest.mark.parametrize("module", PUBLISHED)
def test_published_fields(module):
    found = {f.name: f.default for f in fields(module)}
    names = ("val_split_fraction", "download_dir", "file_url", "file_name")
    assert (found["val_split_fraction"], str(found["download_dir"]), *map(found.get, names[2:])) == PUBLISHED[module]
    assert (found["mask_prompt"], found["prompt_style"], found["seed"], found["num_workers"]) == (
        False,
        "alpaca",
        42,
        4,
    )
    assert found["file_url"].startswith("https://raw.githubusercontent.com/")


@pytest.mark.parametrize("module", PUBLISHED)
def test_file_is_fetched_once_and_split(module, tmp_path, tokenizer):
    with running_server({"/data.json": json.dumps(ROWS).encode()}) as server:
        for _ in range(2):
            data = module(download_dir=tmp_path, file_url=f"{server.url}/data.json", val_split_fraction=0.1)
            data.connect(tokenizer, batch_size=5)
            data.prepare_data()
            data.setup()
        assert len(server.requests) == 1
    assert (len(data.train_dataset), len(data.test_dataset)) == (45, 5)
    assert (tmp_path / data.file_name).is_file()
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].size(0) == 5 and set(batch) == {"input_ids", "labels", "token_counts"}
    assert len(list(data.train_dataloader())) == 9
    assert {"instruction", "input", "output"} == set(data.test_dataset.data[0])


def test_error_page_is_no_data_set(tmp_path):
    with running_server({}) as server, pytest.raises(ConnectionError, match=r"data\.json: status 404"):
        download_if_missing(tmp_path / "a.json", f"{server.url}/data.json")
    assert not list(tmp_path.glob("*.json"))


def test_page_in_place_of_the_file_is_named(tmp_path, tokenizer):
    with running_server({"/data.json": b"<html>sign in</html>"}) as server:
        data = Alpaca(download_dir=tmp_path, file_url=f"{server.url}/data.json")
        data.connect(tokenizer)
        with pytest.raises(ValueError, match="is not JSON as its name says, but an HTML"):
            data.setup()
