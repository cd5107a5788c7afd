"""A cache of statistics in one file of the user's cache folder.

A LoRA is measured once: its statistics depend on the partner through K only. The cache keeps, for
each layer, the sums for K = rank times 1, 2, 4, … 256, which suit partners of usual ranks. Each row
has its own digest, so a damaged row is never used. A problem with the file only means that layers
are measured again; a damaged file also gives a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from platformdirs import user_cache_path

from klora_compile.measuring.statistics import MEASURE_VERSION, OnLayer, Statistics
from klora_compile.reading.layers import Layer
from klora_runtime.artifact.tensor_file import identity
from klora_runtime.errors import shown
from klora_runtime.lazy_torch import torch

#: Environment variable with the folder, instead of the system's cache folder.
FOLDER_VARIABLE = "KLORA_CACHE"
_FILE = "statistics.sqlite3"

#: K = a layer's rank times each of these is also measured and kept.
_MULTIPLES = tuple(2**i for i in range(9))

_TABLE = "create table if not exists statistics (key text primary key, numbers text, digest text)"

#: Seconds to wait for another process's lock when opening the file and when writing.
_WAITS = (0.5, 0.5)

#: Errors of sqlite3 for a damaged file; it fails to decode texts even in its own errors.
_ERRORS = (sqlite3.Error, UnicodeError)

_LOG = logging.getLogger(__name__)


def cache_file() -> Path | None:
    """Return the file of statistics, in ``$KLORA_CACHE`` or in the user's cache folder.

    Returns:
        The file, after creating its folder; None if no folder can be created.
    """
    own = os.environ.get(FOLDER_VARIABLE)
    try:
        folder = Path(own) if own else user_cache_path("klora", appauthor=False)
        if not own and not folder.is_absolute():
            return None  # some versions of platformdirs keep the ~ of a user without a home
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder / _FILE


def measure_once(
    layers: Collection[Layer],
    ks: Mapping[str, Sequence[int]],
    *,
    device: str | torch.device,
    file: Path,
    on_layer: OnLayer | None = None,
) -> dict[str, Statistics]:
    """Do as :func:`~klora_compile.measuring.measure.measure`, but look up layers in the cache.

    Args:
        layers: see there.
        ks: see there.
        device: see there; or the name of the host, which needs no torch if all layers are known.
        on_layer: see there.
        file: the file of :func:`cache_file`; it is created if missing. A file that cannot be read
            or written is ignored.
    """
    keys: dict[str, str] = {}
    found: dict[str, Statistics] = {}
    new: dict[str, Statistics] = {}

    def missing(store: _Store, kind: str) -> Iterator[tuple[Layer, tuple[int, ...]]]:
        for layer in layers:
            asked = ks.get(layer.name, ())
            key = keys[layer.name] = _key(layer, kind)
            statistics = store.look_up(key)
            if statistics is None or not set(asked) <= set(statistics.top_k):
                yield layer, _wanted(layer, asked)
            else:
                found[layer.name] = statistics

    def report(layer: Layer) -> None:
        if on_layer is not None:
            on_layer(layer.name, len(found) + len(new), len(layers))

    with closing(_Store(file)) as store:
        tasks = list(missing(store, _kind_of(device)))
        for layer, statistics in measured(tasks, torch.device(device)) if tasks else ():
            new[layer.name] = statistics
            report(layer)
        store.keep({keys[name]: statistics for name, statistics in new.items()})
    results = {}
    for layer in layers:
        statistics = found.get(layer.name) or new[layer.name]
        asked = {k: statistics.top_k[k] for k in ks.get(layer.name, ())}
        results[layer.name] = Statistics(statistics.l1, asked, statistics.frobenius)
    if not new and found:
        report(layer)
    return results


def measured(
    tasks: Iterable[tuple[Layer, tuple[int, ...]]], device: torch.device
) -> Iterator[tuple[Layer, Statistics]]:
    """See :func:`~klora_compile.measuring.measure.measured`, which is imported when it is used."""
    from klora_compile.measuring.measure import measured as yielded

    yield from yielded(tasks, device)


def _kind_of(device: str | torch.device) -> str:
    """Return the type of the device that measures."""
    if isinstance(device, str):
        return device
    from klora_runtime.devices.precision import home_of_float64

    return home_of_float64(device).type


def _key(layer: Layer, kind: str) -> str:
    """Return a digest of all inputs of a measurement; CPU and GPU differ in the last bits.

    Args:
        kind: type of the device.
    """
    parts = [f"torch.{identity(part)}" for part in layer.delta.parts]
    text = "\n".join([str(MEASURE_VERSION), kind, *parts])
    return hashlib.sha256(text.encode()).hexdigest()


def _wanted(layer: Layer, ks: Sequence[int]) -> tuple[int, ...]:
    kept = {layer.rank * times for times in _MULTIPLES}
    return tuple(sorted({*ks, *(k for k in kept if k <= layer.numel)}))


class _Store:
    """The open file of statistics.

        A damaged file is replaced by a new one. If no file is possible, nothing is kept.

    Args:
        file: path of the file, which may not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._is_damaged = False
        self._connection: sqlite3.Connection | None = None
        self._open()

    def _open(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(self._file, timeout=_WAITS[0])
            self._connection.execute(_TABLE)
            self._connection.execute("pragma busy_timeout = 0")
        except OSError:
            self.close()
        except _ERRORS as error:
            if isinstance(error, sqlite3.OperationalError) and _code(error) != sqlite3.SQLITE_ERROR:
                self.close()  # it cannot be created, or another process has locked it
            else:
                self._renew()

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def look_up(self, key: str) -> Statistics | None:
        """Return a layer's statistics; None if they are missing or damaged."""
        if self._connection is None:
            return None
        try:
            query = "select numbers, digest from statistics where key = ?"
            row = self._connection.execute(query, (key,)).fetchone()
        except sqlite3.OperationalError as error:
            if _is_held(error):
                self.close()
            elif _code(error) == sqlite3.SQLITE_ERROR:  # the table is not klora's
                self._renew()
            else:
                self._warn()
            return None
        except _ERRORS:
            self._renew()
            return None
        if row is None:
            return None
        found = _read(key, *row)
        if found is None:
            self._warn()
        return found

    def keep(self, new: Mapping[str, Statistics]) -> None:
        """Add new statistics to those of the same layers."""
        rows = []
        for key, each in new.items():
            old = self.look_up(key)
            sums = {**(old.top_k if old is not None else {}), **each.top_k}
            numbers = _written(Statistics(each.l1, sums, each.frobenius))
            rows.append((key, numbers, _digest(key, numbers)))
        if self._connection is None or not rows:
            return
        try:
            self._connection.execute(f"pragma busy_timeout = {round(1000 * _WAITS[1])}")
            with self._connection:
                self._connection.executemany(
                    "insert or replace into statistics values (?, ?, ?)", rows
                )
        except sqlite3.OperationalError:
            return  # locked by another process or not writable: the next run measures again
        except _ERRORS:
            self._renew()

    def _renew(self) -> None:
        """Replace a damaged file by a new one, if possible."""
        self._warn()
        self.close()
        try:
            self._file.unlink(missing_ok=True)
            self._connection = sqlite3.connect(self._file, timeout=0.0)
            self._connection.execute(_TABLE)
        except (OSError, *_ERRORS):
            self.close()

    def _warn(self) -> None:
        if not self._is_damaged:
            _LOG.warning(
                "the statistics in %s are damaged, so layers are measured again.",
                shown(self._file),
            )
        self._is_damaged = True


def _is_held(error: sqlite3.OperationalError) -> bool:
    """Return whether another process has locked the file."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: Exception) -> int | None:
    """Return SQLite's error code; None if Python's module raised the error itself."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _digest(key: str, numbers: str) -> str:
    return hashlib.sha256(f"{key}\n{numbers}".encode()).hexdigest()


def _written(statistics: Statistics) -> str:
    sums = sorted(statistics.top_k.items())
    return json.dumps([statistics.l1, statistics.frobenius, sums])


def _read(key: str, numbers: object, digest: object) -> Statistics | None:
    """Return the statistics of a row; None if its digest does not match."""
    if not isinstance(numbers, str) or _digest(key, numbers) != digest:
        return None
    try:
        l1, frobenius, sums = json.loads(numbers)
        found = Statistics(l1, dict(sums), frobenius)
    except (ValueError, TypeError, RecursionError):
        return None
    sizes = (found.l1, found.frobenius, *found.top_k.values())
    if not all(type(k) is int for k in found.top_k) or not all(map(_is_size, sizes)):
        return None
    return found


def _is_size(value: object) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0.0
