"""The error for a missing library that one of klora's extras installs."""

from __future__ import annotations

from klora_runtime.__about__ import INSTALL, install_command
from klora_runtime.errors import KloraError

_RUN = "Run this in klora's source folder:"
ADVICE = f"{_RUN} {INSTALL}"


def missing_library(what: str, error: ImportError, *extras: str) -> KloraError:
    """Return the error for a feature whose library only an extra installs.

    Args:
        what: the feature, such as ``klora sample``.
        error: the failed import, which names the module.
        extras: the extras that install it, if they are others than those that most users need.
    """
    library = (error.name or "a library").partition(".")[0]
    advice = f"{_RUN} {install_command(*extras)}" if extras else ADVICE
    return KloraError(f"{what} needs {library}, which is not installed. {advice}")
