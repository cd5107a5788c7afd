"""Atomic replacement of files and folders.

The new file is written beside the old one and then renamed. A process that dies half-way leaves
the old file unchanged and a temporary file beside it, which the next write to that folder removes.
A writer holds a lock on its temporary file, so other processes know whether the writer is alive.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from klora_runtime.errors import KloraError, shown

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\.klora-[0-9a-f]{16}\.tmp(\.\w{1,15})?")
_SHORT_SUFFIX = re.compile(r"\.\w{1,15}")

#: Seconds after which a temporary file counts as abandoned on file systems without locks.
_ABANDONED = 24 * 60 * 60.0

#: Errors of renaming a folder onto an existing one.
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)

#: Returns whether a folder that is replaced may contain a file of this name.
Ours = Callable[[str], bool]


@contextmanager
def replacing(
    path: Path,
    *,
    overwrite: bool,
    folder_of: Ours | None = None,
    error: type[KloraError] = KloraError,
) -> Iterator[Path]:
    """Give the block a new file, with the suffix of ``path``, that then replaces ``path``.

    If the block fails, or the process dies in it, ``path`` is unchanged. If two processes write the
    same path without ``overwrite``, one of them gets the error.

    Args:
        path: the file. A symbolic link stays; the file that it points to is replaced.
        overwrite: replace an existing file.
        folder_of: write a folder instead of a file. An existing folder is replaced only if this
            function accepts the names of all its files.
        error: class of the error that is raised.

    Raises:
        KloraError: ``path`` exists and ``overwrite`` is false, is something other than a file (or
            folder) that may be replaced, or cannot be written.
    """
    place = _place(path, overwrite=overwrite, folder_of=folder_of, error=error)
    try:
        _remove_abandoned(place.parent)
        with _temporary(place, folder=folder_of is not None) as new:
            yield new
            for file in [new] if folder_of is None else new.iterdir():
                with file.open("rb+") as written:
                    os.fsync(written.fileno())
            put = _put_file if folder_of is None else _put_folder
            try:
                put(new, place, overwrite=overwrite)
            except FileExistsError as problem:
                raise error(_exists(path)) from problem
    except OSError as problem:
        raise error(_unwritable(path, problem)) from problem


def check_place(path: Path, *, overwrite: bool, folder_of: Ours | None = None) -> None:
    """Check, before the work whose result goes there, that :func:`replacing` can begin.

    Raises:
        KloraError: see :func:`replacing`.
    """
    place = _place(path, overwrite=overwrite, folder_of=folder_of, error=KloraError)
    try:
        with _temporary(place, folder=folder_of is not None):
            pass
    except OSError as problem:
        raise KloraError(_unwritable(path, problem)) from problem


def wrong_kind(path: Path, *, folder: bool) -> str | None:
    """Return an error text if ``path`` is something that no file (or folder) can replace."""
    if not os.path.exists(path) or (os.path.isdir(path) if folder else os.path.isfile(path)):
        return None
    return f"{shown(path)} is not a {'folder' if folder else 'regular file'}; name another."


def _place(path: Path, *, overwrite: bool, folder_of: Ours | None, error: type[KloraError]) -> Path:
    """Return the target of the write, links resolved; refuse one that cannot be replaced."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise error(_unwritable(path, problem)) from problem
    else:
        if not overwrite:
            raise error(_exists(path))
    place = Path(os.path.realpath(path))
    if obstacle := wrong_kind(path, folder=folder_of is not None):
        raise error(obstacle)
    if folder_of is not None and place.is_dir():
        strange = [
            each.name for each in place.iterdir() if not (each.is_file() and folder_of(each.name))
        ]
        if strange:
            raise error(
                f"{shown(path)} holds files that klora did not write; name another folder.",
                map(shown, sorted(strange)),
            )
    return place


@contextmanager
def _temporary(place: Path, *, folder: bool) -> Iterator[Path]:
    """Give the block a new, empty file or folder; remove it afterwards unless it was renamed."""
    new, lock = _begin(place, folder=folder)
    try:
        yield new
    finally:
        _remove(new)
        if lock is not None:
            os.close(lock)


def _begin(place: Path, *, folder: bool) -> tuple[Path, int | None]:
    """Return a new file or folder and the handle that locks it; None if there are no locks."""
    while True:
        new = _beside(place, "tmp", "" if folder else place.suffix)
        if folder:
            new.mkdir()
        else:
            new.touch(exist_ok=False)
        if sys.platform == "win32":
            return new, None  # Windows cannot rename a file that is open
        with suppress(FileNotFoundError):  # another process took it for abandoned, see _is_locked
            lock = os.open(new, os.O_RDONLY)
            if _is_locked(lock, new):
                return new, lock
            os.close(lock)


def _is_locked(lock: int, new: Path) -> bool:
    """Lock a new file; return False if another process took it for abandoned before that."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock), os.stat(new))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True  # a file system without locks


def _beside(place: Path, kind: str, suffix: str = "") -> Path:
    """Return a temporary name with a given suffix; libraries choose a picture's format by it."""
    kept = suffix if _SHORT_SUFFIX.fullmatch(suffix) else ""
    return place.with_name(f".klora-{secrets.token_hex(8)}.{kind}{kept}")


def _put_file(new: Path, place: Path, *, overwrite: bool) -> None:
    """Rename a file.

    Raises:
        FileExistsError: ``overwrite`` is false and another process was first.
    """
    if overwrite:
        new.replace(place)
        return
    try:
        os.link(new, place)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            new.replace(place)
        except BaseException:
            place.unlink(missing_ok=True)
            raise


def _put_folder(new: Path, place: Path, *, overwrite: bool) -> None:
    """Rename a folder; an old one is moved aside first.

    Raises:
        FileExistsError: ``overwrite`` is false and another process was first.
    """
    old = None
    if overwrite and place.exists():
        old = _beside(place, "old")  # not a temporary name, so no other process removes it
        place.rename(old)
    try:
        new.rename(place)
    except BaseException as problem:
        if old is not None:
            old.rename(place)
        if isinstance(problem, OSError) and problem.errno in _TAKEN:
            raise FileExistsError(problem.errno, problem.strerror) from problem
        raise
    if old is not None:
        with suppress(OSError):
            _remove(old.rename(_beside(place, "tmp")))


def _remove_abandoned(folder: Path) -> None:
    """Remove the temporary files that killed writers left in a folder."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    _remove_if_abandoned(folder / name)


def _remove_if_abandoned(path: Path) -> None:
    facts = os.lstat(path)
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        return
    is_old = time.time() - facts.st_mtime > _ABANDONED
    if sys.platform == "win32":
        if is_old:
            _remove(path)
        return
    if facts.st_uid != os.getuid():
        return
    lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)  # while it is locked, so that no writer can start to use it
    except BlockingIOError:
        pass  # its writer is alive
    except OSError:  # a file system without locks
        if is_old:
            _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _exists(path: Path) -> str:
    return f"{shown(path)} exists already; add --force (overwrite=True in Python) to replace it."


def _unwritable(path: Path, problem: OSError) -> str:
    if problem.errno == errno.ENAMETOOLONG:
        size, most = len(os.fsencode(path.name)), _longest_name(path)
        if size > most:
            return (
                f"{shown(path)} cannot be written: its name takes {size} bytes, more than the "
                f"{most} allowed. Name a shorter one."
            )
    return f"{shown(path)} cannot be written: {shown(problem.strerror or problem)}."


def _longest_name(path: Path) -> int:
    """Return the longest name that this folder allows, in bytes."""
    try:
        return os.pathconf(path.absolute().parent, "PC_NAME_MAX")
    except (OSError, AttributeError):
        return 255
