"""Files that are either the old or the new version, whatever happens while they are written.

bytes -> temporary sibling -> fsync -> rename over the target -> fsync of the folder
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from pathlib import Path

from igrpo_nemo.errors import UserError

_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}


def fsync_file(path: Path) -> None:
    """Push one file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Push a folder's entries (names, renames) to the disk, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a folder; the rename is still atomic.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data` (text as UTF-8): a reader, or a crash, sees the old or the new.

    Several processes may write one file at once, on one machine or on several: one of them wins.
    Raises OSError as the file system does; the old content is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_or_refuse(path: Path, data: bytes | str) -> None:
    """`write_atomic` into a folder that is made if need be, for a file that the user asked for.

    Raises UserError, which names the file, where the file system refuses, and for a device or a
    pipe, whose place a file would take.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is no regular file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def check_folder(folder: Path, remedy: str) -> None:
    """Makes a folder and writes to it, before the work whose result it is to take.

    Raises UserError with `remedy`, what else works, where the file system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b" ")
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror or error}; {remedy}"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, says that a disk or a quota is full.

    Writers in native code (safetensors, torch's zip writer) keep the errno only in the text or in
    the exception they chain to, hence the walk.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL_ERRNOS:
            return True
        text = str(error)
        if any(os.strerror(number) in text for number in _FULL_ERRNOS):
            return True
        error = error.__cause__ or error.__context__
    return False
