"""Escaping of text from files for Markdown, so that it is not markup, HTML, a link or YAML."""

from __future__ import annotations

import json
import re

from klora_runtime.errors import shown

_LIMIT = 1000

#: ASCII characters that stay. All others become numeric character references, which Markdown
#: readers never take for structure.
_PLAIN = frozenset(" .,-'\"()=%?;+/")
_WWW = re.compile(r"(?i)\bwww\.")


def printable(text: object) -> str:
    """Return text as one line without control characters, of at most 1000 characters."""
    return shown(text, _LIMIT)


def plain(text: object) -> str:
    """Return text escaped for a paragraph or a table cell."""
    line = printable(text)
    escaped = "".join(
        c if _is_plain(line, index) else f"&#{ord(c)};" for index, c in enumerate(line)
    )
    return _WWW.sub(lambda match: f"{match[0][:-1]}&#46;", escaped)


def fenced(text: str, language: str = "") -> str:
    """Return a code block with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def yaml_string(text: object) -> str:
    """Return a double-quoted YAML scalar, which is a JSON string."""
    return json.dumps(printable(text), ensure_ascii=False)


def _is_plain(line: str, index: int) -> bool:
    character = line[index]
    if character == "_":  # within a word it is not emphasis
        return line[index - 1 : index].isalnum() and line[index + 1 : index + 2].isalnum()
    return not character.isascii() or character.isalnum() or character in _PLAIN
