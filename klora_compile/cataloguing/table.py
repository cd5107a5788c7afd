"""The result table of a catalogue: a row for each pair, as JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from klora_compile.extras import missing_library
from klora_runtime.artifact.replacing import replacing
from klora_runtime.catalogue.opened import OpenCatalogue, PairFacts
from klora_runtime.errors import ConfigError

#: The keys of a row, all of them text in Parquet; ``gamma`` is JSON there.
_COLUMNS = ("content", "style", "verdict", "reason", "gamma", "choices")

_PARQUET, _JSON_LINES = ".parquet", ".jsonl"


def check_table(path: Path) -> None:
    """Check that a table can be written in the form that its name says.

    Raises:
        ConfigError: the name says no form.
        KloraError: the library for it is not installed.
    """
    if path.suffix == _PARQUET:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise missing_library(f"a table {_PARQUET}", error) from error
    elif path.suffix != _JSON_LINES:
        raise ConfigError(f"--table: expected NAME{_JSON_LINES} or NAME{_PARQUET}, found {path}.")


def write_table(catalogue: OpenCatalogue, path: Path, *, overwrite: bool) -> None:
    """Write a row for each pair.

    Raises:
        KloraError: the file cannot be written.
    """
    with replacing(path, overwrite=overwrite) as new:
        if path.suffix == _PARQUET:
            import pyarrow
            import pyarrow.parquet

            rows = [row | {"gamma": json.dumps(row["gamma"])} for row in rows_of(catalogue)]
            schema = pyarrow.schema([(name, pyarrow.string()) for name in _COLUMNS])
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), new)
            return
        with new.open("w", encoding="utf-8") as file:
            for row in rows_of(catalogue):
                file.write(json.dumps(row) + "\n")


def rows_of(catalogue: OpenCatalogue) -> Iterator[dict[str, Any]]:
    """Yield the row of each pair."""
    return map(row_of, catalogue.pairs())


def row_of(facts: PairFacts) -> dict[str, Any]:
    """Return the row of a pair."""
    return {
        "content": facts.content,
        "style": facts.style,
        "verdict": "linked" if facts.kind.refused is None else "refused",
        "reason": facts.kind.refused,
        "gamma": dict(facts.gamma),
        "choices": facts.choices,
    }
