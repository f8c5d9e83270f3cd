import hashlib

import pytest
from hub_server import Trouble, running_hub

from litgpt.checkpoint.hub_repo import HubRepo, RemoteFile, is_repo_id

FILES = {"a.safetensors": bytes(range(256)) * 1000, "b.json": b'{"b": 1}', "empty.json": b""}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub(monkeypatch, tmp_path) as hub:
        hub.add("org/model", FILES)
        yield hub


@pytest.mark.parametrize("text", ["org/model", "gpt2", "a/b", "0x/y_z", "org/Model-1.5_b"])
def test_repo_id_is_recognised(text):
    assert is_repo_id(text)


@pytest.mark.parametrize(
    "text", ["", "/", "a/", "/a", "a/b/c", "../a", "a/..", "a/.b", ".a/b", "a/b..c", "a b/c", "a\\b", "é/b"]
)
def test_what_could_leave_its_folder_is_no_repo_id(text):
    assert not is_repo_id(text)


def test_repo_tells_its_files_with_sizes_and_hashes(hub):
    hub.repos["org/model"].commit({"folder/c.json": b"{}", ".hidden": b"x", "../up.json": b"x"})
    repo = HubRepo("org/model")
    assert repo.commit == hub.repos["org/model"].branches["main"]
    assert set(repo.files) == set(FILES)
    assert repo.files["a.safetensors"].sha256 == hashlib.sha256(FILES["a.safetensors"]).hexdigest()
    assert repo.files["a.safetensors"].blob_id is None and repo.files["b.json"].sha256 is None
    assert [repo.files[name].size for name in FILES] == [256_000, 8, 0]


def test_file_is_intact_only_byte_by_byte(tmp_path):
    data = b"some text"
    sha256 = hashlib.sha256(data).hexdigest()
    blob_id = hashlib.sha1(b"blob 9\0" + data).hexdigest()  # what `git hash-object` prints
    path = tmp_path / "file"
    files = [RemoteFile("file", 9, sha256, None), RemoteFile("file", 9, None, blob_id)]
    assert not any(file.is_intact(path) for file in files)
    path.write_bytes(data)
    assert all(file.is_intact(path) for file in files)
    path.write_bytes(b"some tExt")
    assert not any(file.is_intact(path) for file in files)
    path.write_bytes(data[:-1])
    assert not any(file.is_intact(path) for file in [*files, RemoteFile("file", 9, None, None)])


def test_files_arrive_whole_and_are_not_fetched_twice(hub, tmp_path):
    repo = HubRepo("org/model")
    for _ in range(2):
        repo.download(FILES, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    assert len(hub.asked("/resolve/")) == 3


def test_part_of_a_dead_process_is_completed(hub, tmp_path):
    repo = HubRepo("org/model")
    part = repo._part(repo.files["a.safetensors"], tmp_path)
    part.write_bytes(FILES["a.safetensors"][:100_000])
    repo.download(["a.safetensors"], tmp_path)
    assert (tmp_path / "a.safetensors").read_bytes() == FILES["a.safetensors"]
    assert [headers.get("range") for headers in hub.asked("/large/")] == ["bytes=100000-"]


@pytest.mark.parametrize("junk", [bytes(100_000), bytes(256_000), bytes(300_000)])
def test_part_with_wrong_bytes_is_thrown_away(hub, tmp_path, junk):
    repo = HubRepo("org/model")
    repo._part(repo.files["a.safetensors"], tmp_path).write_bytes(junk)
    repo.download(["a.safetensors"], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.safetensors": FILES["a.safetensors"]}


def test_part_of_another_content_is_not_mixed_in(hub, tmp_path):
    old = HubRepo("org/model")
    old._part(old.files["a.safetensors"], tmp_path).write_bytes(FILES["a.safetensors"][:100_000])
    hub.repos["org/model"].commit({"a.safetensors": b"new" * 50_000})
    HubRepo("org/model").download(["a.safetensors"], tmp_path)
    assert (tmp_path / "a.safetensors").read_bytes() == b"new" * 50_000
    assert "range" not in hub.asked("/large/")[0]


@pytest.mark.parametrize("sent", [100, 300_000])
def test_content_of_another_length_is_refused(hub, tmp_path, sent):
    repo = HubRepo("org/model")
    hub.stored[repo.files["a.safetensors"].sha256] = bytes(sent)
    hub.repos["org/model"].commits[repo.commit]["a.safetensors"] = bytes(sent)
    hub.troubles = [Trouble("/resolve/", status=302, times=99, headers={"Location": f"{hub.url}/large/x/short"})]
    hub.stored["short"] = bytes(sent)
    with pytest.raises(ConnectionError, match=r"a\.safetensors") as caught:
        repo.download(["a.safetensors"], tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.safetensors").exists()
    assert len(hub.asked("/large/")) < 20


def test_one_failure_ends_the_other_transfers(hub, tmp_path):
    hub.bytes_per_second = 50_000  # a.safetensors would take five seconds
    hub.troubles = [Trouble("b.json", status=410, times=9)]
    with pytest.raises(ConnectionError, match="answers 410 for org/model"):
        HubRepo("org/model").download(FILES, tmp_path)
    assert not (tmp_path / "a.safetensors").exists()
    assert len(list(tmp_path.glob("a.safetensors.*.part"))) == 1


@pytest.mark.parametrize("there", [b"", FILES["a.safetensors"][:50_000], FILES["a.safetensors"], bytes(70_000)])
def test_progress_ends_at_the_sum_of_all_files(hub, tmp_path, capsys, there):
    repo = HubRepo("org/model")
    repo._part(repo.files["a.safetensors"], tmp_path).write_bytes(there)
    hub.troubles = [Trouble("/large/", cut_after=100_000)]
    repo.download(FILES, tmp_path, show_progress=True)
    assert "256k/256k" in capsys.readouterr().err.split("\r")[-1]
