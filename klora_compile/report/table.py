"""Tables of text, for a terminal or as Markdown: plain characters that pass through a pipe.

They are as wide as their cells, whatever reads them: nothing is cut or wrapped.
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
    """Columns of equal width, two spaces apart; no line ends in spaces.

    Args:
        rows: cells of each row; a row may have fewer of them than others.
        heads: of the columns; none by default.
        numbers: whether the columns after the first hold numbers, which stand to the right.
        indent: spaces before each line.
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
    """Return the same in Markdown.

    Args:
        heads: of the columns, Markdown already.
        rows: cells of each row, Markdown already, as many as there are heads.
    """
    lines = [list(heads), ["---"] * len(heads), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def labelled(rows: Iterable[tuple[str, str]]) -> str:
    """Return rows of (label, text) as every command prints them."""
    return text_table(rows, indent=2)
