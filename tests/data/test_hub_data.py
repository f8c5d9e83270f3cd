import pytest

from litgpt.data import download
from litgpt.data.hub_data import RECORD, choose_files, download_dataset
from tests.data.file_server import repo_files, running_server

FILES = {
    "README.md": b"# data",
    ".gitattributes": b"",
    "dataset_infos.json": b"{}",
    "data/train-00000-of-00002.jsonl": b'{"a": 1}',
    "data/train-00001-of-00002.jsonl": b'{"a": 2}',
    "data/test-00000-of-00001.jsonl": b'{"a": 3}',
}


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    import huggingface_hub.constants

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))


def test_files_of_both_splits_come_once(tmp_path, monkeypatch):
    with running_server(repo_files("org/set", FILES)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        found = download_dataset("org/set", tmp_path)
        assert [path.relative_to(tmp_path).as_posix() for path in found["train"]] == list(FILES)[3:5]
        assert found["val"] == [tmp_path / "data/test-00000-of-00001.jsonl"]
        assert found["train"][1].read_bytes() == b'{"a": 2}'
        n_requests = len(hub.requests)
        assert n_requests == 4 and not any("README" in path for path, _ in hub.requests)
    assert download_dataset("org/set", tmp_path) == found  # the server is gone


def test_broken_off_download_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    files = repo_files("org/set", FILES)
    with running_server(files) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        last = f"/datasets/org/set/resolve/c0ffee/{list(FILES)[5]}"
        monkeypatch.setattr(download, "N_ATTEMPTS", 1)
        content, files[last] = files[last], None  # the connection breaks
        with pytest.raises(ConnectionError, match="test-00000-of-00001"):
            download_dataset("org/set", tmp_path)
        assert not (tmp_path / RECORD).exists()
        files[last] = content
        hub.requests.clear()
        assert download_dataset("org/set", tmp_path)["val"][0].read_bytes() == content
        assert [path for path, _ in hub.requests if "/resolve/" in path] == [last]


def test_unknown_repo_is_refused(tmp_path, monkeypatch):
    with running_server({}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ValueError, match="has no data set 'org/gone', or it is private"):
            download_dataset("org/gone", tmp_path)
    assert not (tmp_path / RECORD).exists()


def test_gated_repo_needs_a_token_which_is_shown_to_the_hub_only(tmp_path, monkeypatch):
    with running_server(repo_files("org/set", FILES), token="hf_secret") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ValueError, match=r"org/set is gated: ask for access at .*, then set HF_TOKEN"):
            download_dataset("org/set", tmp_path)
        assert len(download_dataset("org/set", tmp_path, "hf_secret")["train"]) == 2
        assert "hf_secret" not in (tmp_path / RECORD).read_text()
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        download_dataset("org/set", tmp_path / "again")


def test_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"cannot list the data set org/set at http://127\.0\.0\.1:9") as caught:
        download_dataset("org/set", tmp_path)
    assert "\n" not in str(caught.value)


def test_offline_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match=r"is not in .*, and HF_HUB_OFFLINE forbids"):
        download_dataset("org/set", tmp_path)


@pytest.mark.parametrize(
    ("names", "splits", "expected"),
    [
        (["train.jsonl", "test.jsonl", "train.parquet"], {}, {"train": ["train.jsonl"], "val": ["test.jsonl"]}),
        (["alpaca_2000.parquet"], {}, {"train": ["alpaca_2000.parquet"]}),
        (["b.json", "a.json", "c.csv"], {}, {"train": ["a.json", "b.json"]}),
        (
            ["data/train_gen-0.parquet", "data/train_sft-0.parquet", "data/test_sft-0.parquet"],
            {"train": "train_sft", "val": "test_sft"},
            {"train": ["data/train_sft-0.parquet"], "val": ["data/test_sft-0.parquet"]},
        ),
        (["../train.json", "/train.json", "a/../../train.json", ".train.json"], {}, {}),
        (["README.md", "train.py"], {}, {}),
        (["validation/0.csv", "train/0.csv", "train/1.csv"], {}, {
            "train": ["train/0.csv", "train/1.csv"], "val": ["validation/0.csv"],
        }),
    ],
)  # fmt: skip
def test_files_are_chosen_by_the_names_of_splits(names, splits, expected):
    assert choose_files(names, splits) == expected


def test_repo_without_data_is_refused(tmp_path, monkeypatch):
    with running_server(repo_files("org/set", {"README.md": b""})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ValueError, match="org/set has no files of a known format"):
            download_dataset("org/set", tmp_path)
