"""Statistics that were measured before, in one file of the user's cache folder.

A LoRA is measured once: its statistics are its own, of a partner only K is needed. With each layer
the sums at the rank times 1, 2, 4 … 256 are kept, which are the K of partners of usual ranks.
Each row has a digest of its own, so that a damaged one is never believed. Whatever is wrong with
the file only costs that layers are measured again, and a line of warning where it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch
from platformdirs import user_cache_path

from klora_compile.measuring.measure import MEASURE_VERSION, OnLayer, Statistics, Task, measured
from klora_compile.reading.layers import Layer
from klora_runtime.artifact.tensor_file import tensor_digest
from klora_runtime.devices.precision import home_of_float64
from klora_runtime.errors import shown

#: Environment variable with the folder, where it is not the system's.
FOLDER_VARIABLE = "KLORA_CACHE"
_FILE = "statistics.sqlite3"

#: A layer's rank times these is measured and kept besides what is asked for.
_MULTIPLES = tuple(2**i for i in range(9))

_TABLE = "create table if not exists statistics (key text primary key, numbers text, digest text)"

#: Seconds that a process waits for another one's lock: where it opens the file, and where it keeps.
_WAITS = (0.5, 0.5)

#: What sqlite3 raises for a damaged file; of texts in its own errors too.
_ERRORS = (sqlite3.Error, UnicodeError)

_LOG = logging.getLogger(__name__)


def cache_file() -> Path | None:
    """Where statistics are kept: in ``$KLORA_CACHE``, or the user's cache folder.

    Returns:
        The file, whose folder is made; None where no folder can be.
    """
    own = os.environ.get(FOLDER_VARIABLE)
    try:
        folder = Path(own) if own else user_cache_path("klora", appauthor=False)
        if not own and not folder.is_absolute():
            return None  # some versions of platformdirs leave the ~ of a user without a home
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder / _FILE


def measure_once(
    layers: Collection[Layer],
    ks: Mapping[str, Sequence[int]],
    *,
    device: torch.device,
    file: Path,
    on_layer: OnLayer | None = None,
) -> dict[str, Statistics]:
    """As :func:`~klora_compile.measuring.measure.measure`; layers in the file are looked up.

    Args:
        file: of :func:`cache_file`; made where it is missing. One that cannot be read or written is
            passed over.
    """
    keys: dict[str, str] = {}
    found: dict[str, Statistics] = {}
    new: dict[str, Statistics] = {}

    def missing(store: _Store) -> Iterator[Task]:
        for layer in layers:
            asked = ks.get(layer.name, ())
            key = keys[layer.name] = _key(layer, device)
            statistics = store.look_up(key)
            if statistics is None or not set(asked) <= set(statistics.top_k):
                yield layer, _wanted(layer, asked)
            else:
                found[layer.name] = statistics

    def report(layer: Layer) -> None:
        if on_layer is not None:
            on_layer(layer.name, len(found) + len(new), len(layers))

    with closing(_Store(file)) as store:
        for layer, statistics in measured(missing(store), device):
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


def _key(layer: Layer, device: torch.device) -> str:
    """Digest of all that a measurement depends on; a CPU and a GPU differ in the last bits."""
    parts = [
        f"{tensor.dtype} {list(tensor.shape)} {tensor_digest(tensor)}"
        for tensor in layer.delta.tensors
    ]
    text = "\n".join([str(MEASURE_VERSION), home_of_float64(device).type, *parts])
    return hashlib.sha256(text.encode()).hexdigest()


def _wanted(layer: Layer, ks: Sequence[int]) -> tuple[int, ...]:
    kept = {layer.rank * times for times in _MULTIPLES}
    return tuple(sorted({*ks, *(k for k in kept if k <= layer.numel)}))


class _Store:
    """The file of statistics: a new one in place of what is none, nothing where no file can be.

    Args:
        file: where it lies, or shall lie.
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
                self.close()  # no place for it, or another process holds it
            else:
                self._renew()

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def look_up(self, key: str) -> Statistics | None:
        """What is kept of a layer; None where it is missing or damaged."""
        if self._connection is None:
            return None
        try:
            query = "select numbers, digest from statistics where key = ?"
            row = self._connection.execute(query, (key,)).fetchone()
        except sqlite3.OperationalError as error:
            if _is_held(error):
                self.close()
            elif _code(error) == sqlite3.SQLITE_ERROR:  # the table is not ours
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
        """Add what was measured to what is kept of the same layers."""
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
            return  # another process holds it, or it cannot be written: measured again next time
        except _ERRORS:
            self._renew()

    def _renew(self) -> None:
        """Put a new file in the place of a damaged one, where that can be done."""
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
    """Return whether another process has the file."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _code(error: Exception) -> int | None:
    """SQLite's own, None where Python's module raises by itself."""
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _digest(key: str, numbers: str) -> str:
    return hashlib.sha256(f"{key}\n{numbers}".encode()).hexdigest()


def _written(statistics: Statistics) -> str:
    sums = sorted(statistics.top_k.items())
    return json.dumps([statistics.l1, statistics.frobenius, sums])


def _read(key: str, numbers: object, digest: object) -> Statistics | None:
    """Return the statistics of a row, or None where its digest is not its own."""
    if not isinstance(numbers, str) or _digest(key, numbers) != digest:
        return None
    try:
        l1, frobenius, sums = json.loads(numbers)
        found = Statistics(l1, dict(sums), frobenius)
    except (ValueError, TypeError):
        return None
    sizes = (found.l1, found.frobenius, *found.top_k.values())
    return found if all(map(_is_size, sizes)) else None


def _is_size(value: object) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0.0
