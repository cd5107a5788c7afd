"""Files that stay as they are while they are held, so that their numbers can be read at any time.

An open file survives its removal and its replacement by another one. What it does not survive is a
program that writes into it. So a file is held by a lease (``fcntl(2)``, ``F_SETLEASE``), which
Linux gives to the owner of a file that nobody writes: a program that opens the file for writing
then waits until the lease is returned, up to 45 seconds. A thread looks for such programs. If one
waits, it copies the numbers that are in use, and returns the lease.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Protocol

from klora_runtime.artifact.safetensors_file import SafetensorsFile
from klora_runtime.errors import FileFormatError, InUseError, shown

#: Seconds between two questions whether a program waits for a file.
_INTERVAL = 2.0

#: Seconds that a program must wait at least, so that there is time to copy.
_LEAST_WAIT = 20

#: How many parts of a file's state only a write changes; its rights and names change the others.
_WRITTEN = 2

_BREAK_TIME = Path("/proc/sys/fs/lease-break-time")


class HeldFile:
    """An open safetensors file; see :class:`HeldFiles`.

    Raises:
        FileFormatError: the file is not safetensors, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._file = SafetensorsFile(path, "checkpoint")
        self.path = path
        self.tensors = self._file.tensors
        self.is_held = False
        self._before = self._state()

    def hold(self) -> bool:
        """Keep others from writing; False if the system cannot, or the file changed since it was
        opened."""
        if not self.is_held:
            self.is_held = _take_lease(self._file.fileno())
        return self.is_held and self._state() == self._before

    def let_go(self) -> None:
        """Let others write."""
        if self.is_held:
            self.is_held = False
            _return_lease(self._file.fileno())

    def check(self) -> None:
        """Compare the file with what it was.

        Raises:
            InUseError: the file changed since it was opened.
        """
        if self._state()[:_WRITTEN] != self._before[:_WRITTEN]:
            raise self._lost()

    def is_wanted(self) -> bool:
        """Return whether a program waits to write, or the system took the lease away."""
        return self.is_held and not _has_lease(self._file.fileno())

    def read_into(self, memory: memoryview, name: str) -> None:
        """Fill ``memory`` with the bytes of a tensor.

        Raises:
            InUseError: the file changed since it was opened.
        """
        try:
            self._file.read_at(memory, self.tensors[name].start)
        except FileFormatError as error:
            raise self._lost() from error
        self.check()

    def close(self) -> None:
        """Close the file, which returns the lease."""
        self.is_held = False
        self._file.close()

    def _state(self) -> tuple[int, ...]:
        """Return size and time of the last write, then what else tells the file."""
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev

    def _lost(self) -> InUseError:
        return InUseError(
            f"{shown(self.path)} was changed while a fusion was merged into the weights that were "
            "loaded from it, so their base values are lost. Load the model again, and pass no base."
        )


class Reader(Protocol):
    """What reads from a held file."""

    @property
    def file(self) -> HeldFile:
        """The file."""

    def copy(self) -> None:
        """Copy what is needed of the file, which is given up."""


class HeldFiles:
    """The held files of one model, and the thread that watches them.

    Attributes:
        lock: held while a file is read or given up.
        resting: whether nothing is read for now, so that the files may change.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.resting = False
        self._files: dict[Path, HeldFile | str] = {}
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._stop = Event()

    def open(self, path: Path) -> HeldFile | str:
        """Return a held file, or why it cannot be one."""
        with self.lock:
            if path not in self._files:
                self._files[path] = self._opened(path)
            return self._files[path]

    def add(self, reader: Reader) -> None:
        """Tell a reader when its file is wanted."""
        self._readers.add(reader)

    def check(self) -> None:
        """Check each held file; give up those that other programs wait for.

        Raises:
            InUseError: a file was changed.
        """
        with self.lock:
            for file in self._open():
                if file.is_wanted():
                    for reader in list(self._readers):
                        if reader.file is file:
                            reader.copy()
                    file.let_go()
                elif file.is_held:
                    file.check()

    def rest(self) -> None:
        """Let the files change: nothing is read before :meth:`resume`."""
        with self.lock:
            self.resting = True
            for file in self._open():
                file.let_go()

    def resume(self) -> list[Reader]:
        """Hold the files again; return the readers of files that changed or cannot be held."""
        with self.lock:
            self.resting = False
            changed = {file for file in self._open() if not file.hold()}
            for file in changed:
                file.let_go()
            return [reader for reader in self._readers if reader.file in changed]

    def close(self) -> None:
        """Close all files, and end the thread."""
        self._stop.set()
        with self.lock:
            for file in self._open():
                file.close()
            self._files.clear()

    def _opened(self, path: Path) -> HeldFile | str:
        try:
            file = HeldFile(path)
        except FileFormatError as error:
            return str(error)
        if not file.hold():
            file.close()
            return f"the system does not keep others from writing to {shown(path)}"
        if not any(self._open()):
            Thread(
                target=_watch, args=(weakref.ref(self), self._stop), name="klora-base", daemon=True
            ).start()
        return file

    def _open(self) -> Iterator[HeldFile]:
        return (file for file in self._files.values() if isinstance(file, HeldFile))


def _watch(files: weakref.ref[HeldFiles], stop: Event) -> None:
    """Give up wanted files until nothing refers to them."""
    while not stop.wait(_INTERVAL):
        held = files()
        if held is None:
            return
        with suppress(InUseError, MemoryError, OSError):  # the check before the next run says so
            held.check()
        del held


if sys.platform == "linux":
    import fcntl
    import signal

    def _take_lease(file: int) -> bool:
        try:
            if int(_BREAK_TIME.read_text(encoding="ascii")) < _LEAST_WAIT:
                return False
            fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # the default one ends the process
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETOWN, 0)  # from now on, no signal at all
        except (OSError, ValueError):  # not the owner, a network's file, or somebody writes now
            return False
        return True

    def _has_lease(file: int) -> bool:
        return fcntl.fcntl(file, fcntl.F_GETLEASE) == fcntl.F_RDLCK

    def _return_lease(file: int) -> None:
        with suppress(OSError):  # the system took it away before
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)

else:

    def _take_lease(file: int) -> bool:
        return False

    def _has_lease(file: int) -> bool:
        return False

    def _return_lease(file: int) -> None:
        pass
