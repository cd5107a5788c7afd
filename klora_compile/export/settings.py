"""Settings of an export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from klora_runtime.errors import ConfigError

Keys = Literal["kohya", "peft"]
Precision = Literal["float16", "bfloat16", "float32"]

_MAX_RANK = 4096
_MAX_GAIN = 1e4


@dataclass(frozen=True)
class ExportSettings:
    """Settings of an export; the defaults lose only the schedule.

    Raises:
        ConfigError: a value is out of its range.
    """

    keys: Keys = "kohya"
    """``kohya``: sd-scripts' names, for ComfyUI, A1111 and Forge. ``peft``: diffusers' names, for
        diffusers."""
    rank: int | None = None
    """Greatest rank of every layer, 1 to 4096, by truncated SVD; None keeps the full rank."""
    gain: float = 1.0
    """Factor on the denoiser's deltas, -10000 to 10000, because an average of alternating LoRAs is
        weaker than a sum. It does not apply to text encoders, which have no schedule."""
    dtype: Precision | None = None
    """Dtype of the tensors; None for the sources' widest one."""

    def __post_init__(self) -> None:
        if self.keys not in get_args(Keys):
            raise ConfigError(f"keys: expected kohya or peft, found {self.keys!r}.")
        if self.dtype not in (None, *get_args(Precision)):
            expected = ", ".join(get_args(Precision))
            raise ConfigError(f"dtype: expected one of {expected}, found {self.dtype!r}.")
        if self.rank is not None and not (type(self.rank) is int and 1 <= self.rank <= _MAX_RANK):
            raise ConfigError(
                f"rank: expected a whole number from 1 to {_MAX_RANK}, found {self.rank!r}."
            )
        number = isinstance(self.gain, int | float) and not isinstance(self.gain, bool)
        if not number or not math.isfinite(self.gain) or not 0.0 < abs(self.gain) <= _MAX_GAIN:
            raise ConfigError(
                f"gain: expected a number other than 0, at most {_MAX_GAIN:g} either way, found "
                f"{self.gain!r}."
            )
