"""The result of ``klora compile``, for a terminal and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_compile.reading.adapter import Adapter
from klora_compile.report.compression import compression_of, storage_lines
from klora_compile.report.reading import reading_json, reading_lines
from klora_compile.report.summary import bytes_text, summarise, summary_lines
from klora_compile.report.table import labelled
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import shown


@dataclass(frozen=True)
class Compilation:
    """A fusion that was compiled and written."""

    fusion: Fusion
    adapters: Mapping[str, Adapter]
    """Slot -> the LoRA that was read."""
    output: Path
    size: int
    """Bytes of the artifact."""
    seconds: float
    shift: float | None = None
    """See :func:`~klora_compile.runs.runs_of`."""

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        found = compression_of(self.fusion)
        return {
            "output": str(self.output),
            "bytes_out": self.size,
            "seconds": self.seconds,
            "reading": {slot: reading_json(adapter) for slot, adapter in self.adapters.items()},
            "thin": self.fusion.is_thin,
            "compression": None if found is None else found.json(),
            **summarise(self.fusion, self.shift).json(),
        }

    def text(self) -> str:
        """Return lines for people."""
        summary = summarise(self.fusion, self.shift)
        rows = [("artifact", shown(self.output)), *reading_lines(self.adapters)]
        rows += [*summary_lines(summary), *storage_lines(self.fusion)]
        read = " + ".join(bytes_text(count) for count in summary.bytes_in.values())
        share = self.size / sum(summary.bytes_in.values())
        rows.append(("bytes", f"{read} in, {bytes_text(self.size)} out ({share:.1%})"))
        rows.append(("seconds", f"{self.seconds:.1f}"))
        return labelled(rows)
