"""Facts for a model card that are not in the artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_runtime.artifact.digests import file_digest


@dataclass(frozen=True)
class Sample:
    """A picture made with the artifact."""

    picture: str
    """Its path, relative to the card."""
    prompt: str


@dataclass(frozen=True)
class CardFacts:
    """Facts for a card that are not in the artifact."""

    name: str
    """File name of the artifact."""
    nbytes: int
    sha256: str
    base_model: str | None = None
    """Id of the base model on the Hub."""
    licence: str | None = None
    """Licence of the artifact."""
    picture: str | None = None
    """Path of the schedule's heat map, relative to the card."""
    samples: tuple[Sample, ...] = ()
    repo: str | None = None
    """Repository on the Hub that the artifact goes to, ``OWNER/NAME``."""

    @classmethod
    def of(cls, file: Path, **given: Any) -> CardFacts:
        """Return the facts about an artifact on disk; ``given`` are the other fields."""
        return cls(file.name, file.stat().st_size, file_digest(file), **given)
