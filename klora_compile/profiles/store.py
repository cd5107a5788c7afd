"""A store: a folder of profiles, or the cache that ``klora compile`` keeps for its user.

    STORE/statistics/KEY.safetensors    sums and norms of the layers of one LoRA
    STORE/profiles/KEY.safetensors      one LoRA: its file, its layers, its statistics' key
    STORE/quarantine/KEY.json           a LoRA that cannot be profiled, and why

A key is a digest of everything that the content depends on, and in the quarantine of the LoRA's
path, which may hold another file the next time. Files are written beside and renamed,
so any number of processes may use one store, and one that dies leaves nothing half-written. What is
damaged is reported once and measured again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from klora_compile.measuring.statistics import Statistics
from klora_compile.profiles.numbers_file import Rows, read_numbers, write_numbers
from klora_compile.profiles.profile import Profile, profile_of, written
from klora_runtime.artifact.replacing import replacing
from klora_runtime.errors import FileFormatError, KloraError, shown

#: Environment variable with the folder, instead of the system's cache folder.
FOLDER_VARIABLE = "KLORA_CACHE"

#: Bytes that the statistics in the user's cache may take; the longest unused ones go first.
CACHE_BYTES = 2**30

_STATISTICS, _PROFILES, _QUARANTINE = FOLDERS = ("statistics", "profiles", "quarantine")
_FILE = re.compile(r"[0-9a-f]{64}\.(safetensors|json)")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quarantined:
    """A LoRA that could not be profiled."""

    path: str
    reason: str


@dataclass(frozen=True)
class Contents:
    """How much a store holds."""

    files: Mapping[str, int]
    """Folder -> number of files."""
    nbytes: int


def cache_folder() -> Path | None:
    """Return the folder of the user's cache: ``$KLORA_CACHE``, or in the system's cache folder.

    Returns:
        The folder, which is created; None if it cannot be.
    """
    own = os.environ.get(FOLDER_VARIABLE)
    try:
        folder = Path(own) if own else user_cache_path("klora", appauthor=False)
        if not own and not folder.is_absolute():
            return None  # some versions of platformdirs keep the ~ of a user without a home
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder


class Store:
    """A folder of profiles and statistics.

    A problem with the folder never fails a reader: what cannot be read is measured again.

    Args:
        folder: the folder, which is created when something is kept.
        limit: bytes of statistics that may stay; None for all.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        self.folder = folder
        self._limit = limit
        self._is_damaged = False

    def statistics(self, key: str) -> list[Statistics] | None:
        """Return the statistics of some layers; None if they are missing or damaged."""
        path = self._path(_STATISTICS, key)
        try:
            _, arrays = read_numbers(path)
            found = list(_statistics(arrays["numbers"], arrays["k"]))
        except FileNotFoundError:
            return None
        except (FileFormatError, KeyError, ValueError, OSError):
            self._warn(path)
            return None
        if self._limit is not None:
            _touch(path)
        return found

    def keep_statistics(self, key: str, statistics: Sequence[Statistics]) -> None:
        """Keep the statistics of some layers.

        Raises:
            KloraError: they cannot be written.
        """
        known = self.statistics(key)  # another process may have kept other sums
        if known is not None and len(known) == len(statistics):
            statistics = [
                replace(new, top_k={**old.top_k, **new.top_k})
                for old, new in zip(known, statistics, strict=True)
            ]
        most = max((len(each.top_k) for each in statistics), default=0)
        ks = [sorted(each.top_k) + [0] * (most - len(each.top_k)) for each in statistics]
        numbers = [
            (each.l1, each.frobenius, *(each.top_k.get(k, 0.0) for k in own))
            for each, own in zip(statistics, ks, strict=True)
        ]
        arrays = {"numbers": Rows("F64", numbers), "k": Rows("I64", ks)}
        write_numbers(self._made(_STATISTICS, key), {"what": "statistics"}, arrays)
        if self._limit is not None:
            self._shrink(self._limit)

    def profile(self, key: str) -> Profile | None:
        """Return a profile; None if it is missing or damaged."""
        path = self._path(_PROFILES, key)
        try:
            return profile_of(key, *read_numbers(path))
        except FileNotFoundError:
            return None
        except (FileFormatError, KeyError, ValueError, TypeError, OSError):
            self._warn(path)
            return None

    def keep_profile(self, profile: Profile) -> None:
        """Keep a profile.

        Raises:
            KloraError: it cannot be written.
        """
        facts, norms = written(profile)
        arrays = {"norms": Rows("F64", [norms])}
        write_numbers(self._made(_PROFILES, profile.key), facts, arrays)

    def profiles(self) -> Iterator[Profile]:
        """Yield every profile that can be read, in the order of their keys."""
        for path in self._files(_PROFILES):
            found = self.profile(path.stem)
            if found is not None:
                yield found

    def quarantine(self, path: str, reason: str) -> None:
        """Keep why the LoRA at a path cannot be profiled.

        Raises:
            KloraError: it cannot be written.
        """
        place = self._made(_QUARANTINE, _key(path), "json")
        with replacing(place, overwrite=True) as new:
            new.write_text(json.dumps({"path": path, "reason": reason}), encoding="utf-8")

    def release(self, path: str) -> None:
        """Forget why the LoRA at a path could not be profiled."""
        self._path(_QUARANTINE, _key(path), "json").unlink(missing_ok=True)

    def quarantined(self) -> Iterator[Quarantined]:
        """Yield each LoRA that could not be profiled."""
        for path in self._files(_QUARANTINE):
            try:
                stated = json.loads(path.read_text(encoding="utf-8"))
                yield Quarantined(str(stated["path"]), str(stated["reason"]))
            except (OSError, ValueError, KeyError, TypeError):
                self._warn(path)

    def contents(self) -> Contents:
        """Return how much the store holds."""
        files = {name: list(self._files(name)) for name in FOLDERS}
        sizes = (_size(path) for own in files.values() for path in own)
        return Contents({name: len(own) for name, own in files.items()}, sum(sizes))

    def clear(self) -> Contents:
        """Delete everything that klora keeps there; return what it was.

        Raises:
            KloraError: a file cannot be deleted.
        """
        found = self.contents()
        for path in [each for name in FOLDERS for each in self._files(name)]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise KloraError(f"{shown(path)} cannot be deleted: {error.strerror}.") from error
        return found

    def _path(self, folder: str, key: str, suffix: str = "safetensors") -> Path:
        return self.folder / folder / f"{key}.{suffix}"

    def _made(self, folder: str, key: str, suffix: str = "safetensors") -> Path:
        """Return a path whose folder exists."""
        place = self._path(folder, key, suffix)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KloraError(
                f"the store {shown(self.folder)} cannot be written: {error.strerror}. Name another "
                "folder."
            ) from error
        return place

    def _files(self, folder: str) -> Iterator[Path]:
        place = self.folder / folder
        try:
            names = sorted(name for name in os.listdir(place) if _FILE.fullmatch(name))
        except OSError:
            return
        yield from (place / name for name in names)

    def _shrink(self, limit: int) -> None:
        """Delete the longest unused statistics until the others fit into the limit."""
        files = sorted(self._files(_STATISTICS), key=_used)
        total = sum(map(_size, files))
        for path in files[:-1]:
            if total <= limit:
                return
            total -= _size(path)
            try:
                path.unlink(missing_ok=True)
            except OSError:
                return

    def _warn(self, path: Path) -> None:
        if not self._is_damaged:
            _LOG.warning(
                "%s is damaged, so its LoRA is measured again.",
                shown(path.relative_to(self.folder)),
            )
        self._is_damaged = True


def _statistics(numbers: Sequence[Any], ks: Sequence[Any]) -> Iterator[Statistics]:
    for (l1, frobenius, *sums), own in zip(numbers, ks, strict=True):
        top_k = {k: value for k, value in zip(own, sums, strict=True) if k}
        if not all(0.0 <= value < float("inf") for value in (l1, frobenius, *top_k.values())):
            raise ValueError("no norms")
        yield Statistics(l1, top_k, frobenius)


def _key(path: str) -> str:
    return hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:
        return


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
