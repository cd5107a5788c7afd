"""A folder that takes its place whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from klora_runtime.errors import KloraError, shown


@contextmanager
def replacing_folder(path: Path, ours: Callable[[str], bool]) -> Iterator[Path]:
    """A new folder beside ``path`` that takes its place where the block ends.

    Args:
        path: the folder; one that is there already is replaced.
        ours: whether a file of that name may be replaced.

    Raises:
        KloraError: it cannot be written, or the old one holds something else; it is as it was.
    """
    place = Path(os.path.realpath(path))  # a link stays, what it leads to is replaced
    check_replaceable(place, ours)
    new = place.with_name(f".klora-{secrets.token_hex(8)}")
    try:
        new.mkdir()
        yield new
        for file in new.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _take_place(new, place)
    except OSError as error:
        why = shown(error.strerror or error)
        raise KloraError(f"{shown(path)} cannot be written: {why}.") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(new)


def _take_place(new: Path, place: Path) -> None:
    if not place.exists():
        new.rename(place)
        return
    old = place.with_name(f".klora-{secrets.token_hex(8)}")
    place.rename(old)
    try:
        new.rename(place)
    except BaseException:
        old.rename(place)
        raise
    with suppress(OSError):
        shutil.rmtree(old)


def check_replaceable(place: Path, ours: Callable[[str], bool]) -> None:
    """See that all that is in a folder was written by an export.

    Raises:
        KloraError: something else is, or ``place`` is no folder.
    """
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise KloraError(f"{shown(place)} is not a folder; name another.")
    foreign = sorted(
        each.name for each in place.iterdir() if not (each.is_file() and ours(each.name))
    )
    if foreign:
        raise KloraError(
            f"{shown(place)} holds what klora export did not write, and is not replaced; name "
            "another folder.",
            map(shown, foreign),
        )
