"""The error for a missing library that one of klora's extras installs."""

from __future__ import annotations

from klora_runtime.__about__ import INSTALL
from klora_runtime.errors import KloraError

ADVICE = f"Run this in klora's source folder: {INSTALL}"


def missing_library(what: str, error: ImportError) -> KloraError:
    """Return the error for a feature whose library only an extra installs.

    Args:
        what: the feature, such as ``klora sample``.
        error: the failed import, which names the module.
    """
    library = (error.name or "a library").partition(".")[0]
    return KloraError(f"{what} needs {library}, which is not installed. {ADVICE}")
