"""LoRAs in two files, for models with one denoiser for high noise and one for low noise."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Generic, TypeVar

from klora_compile.slots import HALVES, HIGH, LOW
from klora_runtime.errors import ConfigError, shown

T = TypeVar("T")

#: A word of a file name, in any spelling: ``high_noise``, ``HighNoise``, ``HIGH``, ``low-noise``.
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
#: Word -> the half that it says.
_SAYING = {word: half for half in HALVES for word in (half, f"{half}noise")}


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


def refuse_separated(files: Iterable[Path]) -> None:
    """Refuse LoRAs in one file each that look like the two files of one LoRA.

    ``klora compile fox_high fox_low`` would make a content and a style of them.

    Raises:
        ConfigError: two names in one folder differ only in the half that they say.
    """
    for one, other in combinations(files, 2):
        told = {_told_by(one.stem), _told_by(other.stem)}
        if told == set(HALVES) and one.parent == other.parent and _rest(one) == _rest(other):
            raise ConfigError(
                f"{shown(one)} and {shown(other)} look like the two files of one LoRA; join them "
                "as HIGH,LOW, with a comma and no space, or rename one if they are two LoRAs."
            )


def _rest(path: Path) -> list[str]:
    """Return the words of a file's name that say no half."""
    return [word for word in _words(path.stem) if word not in {*_SAYING, "noise"}]


def _told(path: Path) -> str | None:
    """Return the half that a file's name says, or else its folder's; None if it says none."""
    for name in (path.stem, path.resolve().parent.name):
        if _SAYING.keys() & set(_words(name)):
            return _told_by(name)
    return None


def _told_by(name: str) -> str | None:
    """Return the half that a name says; None if it says none or both."""
    said = {_SAYING[word] for word in _words(name) if word in _SAYING}
    return said.pop() if len(said) == 1 else None


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _other(half: str | None) -> str:
    return LOW if half == HIGH else HIGH


def files_of(lora: Path | Halves[Path]) -> tuple[Path, ...]:
    """Return the files of a LoRA, each once."""
    if not isinstance(lora, Halves):
        return (lora,)
    return (lora.high,) if lora.high == lora.low else (lora.high, lora.low)
