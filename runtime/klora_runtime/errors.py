"""The errors that klora raises.

Every error says what is wrong, where, what was expected, what was found and what to do. If one
check finds several problems, the message lists them and ``issues`` holds them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_SHOWN_ISSUES = 8
_SHOWN_CHARACTERS = 160


class KloraError(Exception):
    """Base class of all klora errors.

    Attributes:
        issues: the problems found, one sentence each; empty if the message says everything.
    """

    def __init__(self, message: str, issues: Iterable[str] = ()) -> None:
        self.issues: tuple[str, ...] = tuple(issues)
        super().__init__(message + _listing(self.issues))


class FileFormatError(KloraError):
    """A file is invalid: not safetensors, truncated, altered, or of a kind that klora refuses."""


class LoraError(FileFormatError):
    """A LoRA file cannot be read completely and exactly."""


class ArtifactError(FileFormatError):
    """A ``.klora.safetensors`` file breaks its format, or its digests or signature do not match."""


class ConfigError(KloraError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class PairingError(KloraError):
    """Two LoRAs cannot be fused: their layer shapes differ, or they share no layer."""


class IncompatibleModelError(KloraError):
    """A fusion cannot be applied to this pipeline; nothing was changed."""


class InUseError(KloraError):
    """The pipeline or its denoiser is in use.

    Another fusion is applied, another thread is generating, or the call would break an applied
    fusion.

    Attributes:
        handle: the handle of the fusion that is in the way, if there is one.
    """

    def __init__(self, message: str, issues: Iterable[str] = (), *, handle: Any = None) -> None:
        super().__init__(message, issues)
        self.handle = handle


def shown(text: object, limit: int = _SHOWN_CHARACTERS) -> str:
    """Return text from a file made safe for a terminal: no control characters, bounded length."""
    plain = str(text)
    if not plain.isprintable():
        plain = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain
        )
    if len(plain) > limit:
        plain = plain[: limit - 1] + "…"
    return plain


def _listing(issues: tuple[str, ...]) -> str:
    lines = [f"\n  - {issue}" for issue in issues[:_SHOWN_ISSUES]]
    if len(issues) > _SHOWN_ISSUES:
        lines.append(f"\n  - … and {len(issues) - _SHOWN_ISSUES} more")
    return "".join(lines)
