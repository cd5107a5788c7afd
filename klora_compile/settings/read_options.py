"""Options of reading a LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from klora_compile.fields import Flag, Number, Place, Text, Word, check_settings, setting
from klora_runtime.errors import ConfigError
from klora_runtime.families.catalogue import FAMILIES

AlphaConflict = Literal["error", "first"]
Denoiser = Literal["transformer_2"]

#: Share of a delta's Frobenius norm that a conversion to another form may lose.
MAX_ERROR = 1e-6


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading a LoRA; the defaults lose nothing and skip nothing.

    Raises:
        ConfigError: a value is out of its range.
    """

    base: str | os.PathLike[str] | None = field(
        default=None,
        metadata=setting(
            "The base model, whose weights DoRA, OFT and other forms need: a folder of diffusers, "
            "a safetensors file, or the name of either on the Hub.",
            Place(),
        ),
    )
    ignore_unknown: bool = field(
        default=False,
        metadata=setting("Leave out keys that klora cannot use, and record them.", Flag()),
    )
    max_error: float = field(
        default=MAX_ERROR,
        metadata=setting(
            "Share of a delta's Frobenius norm that may be lost where its form is not low rank "
            "(LoKr, DoRA, full differences): more makes smaller artifacts.",
            Number(0.0, 0.5),
        ),
    )
    alpha_conflict: AlphaConflict = field(
        default="error",
        metadata=setting(
            "If two sources state different alphas for a layer: refuse the LoRA (error), or "
            "take the first by rule.",
            Word(get_args(AlphaConflict)),
        ),
    )
    denoiser: Denoiser | None = field(
        default=None,
        metadata=setting(
            "Component of the LoRAs, if their files do not say it: the second transformer "
            "(low noise) of a base model with two. Apply its artifact beside the first one's.",
            Word(get_args(Denoiser)),
        ),
    )

    family: str | None = field(
        default=None,
        metadata=setting(
            "Base model of the LoRAs, if their layers are those of several and their files do not "
            "say it; inspect lists the candidates.",
            Text("FAMILY", "the key of a base model, such as flux.1"),
        ),
    )

    def notes(self) -> dict[str, Any]:
        """Return the non-default options that the file does not show, as JSON values."""
        notes: dict[str, Any] = {}
        if self.max_error != MAX_ERROR:
            notes["max_error"] = self.max_error
        if self.alpha_conflict != "error":
            notes["alpha_conflict"] = self.alpha_conflict
        if self.denoiser is not None:
            notes["denoiser"] = self.denoiser
        if self.family is not None:
            notes["family"] = self.family
        return notes

    @classmethod
    def from_notes(
        cls, notes: Mapping[str, Any], base: str | os.PathLike[str] | None = None
    ) -> ReadOptions:
        """Return the options with which a source with these notes in an artifact was read.

        Raises:
            ConfigError: a value is out of its range.
        """
        return cls(
            base=base,
            ignore_unknown=bool(notes.get("unused")),
            max_error=notes.get("max_error", MAX_ERROR),
            alpha_conflict=notes.get("alpha_conflict", "error"),
            denoiser=notes.get("denoiser"),
            family=notes.get("family"),
        )

    def __post_init__(self) -> None:
        """Check every setting."""
        check_settings(self)
        if self.family is not None and self.family not in FAMILIES:
            raise ConfigError(
                f"family: expected one of {', '.join(FAMILIES)}, found {self.family!r}."
            )
