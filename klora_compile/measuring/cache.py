"""Statistics that were measured before, in one file of the user's cache folder.

A LoRA is measured once: its statistics are its own, of a partner only K is needed. With each layer
the sums at the rank times 1, 2, 4 … 256 are kept, which are the K of partners of usual ranks.
Whatever is wrong with the file only costs that layers are measured again.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from platformdirs import user_cache_path

from klora_compile.measuring.measure import MEASURE_VERSION, OnLayer, Statistics, Task, measured
from klora_compile.reading.layers import Layer
from klora_runtime.artifact.tensor_file import tensor_digest
from klora_runtime.devices.precision import home_of_float64

#: Environment variable with the folder, where it is not the system's.
FOLDER_VARIABLE = "KLORA_CACHE"
_FILE = "statistics.sqlite3"

#: A layer's rank times these is measured and kept besides what is asked for.
_MULTIPLES = tuple(2**i for i in range(9))

_TABLES = """
create table if not exists layers (key text primary key, l1 real, frobenius real) without rowid;
create table if not exists sums
    (key text, k integer, value real, primary key (key, k)) without rowid;
"""


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

    def missing(store: sqlite3.Connection) -> Iterator[Task]:
        for layer in layers:
            asked = ks.get(layer.name, ())
            key = keys[layer.name] = _key(layer, device)
            statistics = _look_up(store, key, asked)
            if statistics is None:
                yield layer, _wanted(layer, asked)
            else:
                found[layer.name] = statistics

    def report(layer: Layer) -> None:
        if on_layer is not None:
            on_layer(layer.name, len(found) + len(new), len(layers))

    with _opened(file) as store:
        for layer, statistics in measured(missing(store), device):
            new[layer.name] = statistics
            report(layer)
        _keep(store, {keys[name]: statistics for name, statistics in new.items()})
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


@contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    """The store: a new one in place of what is none, one in memory where no file can be."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        connection = _connected(file)
    except (OSError, sqlite3.OperationalError):
        connection = _connected(":memory:")
    except sqlite3.DatabaseError:
        file.unlink(missing_ok=True)
        connection = _connected(file)
    with closing(connection):
        yield connection


def _connected(file: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=5)
    try:
        connection.executescript(_TABLES)
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _look_up(store: sqlite3.Connection, key: str, ks: Sequence[int]) -> Statistics | None:
    """What is kept of a layer, or None where anything of it is missing or impossible."""
    try:
        layer = store.execute("select l1, frobenius from layers where key = ?", (key,)).fetchone()
        rows = store.execute("select k, value from sums where key = ?", (key,)).fetchall()
    except sqlite3.Error:
        return None
    if layer is None or not all(_is_size(value) for value in layer):
        return None
    sums = {k: value for k, value in rows if type(k) is int and _is_size(value)}
    if not all(k in sums and sums[k] <= layer[0] * (1 + 1e-9) for k in ks):
        return None
    return Statistics(layer[0], sums, layer[1])


def _keep(store: sqlite3.Connection, new: Mapping[str, Statistics]) -> None:
    try:
        with store:
            store.executemany(
                "insert or replace into layers values (?, ?, ?)",
                [(key, each.l1, each.frobenius) for key, each in new.items()],
            )
            store.executemany(
                "insert or replace into sums values (?, ?, ?)",
                [(key, k, value) for key, each in new.items() for k, value in each.top_k.items()],
            )
    except sqlite3.Error:
        return  # another process holds it, or it is damaged: measured again next time


def _is_size(value: object) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0.0
