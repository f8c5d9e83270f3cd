"""Downloading over HTTP: resumed where it broke off, complete or not there at all."""

import errno
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

N_ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0
"""Pause before the second attempt; each further one is twice as long."""
TIMEOUT_SECONDS = 60.0
BLOCK_BYTES = 1 << 18
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}


def download_file(url: str, path: Path, access_token: str | None = None) -> Path:
    """Fetch `url` into `path`, unless it is there; returns `path`.

    The bytes go to `<path>.part`, which gets its name when it is complete. A later call goes on from there.

    Args:
        url: Address.
        path: File to make, with its folder.
        access_token: Shown to the server of `url`, but not to one that it redirects to.

    Raises:
        ConnectionError: The server refuses, or the transfer fails again and again; names the URL and the reason.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    for attempt in range(N_ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            fetch_rest(url, part, access_token)
        except urllib.error.HTTPError as error:
            reason = f"status {error.code} {error.reason}"
            if error.code == 416 and part.exists():  # nothing is left to send: all has come, or the file is another one
                if error.headers.get("Content-Range", "").endswith(f"/{part.stat().st_size}"):
                    os.replace(part, path)
                    return path
                part.unlink()
            elif error.code not in TRANSIENT_STATUS:
                break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(f"disk full while writing {part}: free some space and start again") from error
            raise
        else:
            os.replace(part, path)
            return path
    raise ConnectionError(f"cannot download {url}: {reason}; check the address and the connection, then start again")


def fetch_rest(url: str, part: Path, access_token: str | None = None) -> None:
    """Append to `part` what is missing of `url`.

    Raises:
        ConnectionError: The connection ended before all bytes had come; those that came are kept.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "litgpt", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    if access_token:
        request.add_unredirected_header("Authorization", f"Bearer {access_token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        if answer.status != 206:  # the server sends the whole file again
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, leave=False, delay=1) as bar,
        ):
            while block := answer.read(BLOCK_BYTES):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and (size := part.stat().st_size) != total:
        raise ConnectionError(f"the connection ended after {size:,} of {total:,} bytes")


def unpack_tar(archive: Path, folder: Path) -> Path:
    """Unpack `archive` into a new `folder`, all of it or nothing; members that point outside are refused.

    Raises:
        ValueError: The archive is damaged or tries to write elsewhere.
    """
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        os.replace(temporary, folder)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot unpack {archive} ({error}): delete it, then start again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
