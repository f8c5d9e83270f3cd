import errno
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from litgpt.data import download
from litgpt.data.download import download_file, unpack_tar

CONTENT = bytes(range(256)) * 3000


class Server(ThreadingHTTPServer):
    """Serves CONTENT. `script` has what goes wrong with the next requests: a status, or the bytes before a cut."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.ranges, self.knows_ranges = [], [], True
        self.url = f"http://127.0.0.1:{self.server_port}/data.bin"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        trouble = self.server.script.pop(0) if self.server.script else None
        start = int(asked[6:-1]) if asked and self.server.knows_ranges else 0
        if trouble and trouble[0] == "status":
            self.send_error(trouble[1])
            return
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        end = start + trouble[1] if trouble else len(CONTENT)
        self.wfile.write(CONTENT[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.01)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_file_arrives_whole(server, tmp_path):
    path = download_file(server.url, tmp_path / "deep" / "data.bin")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["data.bin"]
    download_file(server.url, path)
    assert len(server.ranges) == 1  # what is there is not fetched again


def test_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    server.script = [("cut", 300_000), ("cut", 100_000)]
    assert download_file(server.url, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=400000-"]


def test_server_without_ranges_starts_again(server, tmp_path):
    server.script, server.knows_ranges = [("cut", 300_000)], False
    assert download_file(server.url, tmp_path / "data.bin").read_bytes() == CONTENT


def test_busy_server_is_asked_again(server, tmp_path):
    server.script = [("status", 500), ("status", 429), ("status", 503)]
    assert download_file(server.url, tmp_path / "data.bin").read_bytes() == CONTENT


def test_missing_file_is_no_data(server, tmp_path):
    server.script = [("status", 404)]
    with pytest.raises(ConnectionError, match=r"cannot download http://127.*data\.bin: status 404") as error:
        download_file(server.url, tmp_path / "data.bin")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == [] and len(server.ranges) == 1


def test_giving_up_keeps_what_came_for_the_next_call(server, tmp_path):
    server.script = [("cut", 1000)] * download.N_ATTEMPTS
    with pytest.raises(ConnectionError, match="ended after 5,000 of 768,000 bytes"):
        download_file(server.url, tmp_path / "data.bin")
    assert not (tmp_path / "data.bin").exists()
    assert download_file(server.url, tmp_path / "data.bin").read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=5000-"


def test_complete_part_only_needs_its_name(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT)
    assert download_file(server.url, tmp_path / "data.bin").read_bytes() == CONTENT


def test_part_that_is_longer_than_the_file_is_fetched_anew(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(CONTENT + b"more")
    assert download_file(server.url, tmp_path / "data.bin").read_bytes() == CONTENT


def test_unreachable_server_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "FIRST_PAUSE_SECONDS", 0.0)
    with pytest.raises(ConnectionError, match=r"cannot download http://127\.0\.0\.1:9/x"):
        download_file("http://127.0.0.1:9/x", tmp_path / "x")


def test_full_disk_is_not_tried_again(server, tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(OSError, match=r"disk full while writing .*data\.bin\.part"):
        download_file(server.url, tmp_path / "data.bin")
    assert len(server.ranges) == 1


def archive(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_archive_is_unpacked(tmp_path):
    packed = archive(tmp_path / "a.tar.gz", {"x.json": b"[]", "sub/y.json": b"{}"})
    folder = unpack_tar(packed, tmp_path / "out")
    assert (folder / "x.json").read_bytes() == b"[]" and (folder / "sub" / "y.json").exists()


@pytest.mark.parametrize("name", ["../evil", "/tmp/litgpt-evil"])
def test_archive_cannot_write_outside(tmp_path, name):
    packed = archive(tmp_path / "a.tar.gz", {"fine": b"", name: b"evil"})
    before = set(tmp_path.iterdir())
    if name.startswith("/"):  # the filter strips the slash, so that it lands inside
        assert (unpack_tar(packed, tmp_path / "out") / name[1:]).exists()
    else:
        with pytest.raises(ValueError, match="cannot unpack"):
            unpack_tar(packed, tmp_path / "out")
        assert set(tmp_path.iterdir()) == before


def test_truncated_archive_leaves_no_folder(tmp_path):
    packed = archive(tmp_path / "a.tar.gz", {"x": bytes(range(256)) * 999})
    packed.write_bytes(packed.read_bytes()[:-700])
    with pytest.raises(ValueError, match=r"cannot unpack .*a\.tar\.gz .*delete it"):
        unpack_tar(packed, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]
