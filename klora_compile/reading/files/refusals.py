"""How errors name a LoRA file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from klora_runtime.errors import LoraError, shown


def named(path: Path) -> str:
    """Return how errors name a file."""
    return f"LoRA file {shown(path)}"


def refused(path: Path, problem: str, issues: Iterable[str] = ()) -> LoraError:
    """Return the error for a file with this problem."""
    return LoraError(f"{named(path)}: {problem}.", issues)
