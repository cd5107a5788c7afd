"""Text on a contact sheet: the choice of a font, and line wrapping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import ImageFont

#: System fonts to try, in this order, for characters that Pillow's own font lacks.
_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc"),
    *("Arial Unicode.ttf", "msyh.ttc", "malgun.ttf", "PingFang.ttc"),
)
_MAX_LINES = 24


def font_for(text: str, size: int) -> Any:
    """Return Pillow's own font, or the font with most of the characters if some are missing."""
    own = ImageFont.load_default(size)
    if not _missing(own, text):
        return own
    return min((own, *_system_fonts(size)), key=lambda font: _missing(font, text))


def wrapped(text: str, font: Any, width: int) -> str:
    """Wrap ``text`` to at most 24 lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, font, width):
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    lines = [line for line in lines if line]
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], f"{lines[_MAX_LINES - 1][:-1]}…"]
    return "\n".join(lines)


def _pieces(word: str, font: Any, width: int) -> Iterator[str]:
    """Yield the pieces of a word, cut at the width of a line."""
    piece = ""
    for character in word:
        if piece and font.getlength(piece + character) > width:
            yield piece
            piece = ""
        piece += character
    yield piece


def _system_fonts(size: int) -> Iterator[Any]:
    for name in _FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:
            continue


def _missing(font: Any, text: str) -> int:
    """Return how many characters of ``text`` a font has no glyph for."""
    box = bytes(font.getmask("\uffff"))
    return sum(bytes(font.getmask(c)) == box for c in set(text) if c.isprintable())
