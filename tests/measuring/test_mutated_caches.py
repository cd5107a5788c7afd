"""Files of statistics changed at random: what is read is right, or measured again with one warning.

``make mutate`` makes 20,000 changes of each kind instead of a few.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import torch
from support.lora_files import random_pair

from klora_compile.measuring.cache import _digest, measure_once
from klora_compile.measuring.measure import measure
from klora_compile.reading.layers import Layer

CHANGES = int(os.environ.get("KLORA_MUTATIONS", "20"))

LAYERS = tuple(
    Layer.lora("unet", f"x{seed}", *random_pair(12, 10, 2, seed=seed), 1.0) for seed in range(6)
)
KS = {layer.name: (3,) for layer in LAYERS}
CPU = torch.device("cpu")

#: What a cell may be instead of its text, and what a number or a list in it may be.
CELLS = (
    None,
    "",
    1,
    2.5,
    b"\xff\x00",
    "[]",
    "[" * 100_000,
    "9" * 5000,
    "\x1b[2J",
    "[1.0, 1.0, {}]",
)
PARTS = ("-1.0", "NaN", "1e999", "true", "[]", "{}", '"a"', '[["a", 1.0]]', "[[[3], 1.0]]", "")


def changed_bytes(file: Path, random: Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(random.choice((1, 2, 20, 200))):
        data[random.randrange(len(data))] = random.randrange(256)
    file.write_bytes(
        data[: random.choice((len(data), len(data), random.randrange(len(data)))) or 1]
    )


def changed_rows(file: Path, random: Random) -> None:
    """Rows whose numbers are others, another's, or none; their digests stay."""
    with closing(sqlite3.connect(file)) as store, store:
        rows = store.execute("select key, numbers, digest from statistics").fetchall()
        for key, numbers, digest in random.sample(rows, random.randrange(1, len(rows))):
            column = random.choice(("key", "numbers", "digest"))
            old = {"key": key, "numbers": numbers, "digest": digest}[column]
            new = random.choice((*CELLS, another_letter(old, random), random.choice(rows)[1]))
            store.execute(
                f"update or replace statistics set {column} = ? where key = ?", (new, key)
            )


def rows_with_right_digests(file: Path, random: Random) -> None:
    """Rows that somebody wrote with the digest that belongs to them."""
    with closing(sqlite3.connect(file)) as store, store:
        for key, numbers in store.execute("select key, numbers from statistics").fetchall():
            l1, rest = numbers.split(",", 1)
            changed = random.choice(
                (
                    f"[{random.choice(PARTS)},{rest}",
                    f"{l1}, 1.0, {random.choice(PARTS)}]",
                    random.choice([cell for cell in CELLS if isinstance(cell, str)]),
                )
            )
            store.execute(
                "update statistics set numbers = ?, digest = ? where key = ?",
                (changed, _digest(key, changed), key),
            )


def another_letter(text: str, random: Random) -> str:
    place = random.randrange(len(text))
    return text[:place] + random.choice("0123456789abcdef.,[]-") + text[place + 1 :]


KINDS: Mapping[str, Callable[[Path, Random], None]] = {
    "bytes": changed_bytes,
    "rows": changed_rows,
    "rows with right digests": rows_with_right_digests,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_a_changed_file_is_right(
    kind: str, tmp_path: Path, logged: list[str]
) -> None:
    file = tmp_path / "statistics.sqlite3"
    expected = measure(LAYERS, KS, device=CPU)
    assert measure_once(LAYERS, KS, device=CPU, file=file) == expected
    whole = file.read_bytes()
    warning = f"the statistics in {file} are damaged, so layers are measured again."
    for number in range(CHANGES):
        file.write_bytes(whole)
        KINDS[kind](file, Random(number))
        logged.clear()
        try:
            assert measure_once(LAYERS, KS, device=CPU, file=file) == expected
            assert logged in ([], [warning])
        except BaseException as error:
            error.add_note(f"change {number} of {kind}")
            raise
