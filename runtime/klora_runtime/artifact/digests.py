"""SHA-256, as 64 hexadecimal digits."""

from __future__ import annotations

import hashlib
from pathlib import Path


def text_digest(text: str) -> str:
    """Of a text, as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Of a whole file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
