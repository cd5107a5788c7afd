"""Tables of the documentation that tests write and hold to what is tested."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "reference"


class PageTable:
    """The table between two comments of a page of the reference.

    Args:
        name: of the comments, as in ``<!-- forms: begin -->``.
        page: its file.
    """

    def __init__(self, name: str, page: str = "compatibility.md") -> None:
        self._page = PAGES / page
        self._begin, self._end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"

    def read(self) -> str:
        """Return the table as it stands on the page."""
        return self._page.read_text().partition(self._begin)[2].partition(self._end)[0]

    def write(self, rows: Iterable[str]) -> None:
        """Replace the table on the page."""
        before, _, rest = self._page.read_text().partition(self._begin)
        after = rest.partition(self._end)[2]
        self._page.write_text(before + self._begin + as_text(rows) + self._end + after)


def as_text(rows: Iterable[str]) -> str:
    """Return rows as they stand on the page."""
    return "\n".join(rows) + "\n"
