"""Files of statistics changed at random: what is read is right, or measured again with one warning.

``make mutate`` makes 20,000 changes of each kind instead of a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import pytest
import torch
from support.lora_files import random_pair

from klora_compile.measuring.measure import measure
from klora_compile.profiles.numbers_file import Rows, read_numbers, write_numbers
from klora_compile.profiles.once import measure_once
from klora_compile.profiles.store import Store
from klora_compile.reading.layers import Layer

CHANGES = int(os.environ.get("KLORA_MUTATIONS", "20"))

LAYERS = tuple(
    Layer.lora("unet", f"x{seed}", *random_pair(12, 10, 2, seed=seed), 1.0) for seed in range(6)
)
KS = {layer.name: (3,) for layer in LAYERS}
CPU = torch.device("cpu")


def changed_bytes(file: Path, random: Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(random.choice((1, 2, 20, 200))):
        data[random.randrange(len(data))] = random.randrange(256)
    file.write_bytes(
        data[: random.choice((len(data), len(data), random.randrange(len(data)))) or 1]
    )


def rows_with_right_digests(file: Path, random: Random) -> None:
    """What somebody wrote with the digest that belongs to it, and that no measurement gives."""
    _, arrays = read_numbers(file)
    numbers, ks = ([list(row) for row in arrays[name]] for name in ("numbers", "k"))
    wrong = random.choice((-1.0, float("nan"), float("inf"), -0.5))
    change = random.choice(("number", "k", "fewer", "none"))
    if change == "number":
        random.choice(numbers)[random.randrange(len(numbers[0]))] = wrong
    elif change == "k":
        for row in ks:
            row[:] = [k + 1000 for k in row]
    elif change == "fewer":
        numbers, ks = numbers[1:], ks[1:]
    arrays = {"numbers": Rows("F64", numbers), "k": Rows("I64", ks)}
    if change == "none":
        del arrays[random.choice(("numbers", "k"))]
    write_numbers(file, {}, arrays)


KINDS: Mapping[str, Callable[[Path, Random], None]] = {
    "bytes": changed_bytes,
    "rows with right digests": rows_with_right_digests,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_a_changed_file_is_right(
    kind: str, tmp_path: Path, logged: list[str]
) -> None:
    expected = measure(LAYERS, KS, device=CPU)
    assert measure_once(LAYERS, KS, device=CPU, store=Store(tmp_path)) == expected
    (file,) = (tmp_path / "statistics").iterdir()
    whole = file.read_bytes()
    warning = f"statistics/{file.name} is damaged, so its LoRA is measured again."
    for number in range(CHANGES):
        file.write_bytes(whole)
        KINDS[kind](file, Random(number))
        logged.clear()
        try:
            assert measure_once(LAYERS, KS, device=CPU, store=Store(tmp_path)) == expected
            assert logged in ([], [warning])
        except BaseException as error:
            error.add_note(f"change {number} of {kind}")
            raise
