"""A web server on this machine for data sets: plain files, and the part of the hub's API that lists data sets."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Server(ThreadingHTTPServer):
    """Serves `files`, and breaks the connection where one is None. With `token`, that must be shown.

    `requests` has the paths asked for and the tokens shown.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes | None], token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.token = files, token
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path, files = unquote(self.path.partition("?")[0]), self.server.files
        shown = self.headers.get("Authorization")
        self.server.requests.append((path, shown))
        if self.server.token and shown != f"Bearer {self.server.token}":
            return self._answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if path.startswith("/api/datasets/"):
            repo = path.removeprefix("/api/datasets/").partition("/revision/")[0]
            prefix = f"/datasets/{repo}/resolve/c0ffee/"
            names = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
            if not names:
                return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": name} for name in names]
            return self._answer(200, json.dumps({"id": repo, "sha": "c0ffee", "siblings": siblings}).encode())
        if path in files and files[path] is None:
            return self.connection.close()
        return self._answer(200, files[path]) if path in files else self._answer(404, b"none")

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def running_server(files: dict[str, bytes], token: str | None = None) -> Iterator[Server]:
    """A server with `files` by path."""
    server = Server(files, token)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def repo_files(repo: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The paths under which a hub has the files of a data set."""
    return {f"/datasets/{repo}/resolve/c0ffee/{name}": content for name, content in files.items()}
