"""A hub on this machine that speaks the part of the Hugging Face API that downloads and uploads use, and misbehaves."""

import base64
import contextlib
import fnmatch
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

LARGE_FILES = ("*.safetensors", "*.bin", "*.pth", "*.gguf")
BLOCK_BYTES = 1 << 14


@dataclass
class Repo:
    """A model repo: commits, and branches that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add `files` to what the branch holds; returns the new commit."""
        files = {**self.commits.get(self.branches.get(branch), {}), **files}
        names = repr(
            (sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items()), len(self.commits))
        )
        self.branches[branch] = sha = hashlib.sha1(names.encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch or a commit names."""
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Trouble:
    """What happens to the next `times` requests whose path holds `path`."""

    path: str = ""
    status: int = 0
    """Answer with this status."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b"trouble"
    cut_after: int | None = None
    """Close the connection after so many bytes of the content."""
    change: bool = False
    """Send other content of the same size."""
    times: int = 1
    method: str = "GET"


class Hub(ThreadingHTTPServer):
    """The server. `requests` has (method, path, headers) of each request, `troubles` what goes wrong next."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.readers: dict[str, set[str]] = {}
        """Token -> the gated and private repos that it opens; "*" opens all and may write."""
        self.troubles: list[Trouble] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bytes_per_second: float | None = None
        self.knows_ranges = True
        self.tells_hashes = True
        self.stored: dict[str, bytes] = {}
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def add(self, repo_id: str, files: dict[str, bytes], **fields: bool) -> Repo:
        """A new repo with one commit."""
        repo = self.repos[repo_id] = Repo(**fields)
        repo.commit(files)
        return repo

    def stop(self) -> None:
        """End the server."""
        self.shutdown()
        self.server_close()
        self.thread.join()

    def asked(self, part: str, method: str = "GET") -> list[dict[str, str]]:
        """The headers of all requests whose path holds `part`."""
        return [headers for verb, path, headers in list(self.requests) if part in path and verb == method]


@contextlib.contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that this process takes for the real one, in an empty working folder and without a saved login."""
    import huggingface_hub.constants

    from litgpt.checkpoint import hub_session

    hub = Hub()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_session, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.chdir(folder)
    try:
        yield hub
    finally:
        hub.stop()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client was killed
            super().handle()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.server.requests.append((self.command, path, headers))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._read_chunks()
        trouble = next(
            (t for t in self.server.troubles if t.path in path and t.method == self.command and t.times), None
        )
        if trouble is not None:
            trouble.times -= 1
            if trouble.status:
                return self._answer(trouble.status, trouble.body, trouble.headers)
        if path.startswith("/large/"):
            return self._send_content(self.server.stored[path.rpartition("/")[2]], {}, trouble)
        if path.startswith("/api/models/"):
            return self._api(path.removeprefix("/api/models/"))
        if path == "/api/repos/create":
            return self._create()
        if "/info/lfs/" in path:
            return self._batch()
        if path.startswith("/put/"):
            self.server.stored[path.rpartition("/")[2]] = self.body
            return self._answer(200)
        if "/resolve/" in path:
            return self._resolve(*path[1:].split("/resolve/", 1), trouble)
        return self._answer(404)

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_chunks(self) -> bytes:
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (n := int(self.rfile.readline(), 16)):
            body += self.rfile.read(n)
            self.rfile.readline()
        return body

    def _api(self, path: str) -> None:
        parts = path.split("/")
        two = "/".join(parts[:2])
        repo_id, rest = (two, parts[2:]) if two in self.server.repos or len(parts) > 2 else (two, [])
        verb, revision = (rest[0], "/".join(rest[1:]) or "main") if rest else ("revision", "main")
        repo = self._may_read(repo_id, files=False, write=self.command == "POST")
        if repo is None:
            return None
        if verb == "branch":
            repo.branches.setdefault(revision, repo.branches.get("main", ""))
            return self._answer(200, b"{}")
        commit = repo.find(revision)
        if commit is None and verb != "preupload" and (verb, revision) != ("commit", "main"):
            return self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits.get(commit, {})
        if verb == "revision":
            siblings = [self._sibling(name, data) for name, data in files.items()]
            return self._json({"id": repo_id, "sha": commit, "private": repo.private, "siblings": siblings})
        if verb == "tree":
            entries = [self._sibling(name, data) for name, data in files.items()]
            for entry in entries:
                entry |= {"type": "file", "path": entry.pop("rfilename"), "oid": entry.pop("blobId", "")}
            return self._json(entries)
        if verb == "commits":
            return self._json([{"id": sha} for sha in repo.commits])
        if verb == "preupload":
            names = [entry["path"] for entry in json.loads(self.body)["files"]]
            modes = {name: "lfs" if _is_large(name) else "regular" for name in names}
            return self._json({"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]})
        return self._commit(repo, repo_id, revision)

    def _commit(self, repo: Repo, repo_id: str, revision: str) -> None:
        files, message = {}, ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        sha = repo.commit(files, revision, message)
        self._json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True})

    def _create(self) -> None:
        values = json.loads(self.body)
        repo_id = f"{values['organization']}/{values['name']}" if values.get("organization") else values["name"]
        if "*" not in self.server.readers.get(self._token(), ()):
            return self._answer(403 if self._token() in self.server.readers else 401, b'{"error": "no right to write"}')
        if repo_id in self.server.repos:
            return self._json({"url": f"{self.server.url}/{repo_id}"}, 409)
        is_private = values.get("private") or values.get("visibility") == "private"
        self.server.repos[repo_id] = Repo(private=bool(is_private), branches={"main": ""}, commits={"": {}})
        return self._json({"url": f"{self.server.url}/{repo_id}"})

    def _batch(self) -> None:
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.server.url}/put/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _resolve(self, repo_id: str, rest: str, trouble: Trouble | None) -> None:
        repo = self._may_read(repo_id, files=True)
        if repo is None:
            return None
        revision, _, name = rest.partition("/")
        commit = repo.find(revision)
        data = repo.commits.get(commit, {}).get(name)
        if data is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if commit else "RevisionNotFound"})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(data)}"'}
        if not _is_large(name):
            return self._send_content(data, headers, trouble)
        sha256 = hashlib.sha256(data).hexdigest()
        self.server.stored[sha256] = data
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        address = f"http://localhost:{self.server.server_port}/large/{name}/{sha256}"  # another host, as for the hub
        return self._answer(302, b"", {**headers, "Location": address})

    def _may_read(self, repo_id: str, files: bool, write: bool = False) -> Repo | None:
        """The repo, or None after an answer that refuses it as the hub does."""
        repo, token = self.server.repos.get(repo_id), self._token()
        rights = self.server.readers.get(token, set())
        if token and token not in self.server.readers:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._answer(401, b'{"error": "Invalid credentials in Authorization header"}', message)
        elif repo is None or (repo.private and not rights & {"*", repo_id}):
            self._answer(404 if token else 401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and files and not rights & {"*", repo_id}:
            self._answer(403 if token else 401, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})
        elif write and "*" not in rights:
            self._answer(403, b'{"error": "no right to write"}')
        else:
            return repo
        return None

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _sibling(self, name: str, data: bytes) -> dict:
        if not self.server.tells_hashes:
            return {"rfilename": name}
        entry = {"rfilename": name, "size": len(data), "blobId": _blob_id(data)}
        if _is_large(name):
            entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
            entry["lfs"]["oid"] = entry["lfs"]["sha256"]
        return entry

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_content(self, data: bytes, headers: dict[str, str], trouble: Trouble | None) -> None:
        asked = self.headers.get("Range") if self.server.knows_ranges else None
        start = int(asked[6:].rstrip("-").split("-")[0]) if asked else 0
        if trouble is not None and trouble.change:
            data = bytes(byte ^ 1 for byte in data)
        if start and start >= len(data):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self.send_response(206 if asked else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        end = len(data) if trouble is None or trouble.cut_after is None else min(len(data), start + trouble.cut_after)
        for at in range(start, end, BLOCK_BYTES):
            block = data[at : min(at + BLOCK_BYTES, end)]
            self.wfile.write(block)
            if self.server.bytes_per_second:
                time.sleep(len(block) / self.server.bytes_per_second)
        if end < len(data):
            self.close_connection = True
            self.connection.close()
        return None


def _is_large(name: str) -> bool:
    return any(fnmatch.fnmatch(name, kind) for kind in LARGE_FILES)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
