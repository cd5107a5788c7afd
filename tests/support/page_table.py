"""Tables of the documentation that tests write and hold to what is tested."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "compatibility.md"


class PageTable:
    """The table between two comments of the page on compatibility.

    Args:
        name: of the comments, as in ``<!-- forms: begin -->``.
    """

    def __init__(self, name: str) -> None:
        self._begin, self._end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"

    def read(self) -> str:
        """Return the table as it stands on the page."""
        return PAGE.read_text().partition(self._begin)[2].partition(self._end)[0]

    def write(self, rows: Iterable[str]) -> None:
        """Replace the table on the page."""
        before, _, rest = PAGE.read_text().partition(self._begin)
        after = rest.partition(self._end)[2]
        PAGE.write_text(before + self._begin + as_text(rows) + self._end + after)


def as_text(rows: Iterable[str]) -> str:
    """Return rows as they stand on the page."""
    return "\n".join(rows) + "\n"
