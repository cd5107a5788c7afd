"""Tables as text for a terminal, or as Markdown.

Tables are as wide as their cells: nothing is cut or wrapped, whatever the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def text_table(
    rows: Iterable[Sequence[str]],
    *,
    heads: Sequence[str] = (),
    numbers: bool = False,
    indent: int = 0,
) -> str:
    """Return aligned columns, two spaces apart, without trailing spaces.

    Args:
        rows: cells of each row; rows may differ in length.
        heads: headings of the columns; none by default.
        numbers: whether the columns after the first hold numbers, which are right-aligned.
        indent: number of spaces before each line.
    """
    lines = [list(cells) for cells in ((heads, *rows) if heads else rows)]
    count = max(map(len, lines), default=0)
    widths = [max(len(cells[i]) for cells in lines if i < len(cells)) for i in range(count)]

    def placed(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if numbers and position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(cells, widths, strict=False))
        )
        return (" " * indent + "  ".join([first, *others])).rstrip()

    return "\n".join(map(placed, lines))


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Args:
        heads: headings of the columns, as Markdown.
        rows: cells of each row, as Markdown, one per heading.
    """
    lines = [list(heads), ["---"] * len(heads), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def labelled(rows: Iterable[tuple[str, str]]) -> str:
    """Format rows of (label, text) for a command's output."""
    return text_table(rows, indent=2)
