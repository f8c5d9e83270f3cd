import json
import socket
from pathlib import Path

import pytest
from hub_server import Trouble, running_hub

from litgpt.checkpoint.hub import auto_download_checkpoint, find_checkpoint, upload_folder
from litgpt.config import Config, save_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
FILES = {"config.json": json.dumps(LLAMA).encode(), "tokenizer.json": b"{}", "model.safetensors": bytes(range(256)) * 9}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub(monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to open a socket fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(folder: Path | str, files: dict[str, bytes] = FILES) -> Path:
    """A folder with these files."""
    for name, data in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return Path(folder)


# One door


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("my/folder", "my/folder"),
        ("my/folder", "./my/folder"),
        ("checkpoints/org/model", "org/model"),
        ("checkpoints/org/model", "checkpoints/org/model"),
        ("checkpoints/EleutherAI/pythia-14m", "pythia-14m"),
        ("checkpoints/EleutherAI/pythia-14m", "EleutherAI/pythia-14m"),
        ("checkpoints/meta-llama/Meta-Llama-3-8B", "Llama-3-8B"),
        ("checkpoints/mine", "mine"),
        ("out/pretrain/final", "out/pretrain/final"),
    ],
)
def test_what_is_local_is_found_without_a_network(tmp_path, monkeypatch, no_network, there, asked):
    monkeypatch.chdir(tmp_path)
    write(there)
    assert find_checkpoint(asked) == Path(there)
    assert auto_download_checkpoint(asked) == Path(there)


def test_home_and_absolute_paths_are_found(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "models" / "one")
    assert (
        find_checkpoint("~/models/one") == find_checkpoint(tmp_path / "models" / "one") == tmp_path / "models" / "one"
    )


def test_litgpt_folder_is_found_too(tmp_path, no_network):
    folder = write(tmp_path / "final", {"lit_model.pth": b"weights", "tokenizer.json": b"{}"})
    save_config(Config(n_layer=1), folder)
    assert find_checkpoint(folder) == folder


@pytest.mark.parametrize(
    "path", ["./org/model", "/org/model", "~/org/model", "../org", "checkpoints/org/model", "a/b/c"]
)
def test_what_looks_like_a_path_is_never_asked_for(tmp_path, monkeypatch, no_network, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder, and no model has this name") as caught:
        find_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_existing_folder_without_weights_is_never_asked_for(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    write("org/model", {"notes.txt": b"mine"})
    with pytest.raises(FileNotFoundError, match="org/model holds no model weights with their config"):
        find_checkpoint("org/model")


def test_plain_unknown_name_has_the_nearest_known_ones(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*EleutherAI/pythia-14m"):
        find_checkpoint("pythia-14n")


def test_download_may_be_forbidden(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="pythia-14m is not on this machine: `litgpt download EleutherAI/pythia-14m`"
    ):
        find_checkpoint("pythia-14m", download=False)


def test_offline_mode_finds_what_is_there_and_else_says_why(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write("checkpoints/org/model")
    assert find_checkpoint("org/model") == Path("checkpoints/org/model")
    with pytest.raises(ConnectionError, match="org/other is not on this machine, and HF_HUB_OFFLINE forbids"):
        find_checkpoint("org/other")


def test_repo_is_fetched_once_and_then_found(hub, capsys):
    hub.add("org/model", FILES)
    assert auto_download_checkpoint("org/model") == Path("checkpoints/org/model")
    assert "There is no folder org/model; downloading org/model from the hub." in capsys.readouterr().err
    n_requests = len(hub.requests)
    assert auto_download_checkpoint("org/model") == Path("checkpoints/org/model")
    assert len(hub.requests) == n_requests


def test_folder_with_a_tokenizer_alone_is_completed(hub):
    hub.add("org/model", FILES)
    write("checkpoints/org/model", {"tokenizer.json": b"{}", "config.json": FILES["config.json"]})
    assert (find_checkpoint("org/model") / "model.safetensors").is_file()


def test_missing_tokenizer_is_said_unless_it_is_to_be_ignored(tmp_path, monkeypatch, no_network):
    folder = write(tmp_path / "bare", {name: FILES[name] for name in ("config.json", "model.safetensors")})
    assert auto_download_checkpoint(folder, ignore_tokenizer_files=True) == folder
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: expected tokenizer"):
        auto_download_checkpoint(folder)


# The way back


@pytest.fixture
def writer(hub, monkeypatch):
    """The hub, with a token that may write."""
    hub.readers["hf_writer"] = {"*"}
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub


def uploaded(hub, repo_id: str, branch: str = "main") -> dict[str, bytes]:
    repo = hub.repos[repo_id]
    return repo.commits[repo.branches[branch]]


def test_uploaded_folder_comes_back_byte_by_byte(writer, capfd):
    traces = {
        "logs/csv/metrics.csv": b"1",
        "step-00001/lit_model.pth": b"old",
        ".cache/x": b"y",
        "hyperparameters.yaml": b"a: b",
    }
    folder = write("mine", {**FILES, **traces, "lit_model.pth": b"a copy"})
    url = upload_folder(folder, "me/mine", commit_message="First weights")
    assert uploaded(writer, "me/mine") == FILES
    assert writer.repos["me/mine"].messages == ["First weights"]
    assert url == f"{writer.url}/me/mine/commit/{writer.repos['me/mine'].branches['main']}"
    fetched = find_checkpoint("me/mine")
    assert all((fetched / name).read_bytes() == data for name, data in FILES.items())
    assert "hf_writer" not in "".join(capfd.readouterr())


def test_litgpt_folder_is_converted_first_or_uploaded_as_it_is(writer):
    folder = write("final", {"lit_model.pth": bytes(5000), "tokenizer.json": b"{}"})
    save_config(Config(n_layer=1), folder)
    with pytest.raises(ValueError, match="which only litgpt reads: run `litgpt convert_from_litgpt final OUT` first"):
        upload_folder(folder, "me/lit")
    assert not writer.requests
    upload_folder(folder, "me/lit", as_is=True)
    assert set(uploaded(writer, "me/lit")) == {"lit_model.pth", "tokenizer.json", "model_config.yaml"}
    assert Config.from_checkpoint(find_checkpoint("me/lit")) == Config(n_layer=1)


def test_upload_to_a_branch_makes_it(writer):
    writer.add("me/mine", {"README.md": b"hello"})
    upload_folder(write("mine"), "me/mine", revision="trial")
    assert uploaded(writer, "me/mine") == {"README.md": b"hello"}
    assert uploaded(writer, "me/mine", "trial") == {**FILES, "README.md": b"hello"}


def test_private_upload_makes_a_private_repo_and_never_goes_into_a_public_one(writer):
    upload_folder(write("mine"), "me/secret", private=True)
    assert writer.repos["me/secret"].private
    writer.add("me/public", {"README.md": b"hello"})
    with pytest.raises(ValueError, match="me/public exists and is public"):
        upload_folder(Path("mine"), "me/public", private=True)
    assert set(uploaded(writer, "me/public")) == {"README.md"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "is not there"),
        ({"notes.txt": b""}, "holds no weights"),
        ({"model.safetensors": b"x"}, "holds no weights with"),
    ],
)
def test_folder_that_is_no_model_is_not_uploaded(writer, files, reason):
    write("mine", files)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        upload_folder(Path("mine"), "me/mine")
    assert not writer.requests


@pytest.mark.parametrize("repo_id", ["mine", "../mine", "me/mine/more", ""])
def test_upload_needs_a_whole_repo_id(writer, repo_id):
    with pytest.raises(ValueError, match="is no repo id: give the name of your account"):
        upload_folder(write("mine"), repo_id)
    assert not writer.requests


def test_folder_that_holds_the_token_is_not_uploaded(writer):
    folder = write("mine", {**FILES, "training.yaml": b"access_token: hf_writer"})
    with pytest.raises(ValueError, match=r"training.yaml holds your access token: take it out") as caught:
        upload_folder(folder, "me/mine")
    assert "hf_writer" not in str(caught.value)
    assert not writer.requests


def test_upload_without_a_token_says_what_to_set(hub):
    with pytest.raises(ValueError, match="uploading to me/mine needs a token that may write: set HF_TOKEN"):
        upload_folder(write("mine"), "me/mine")
    assert not hub.requests


@pytest.mark.parametrize("rights", [set(), None])
def test_token_that_may_not_write_is_said(hub, rights):
    if rights is not None:
        hub.readers["hf_reader"] = rights
    with pytest.raises(ValueError, match="access token") as caught:
        upload_folder(write("mine"), "me/mine", access_token="hf_reader")
    assert "hf_reader" not in str(caught.value) and "\n" not in str(caught.value)


def test_upload_to_a_busy_hub_is_tried_again(writer):
    writer.troubles = [
        Trouble("/api/repos/create", status=503, method="POST"),
        Trouble("/commit/", status=503, method="POST"),
    ]
    upload_folder(write("mine"), "me/mine")
    assert uploaded(writer, "me/mine") == FILES


def test_upload_offline_is_refused(writer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="cannot upload to me/mine: HF_HUB_OFFLINE forbids it"):
        upload_folder(write("mine"), "me/mine")
