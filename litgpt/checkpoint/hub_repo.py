"""A model repo on the Hugging Face hub: what it holds, and its files, resumed where they broke off and verified.

The requests go through the session of `huggingface_hub`, which knows proxies, mirrors and logins. Its own transfer is
not used: it begins a file anew after a kill, and takes what came for what was sent.
"""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from litgpt.checkpoint.hub_session import AGAIN, TIMEOUT_SECONDS, HubSession, hub_endpoint, import_hub

BLOCK_BYTES = 1 << 20
N_PARALLEL = 4
MAX_HTTP_BYTES = 50 * 10**9
"""The hub sends larger files only by Xet, a protocol that `huggingface_hub` knows."""

_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*", re.ASCII)


def is_repo_id(text: str) -> bool:
    """Whether `text` could be `org/name` or `name` on the hub; if so, it is a harmless relative path too."""
    return bool(_REPO_ID.fullmatch(text)) and ".." not in text and "--" not in text and len(text) <= 96


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repo, as the hub describes it."""

    name: str
    size: int | None
    sha256: str | None
    """Of large files."""
    blob_id: str | None
    """Of small files: the SHA-1 by which git knows them."""

    def is_intact(self, path: Path) -> bool:
        """Whether `path` holds exactly the bytes that the hub describes."""
        if not path.is_file() or (self.size is not None and path.stat().st_size != self.size):
            return False
        if not (self.sha256 or self.blob_id):
            return True
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(usedforsecurity=False)
        if not self.sha256:
            digest.update(b"blob %d\0" % path.stat().st_size)
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest() == (self.sha256 or self.blob_id)


class HubRepo:
    """The files of a repo at one commit.

    Raises:
        ValueError: There is no such repo or revision, or it may not be read; in one line.
        ConnectionError: The hub cannot be reached.
    """

    def __init__(self, repo_id: str, access_token: str | None = None, revision: str | None = None) -> None:
        self.repo_id = repo_id
        self.session = HubSession(repo_id, access_token, revision)
        info = self.session.read_info()
        self.commit: str = info.sha
        self.files: dict[str, RemoteFile] = {}
        for sibling in info.siblings or []:
            if _PLAIN_NAME.fullmatch(sibling.rfilename):  # files in folders and hidden ones are of no use here
                sha256 = sibling.lfs.sha256 if sibling.lfs else None
                blob_id = None if sibling.lfs else sibling.blob_id
                self.files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size, sha256, blob_id)

    def check_space(self, names: Iterable[str], folder: Path) -> int:
        """How many bytes of `names` are not in `folder` yet; OSError if the disk has no room for them."""
        lacking = 0
        for file in (self.files[name] for name in names):
            there = (path for path in (folder / file.name, self._part(file, folder)) if path.is_file())
            lacking += max(0, (file.size or 0) - max((path.stat().st_size for path in there), default=0))
        free = shutil.disk_usage(folder).free
        if lacking > free:
            raise OSError(
                f"{self.repo_id} needs {lacking:,} bytes more in {folder.parent}, and the disk has {free:,} free: make "
                "room, or choose another --checkpoint_dir"
            )
        return lacking

    def download(self, names: Iterable[str], folder: Path, show_progress: bool = False) -> None:
        """Bring `names` into `folder`; what is there and intact stays, what is there in part is completed.

        A file has its name only when its size and its hash are right.
        """
        files, lock = [self.files[name] for name in names], threading.Lock()
        total = sum(file.size or 0 for file in files)
        with (
            tqdm(total=total, desc=self.repo_id, unit="B", unit_scale=True, disable=not show_progress) as bar,
            ThreadPoolExecutor(N_PARALLEL) as pool,
        ):

            def advance(n_bytes: int) -> None:
                with lock:
                    bar.update(n_bytes)

            jobs = [pool.submit(self._fetch, file, folder, advance) for file in files]
            try:
                for job in as_completed(jobs):
                    job.result()
            except BaseException:
                self.session.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _part(self, file: RemoteFile, folder: Path) -> Path:
        """Where the bytes are gathered; another content has another name."""
        return folder / f"{file.name}.{(file.sha256 or file.blob_id or self.commit)[:16]}.part"

    def _fetch(self, file: RemoteFile, folder: Path, advance: Callable[[int], None]) -> None:
        target, part = folder / file.name, self._part(file, folder)
        if file.is_intact(target):
            advance(file.size or 0)
            return
        target.unlink(missing_ok=True)
        advance(_size(part))
        for _ in range(2):
            self.session.patiently(lambda: self._receive(file, part, advance), n_received=lambda: _size(part))
            if file.is_intact(part):
                os.replace(part, target)
                return
            advance(-_size(part))
            part.unlink()
        raise ConnectionError(
            f"{file.name} of {self.repo_id} came twice with another content than {hub_endpoint()} announces "
            f"(sha256 {file.sha256 or 'of git'}, {file.size} bytes): something between alters it; {AGAIN}"
        )

    def _receive(self, file: RemoteFile, part: Path, advance: Callable[[int], None]) -> None:
        """Append to `part` what it lacks."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import get_session, hf_raise_for_status

        have = _size(part)
        if file.size is not None and part.exists() and have >= file.size:
            return
        if (file.size or 0) > MAX_HTTP_BYTES and not constants.HF_HUB_DISABLE_XET:
            self._receive_by_xet(file, part, advance)
            return
        headers = {**self.session.headers, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        url = hf_hub_url(self.repo_id, file.name, revision=self.commit, endpoint=hub_endpoint())
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as answer:
            if answer.status_code == 416 or (have and answer.status_code == 200):  # it cannot go on from there
                advance(-have)
                have = 0
                part.unlink()
            if answer.status_code == 416:
                raise ConnectionError(f"{file.name} is shorter than announced")
            hf_raise_for_status(answer)
            with open(part, "ab") as to:
                for block in answer.iter_bytes():  # as they come, so that a broken connection loses none
                    if self.session.stop.is_set():
                        raise InterruptedError("another file has failed")
                    have += len(block)
                    to.write(block)
                    advance(len(block))
                    if file.size is not None and have > file.size:
                        return  # the hash will tell
        if file.size is not None and have < file.size:
            raise ConnectionError(f"{file.name} broke off after {have:,} of {file.size:,} bytes")

    def _receive_by_xet(self, file: RemoteFile, part: Path, advance: Callable[[int], None]) -> None:
        cache = part.with_name(f"{part.name}.xet")
        path = import_hub().hf_hub_download(
            self.repo_id, file.name, revision=self.commit, local_dir=cache, token=self.session.api.token,
            endpoint=hub_endpoint(),
        )  # fmt: skip
        os.replace(path, part)
        shutil.rmtree(cache)
        advance(_size(part))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
