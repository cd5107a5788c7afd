"""What a user may decide about reading a LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from klora_runtime.errors import ConfigError

AlphaConflict = Literal["error", "first"]
Denoiser = Literal["transformer_2"]

#: The share of a delta's Frobenius norm that may be lost where it is brought into another form.
MAX_ERROR = 1e-6


@dataclass(frozen=True)
class ReadOptions:
    """Settings of reading; the defaults lose nothing and pass nothing over.

    Raises:
        ConfigError: a value is out of its range.
    """

    base: Path | None = None
    """The base model, for forms whose delta needs its weights (DoRA): a folder of diffusers or one
    safetensors file."""
    ignore_unknown: bool = False
    """Leave out keys that klora cannot use, and record them, instead of refusing the file."""
    max_error: float = MAX_ERROR
    """0 to 0.5: the share of a delta's Frobenius norm that may be lost where a form that is not low
    rank is approximated by one that is. More makes smaller artifacts."""
    alpha_conflict: AlphaConflict = "error"
    """Where two sources state different alphas for a layer: an error, or the ``first`` by rule."""
    denoiser: Denoiser | None = None
    """The component that layers of ``transformer`` are for. Wan 2.2's LoRAs are two files with the
    same names, one for each of its transformers."""

    def notes(self) -> dict[str, Any]:
        """What differs from the defaults and is not seen from the file, as JSON values."""
        notes: dict[str, Any] = {}
        if self.max_error != MAX_ERROR:
            notes["max_error"] = self.max_error
        if self.alpha_conflict != "error":
            notes["alpha_conflict"] = self.alpha_conflict
        if self.denoiser is not None:
            notes["denoiser"] = self.denoiser
        return notes

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any], base: Path | None = None) -> ReadOptions:
        """The options under which a source with these notes in an artifact was read.

        Raises:
            ConfigError: a value is out of its range.
        """
        return cls(
            base=base,
            ignore_unknown=bool(notes.get("unused")),
            max_error=notes.get("max_error", MAX_ERROR),
            alpha_conflict=notes.get("alpha_conflict", "error"),
            denoiser=notes.get("denoiser"),
        )

    def __post_init__(self) -> None:
        if self.alpha_conflict not in get_args(AlphaConflict):
            raise ConfigError(
                f"alpha_conflict: expected error or first, found {self.alpha_conflict!r}."
            )
        if self.denoiser not in (None, *get_args(Denoiser)):
            raise ConfigError(f"denoiser: expected transformer_2, found {self.denoiser!r}.")
        number = isinstance(self.max_error, int | float) and not isinstance(self.max_error, bool)
        if not number or not 0.0 <= self.max_error <= 0.5:
            raise ConfigError(
                f"max_error: expected a number from 0 to 0.5, found {self.max_error!r}."
            )
