"""Files and folders on disk that are always whole: written beside their place, synchronised, then moved into it.

A process may be killed, or the machine lose power, at any moment: what stands under a name is then the earlier content
or the later one, never half of either, and never nothing where there was something.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from grade.errors import GradeError, writing


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, has reached the disk.

    Raises:
        OSError: it did not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_bytes(path: Path, content: bytes) -> None:
    """Give a file another content, as a whole.

    Raises:
        OSError: the disk is full, or the file cannot be written; it then holds what it held.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_bytes(content)
        sync(fresh)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`, in UTF-8; half of a surrogate pair is written as its escape."""
    replace_bytes(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def replaced_folder(folder: Path, place: Callable[[Path], Path | None] = lambda old: None) -> Iterator[Path]:
    """Write a folder anew as a whole: yields an empty folder to fill, which takes the place of `folder` at the end.

    At every moment `folder` or its old copy is complete, if there ever was one (see `latest`). One process at a time
    may do so: its callers hold a lock.

    Args:
        place: given an old copy, where it goes once it is replaced, over what may stand there; None: it is deleted.

    Raises:
        OSError: it cannot be written; what was there before is untouched, or, if only the disk's word that it is done
            is missing, replaced.
    """
    fresh, old = folder.with_name(folder.name + ".new"), old_copy(folder)
    _remove(fresh)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        _share(fresh)
        for path in [*fresh.rglob("*"), fresh]:
            sync(path)
        if folder.exists():  # only then is the old copy one too many; else it is the only one there is
            _put_away(old, place)
            folder.rename(old)
        fresh.rename(folder)
        sync(folder.parent)
    except BaseException:
        _remove(fresh)
        if not folder.exists() and old.exists():
            old.rename(folder)
        raise
    _put_away(old, place)


def _put_away(old: Path, place: Callable[[Path], Path | None]) -> None:
    """Move an old copy to where it is kept, or delete it; a link is never kept."""
    kept = place(old) if old.is_dir() and not old.is_symlink() else None
    if kept is None:
        _remove(old)
        return
    delete_folder(kept)
    old.rename(kept)
    sync(kept.parent)


def delete_folder(path: Path) -> None:
    """Delete a folder, if it is there, so that no moment leaves a part of it under its name: what a kill leaves is
    named as a folder that is still being written.

    Raises:
        OSError: it cannot be renamed.
    """
    if not os.path.lexists(path):
        return
    doomed = path.with_name(path.name + ".new")
    _remove(doomed)
    path.rename(doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Delete a folder with all that is in it; of a link, the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _share(folder: Path) -> None:
    """Give a folder's files the permissions that the user's umask gives to new files: some libraries write theirs
    as private temporary files."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def old_copy(folder: Path) -> Path:
    """Where the earlier content of a folder stands while that is replaced."""
    return folder.with_name(folder.name + ".old")


def latest(folder: Path) -> Path:
    """`folder`, or the old copy that an interruption between two renames left in its place."""
    old = old_copy(folder)
    return old if not folder.exists() and old.exists() else folder


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe might never end
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """The same for a large file that nobody is expected to write: read again only where its size or time of change is
    another."""
    status = path.stat()
    return _remembered(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _remembered(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def check_writable(setting: str, folder: Path) -> None:
    """Find out before any work whether `folder` can be made and written; leaves no trace in it.

    Raises:
        GradeError: naming the setting.
    """
    place = folder.absolute()
    while not os.path.lexists(place):  # nothing is made: another process may be about to
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise GradeError(
            f"{setting}: {folder} cannot be written ({error.strerror or error}). Name another folder."
        ) from error


@contextmanager
def locked(path: Path, setting: str, in_use: str, *, wait: Callable[[], None] | None = None) -> Iterator[int]:
    """Hold a lock while the block runs; the system releases it when the process ends, however that happens.

    Args:
        path: the file that is locked; made if it is missing, and left.
        setting: what decides the place, for the message.
        in_use: the message where another process holds the lock.
        wait: wait for the other process instead, after calling this.

    Yields:
        The lock's file descriptor, which a child process may inherit to hold it too.

    Raises:
        GradeError: it is held elsewhere, cannot be made, or the file system has no locks.
    """
    with writing(path, setting):
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                raise GradeError(in_use) from None
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            reason = f"cannot be locked ({error.strerror})"
            raise GradeError(f"{setting}: {path.parent} {reason}. Name a folder on another disk.") from error
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise GradeError(in_use)  # its holder has deleted it meanwhile: what is locked is no longer that file
        yield file.fileno()
