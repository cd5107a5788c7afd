"""LoRAs in two files, for models with one denoiser for high noise and one for low noise."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from klora_compile.slots import HALVES, HIGH, LOW
from klora_runtime.errors import ConfigError, shown

T = TypeVar("T")

#: A word of a file name, in any spelling: ``high_noise``, ``HighNoise``, ``HIGH``, ``low-noise``.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


@dataclass(frozen=True)
class Halves(Generic[T]):
    """A LoRA in two files, one for each denoiser of a base model with two.

    ``Halves("fox_high_noise.safetensors", "fox_low_noise.safetensors")``; the same file twice is a
    LoRA that changes both denoisers.
    """

    high: T
    """The LoRA of the denoiser for high noise, ``transformer``."""
    low: T
    """The LoRA of the denoiser for low noise, ``transformer_2``."""


def halves_of(first: Path, second: Path, order: tuple[str, str] | None = None) -> Halves[Path]:
    """Return which of two files is for high noise and which for low noise.

    Args:
        first: a file or folder.
        second: the other one, or the same one for both denoisers.
        order: the halves of both, where their names do not say it, or say the same of both.

    Raises:
        ConfigError: without an order, the names do not say it, or say the same of both; or they say
            another order.
    """
    if first == second:
        return Halves(first, second)
    told = [_told(path) for path in (first, second)]
    if told[0] == told[1]:
        if order is None and told[0] is not None:
            raise ConfigError(
                f"{shown(first)} and {shown(second)} both say {told[0]} noise; name a file for "
                "high noise and one for low noise, or add --halves if they are."
            )
        if order is None:
            raise ConfigError(
                f"neither {shown(first)} nor {shown(second)} says high or low noise; add --halves "
                "high,low if the first one is for high noise, else --halves low,high."
            )
        found = order
    else:
        found = (told[0] or _other(told[1]), told[1] or _other(told[0]))
        if order is not None and found != order:
            raise ConfigError(
                f"--halves says {','.join(order)}, and {shown(first)} and {shown(second)} say "
                f"{','.join(found)}; leave --halves out."
            )
    return Halves(first, second) if found == HALVES else Halves(second, first)


def _told(path: Path) -> str | None:
    """Return the half that a file's name says, or else its folder's; None if it says none."""
    for name in (path.stem, path.resolve().parent.name):
        words = {word.lower() for word in _WORD.findall(name)}
        said = [half for half in HALVES if words & {half, f"{half}noise"}]
        if len(said) == 1:
            return said[0]
        if said:
            return None
    return None


def _other(half: str | None) -> str:
    return LOW if half == HIGH else HIGH


def files_of(lora: Path | Halves[Path]) -> tuple[Path, ...]:
    """Return the files of a LoRA, each once."""
    if not isinstance(lora, Halves):
        return (lora,)
    return (lora.high,) if lora.high == lora.low else (lora.high, lora.low)
