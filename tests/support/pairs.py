"""Cross products of which ``make test`` takes a part, and ``make test-all`` all."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from typing import Any

import pytest

#: One pair of how many ``make test`` takes.
SHARE = 4


def some_pairs(rows: Collection[Any], columns: Collection[Any]) -> list[Any]:
    """All pairs, as parameters; those are not slow that meet each row and each column in turn.

    Each row meets a column of every :data:`SHARE`, and each column a row of every as many, or all
    of them where there are fewer.
    """
    return [
        pytest.param(row, column, marks=() if (i + j) % SHARE == 0 else pytest.mark.slow)
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns))
    ]
