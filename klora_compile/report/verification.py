"""The result of ``klora verify``, for a terminal and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_runtime.artifact.document import Document
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import KloraError, shown


@dataclass(frozen=True)
class Verification:
    """An artifact, the LoRAs it was compared with, and the differences."""

    file: Path
    against: tuple[Path, ...]
    """LoRAs; empty if the artifact was checked alone."""
    fusion: Fusion | Document | None = None
    """The fusion; None if the artifact cannot be read."""
    differences: tuple[str, ...] = ()
    """One sentence each; see :func:`klora_compile.verify.verify_fusion`."""
    skipped: tuple[str, ...] = ()
    """What the artifact also holds, in words, and was not compared."""
    taken: tuple[str, ...] = ()
    """What a base model calibrated, in words, and was not computed again."""
    signed_by: Path | None = None
    """The key or certificate that the file is signed by; None if no signature was asked for."""

    def error(self) -> KloraError | None:
        """Return the error that lists the differences; None if there are none."""
        if not self.differences:
            return None
        given = " and ".join(shown(path) for path in self.against)
        return KloraError(f"{shown(self.file)} is not what {given} give:", self.differences)

    def json(self, error: KloraError | None) -> dict[str, Any]:
        """Return the fields as JSON values.

        Args:
            error: the error of the check, or None.
        """
        problems = [] if error is None else list(error.issues) or [str(error)]
        return {
            "file": str(self.file),
            "good": error is None,
            "layers": None if self.fusion is None else len(self.fusion.entries),
            "against": [str(path) for path in self.against],
            "not_computed": list(self.taken),
            "signed_by": None if self.signed_by is None else str(self.signed_by),
            "problems": problems,
        }

    def text(self) -> str:
        """Return one line for people about a good artifact."""
        assert self.fusion is not None
        how = "structure and digests"
        if self.against:
            entries = self.fusion.entries
            small = any(each.quantised for entry in entries for each in entry.factors.values())
            how = "as near to its sources as it states" if small else "equal to its sources"
        if self.skipped:
            were = "were" if self.skipped[0].startswith("sums") else "was"
            how += f"; it also holds {' and '.join(self.skipped)}, which {were} not compared"
        if self.taken:
            how += f"; taken as stated: {' and '.join(self.taken)}"
        if self.signed_by is not None:
            how += f"; signed by {shown(self.signed_by)}"
        return f"{shown(self.file)}: good ({len(self.fusion.entries)} layers, {how})"
