"""Cross products of which ``make test`` takes a part, and ``make test-all`` all."""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from typing import Any

import pytest

#: One pair of how many ``make test`` takes.
SHARE = 4


def some_pairs(rows: Collection[Any], columns: Collection[Any], share: int = SHARE) -> list[Any]:
    """All pairs, as parameters; those are not slow that meet each row and each column in turn.

    Each row meets a column of every ``share``, and each column a row of every as many. A share of
    the number of columns lets each row meet one column.
    """
    return [
        pytest.param(row, column, marks=() if (i + j) % share == 0 else pytest.mark.slow)
        for (i, row), (j, column) in product(enumerate(rows), enumerate(columns))
    ]


def slow(*values: Any) -> Any:
    """The values of one test, as parameters, that ``make test-all`` alone runs."""
    return pytest.param(*values, marks=pytest.mark.slow)
