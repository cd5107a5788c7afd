"""What a user may decide about reading a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from klora_runtime.errors import ConfigError

AlphaConflict = Literal["error", "first"]

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

    def __post_init__(self) -> None:
        if self.alpha_conflict not in get_args(AlphaConflict):
            raise ConfigError(
                f"alpha_conflict: expected error or first, found {self.alpha_conflict!r}."
            )
        number = isinstance(self.max_error, int | float) and not isinstance(self.max_error, bool)
        if not number or not 0.0 <= self.max_error <= 0.5:
            raise ConfigError(
                f"max_error: expected a number from 0 to 0.5, found {self.max_error!r}."
            )
