"""What to say where a library of one of klora's extras is missing."""

from __future__ import annotations

from klora_runtime.__about__ import INSTALL
from klora_runtime.errors import KloraError

ADVICE = f"Run this in klora's source folder: {INSTALL}"


def missing_library(what: str, error: ImportError) -> KloraError:
    """The error of something that needs a library which only an extra installs.

    Args:
        what: what needs it, such as ``klora sample``.
        error: says which module cannot be imported.
    """
    library = (error.name or "a library").partition(".")[0]
    return KloraError(f"{what} needs {library}, which is not installed. {ADVICE}")
