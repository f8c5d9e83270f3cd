"""Writing files and folders so that a kill, a full disk or a power cut leaves what stood there before.

A temporary name in the same folder, fsync, and a rename: from another file system the last step would be a copy, and a
kill during the copy would leave a fragment in place of the good checkpoint.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")


@contextlib.contextmanager
def atomic_file(path: Path | str, n_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path`, whole and on the disk, when the block succeeds.

    Args:
        path: May exist.
        n_bytes: How much will be written, for the error message.

    Raises:
        OSError: The disk is full or not writable; what stood at `path` before is untouched.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync(path.parent)
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__  # torch's writer wraps what the file raised
        if cause is None:
            raise
        raise _write_error(path, cause, n_bytes) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(target: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place, whole and on the disk, when the block succeeds.

    After an exception or a kill, `target` is what it was before. Missing parents are made.
    """
    target = Path(target)
    temporary = _temporary(target)
    try:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            raise _write_error(target, error) from error
        yield temporary
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Bring all of `folder` to the disk, then give it the name of its neighbour `target` in one step.

    An existing `target` is gone afterwards; where the kernel can, the two are exchanged and `folder` is what it was.
    """
    try:
        for name, _, files in os.walk(folder, topdown=False):
            for file in files:
                _fsync(Path(name, file))
            _fsync(Path(name))
        _put_in_place(folder, target)
    except OSError as error:
        raise _write_error(target, error) from error


def check_disk_space(path: Path | str, n_bytes: int) -> None:
    """Raise an `OSError` that names both numbers if `n_bytes` do not fit beside `path`."""
    path = Path(path)
    parent = next((folder for folder in path.absolute().parents if folder.is_dir()), path.parent)
    if n_bytes > shutil.disk_usage(parent).free:
        raise _write_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), n_bytes)


def remove_leftovers(out_dir: Path | str) -> list[Path]:
    """Remove temporary files and folders of dead processes from `out_dir`; called before this process saves anything.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(Path(out_dir).glob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or _is_running(int(match["pid"])):
            continue
        if match["kind"] == "old" and not (whole := path.with_name(match["name"])).exists():
            path.rename(whole)  # killed between the two renames of `_put_in_place`
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path)
    return removed


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; an existing target is exchanged in one step where the kernel can."""
    if not target.is_dir():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        os.rename(target, old)
        os.rename(folder, target)
        shutil.rmtree(old)
    _fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False  # no Linux, or a C library without it
    at_cwd, rename_exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) == 0


def _fsync(path: Path) -> None:
    if os.name != "posix":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a container gives every run the same number
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _write_error(path: Path, cause: OSError, n_bytes: int | None = None) -> OSError:
    sizes = [] if n_bytes is None else [f"{n_bytes:,} bytes to write"]
    with contextlib.suppress(OSError):
        sizes.append(f"{shutil.disk_usage(path.parent).free:,} bytes free")
    where = f" ({', '.join(sizes)})" if sizes else ""
    path = Path(*(match["name"] if (match := _LEFTOVER.fullmatch(part)) else part for part in path.parts))
    return OSError(cause.errno or errno.EIO, f"cannot write {path}: {cause.strerror or cause}{where}")
