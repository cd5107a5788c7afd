"""The candidates of the reported run: named in a commit before it, and never chosen after it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from drawings.table.rows import REFERENCE, ROWS


@dataclass(frozen=True)
class Candidates:
    """The rows of the reported run."""

    rows: tuple[str, ...]
    commit: str
    """The commit that named them."""


def candidates(file: Path) -> Candidates:
    """Read the names of rows, a JSON list, from a file in a repository.

    Raises:
        ValueError: the file differs from its last commit, or it names an unknown row.
    """
    commit = commit_of(file)
    rows = tuple(json.loads(file.read_text(encoding="utf-8")))
    unknown = set(rows) - {row.name for row in ROWS}
    if unknown or REFERENCE not in rows:
        raise ValueError(
            f"{file} names {sorted(unknown) or 'rules'} "
            + ("that the table lacks." if unknown else f"without {REFERENCE!r}. Add it.")
        )
    return Candidates(rows, commit)


def commit_of(file: Path) -> str:
    """Return the last commit of a file that names what a reported run is to do.

    Raises:
        ValueError: the file differs from that commit, or there is none.
    """
    status = _git(file, "status", "--porcelain", "--", file.name)
    if status is None:
        raise ValueError(f"{file} is in no git repository. Put it in one and commit it.")
    commit = _git(file, "log", "-1", "--format=%H", "--", file.name)
    if status or not commit:
        raise ValueError(
            f"{file} is not committed as it is. Commit it before the reported run, so that nobody "
            "can choose a rule by the reported subjects."
        )
    return commit


def _git(file: Path, *arguments: str) -> str | None:
    """Return git's answer, None if it fails."""
    done = subprocess.run(
        ["git", *arguments], cwd=file.parent, capture_output=True, text=True, check=False
    )
    return None if done.returncode else done.stdout.strip()
