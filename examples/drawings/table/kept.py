"""The cells that were drawn and judged already, kept line by line, so a run can be stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: One cell's numbers: a verdict per seed, and the paired flow loss in each.
Verdicts = list[dict[str, float]]
#: Row -> "subject, style" -> verdicts.
Results = dict[str, dict[str, Verdicts]]


@dataclass(frozen=True)
class Kept:
    """The cells of one run, a JSON line each, after a line that says what they were made with."""

    path: Path

    def open(self, made_with: Mapping[str, Any]) -> Results:
        """Return the cells so far, and begin the file if there is none.

        A last line that a stop cut off is dropped.

        Raises:
            ValueError: the file's cells were made with something else.
        """
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(made_with) + "\n", encoding="utf-8")
            return {}
        before, found = self.read()
        for key in before.keys() | made_with.keys():
            if before.get(key) != made_with.get(key):
                raise ValueError(
                    f"{self.path} was made with {key} {before.get(key)}, and this run has "
                    f"{made_with.get(key)}. Name another folder."
                )
        return found

    def read(self) -> tuple[Mapping[str, Any], Results]:
        """Return what the cells were made with, and the cells."""
        text = self.path.read_text(encoding="utf-8")
        whole, _, rest = text.rpartition("\n")
        if rest:
            self.path.write_text(f"{whole}\n", encoding="utf-8")
        first, *lines = whole.split("\n")
        found: Results = {}
        for line in map(json.loads, lines):
            found.setdefault(line["row"], {})[line["cell"]] = line["verdicts"]
        return json.loads(first), found

    def add(self, row: str, cell: str, verdicts: Verdicts) -> None:
        """Append a cell."""
        line = json.dumps({"row": row, "cell": cell, "verdicts": verdicts})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


def digest(files: Iterable[Path]) -> str:
    """Return one digest of the names and contents of files."""
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(f"{path.name}\n".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()
