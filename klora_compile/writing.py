"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from klora_runtime.errors import KloraError, shown


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, of the same ending, that takes its place where the block ends.

    Raises:
        KloraError: it cannot be written; an old file is as it was.
    """
    place = Path(os.path.realpath(path))  # a link stays, what it leads to is replaced
    temporary = _beside(place)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(place)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """See that :func:`replacing` can begin.

    Raises:
        KloraError: it cannot.
    """
    temporary = _beside(Path(os.path.realpath(path)))
    try:
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _beside(place: Path) -> Path:
    return place.with_name(f".klora-{secrets.token_hex(8)}{place.suffix}")


def _unwritable(path: Path, error: OSError) -> KloraError:
    return KloraError(f"{shown(path)} cannot be written: {shown(error.strerror or error)}.")
