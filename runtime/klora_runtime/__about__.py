"""The one place that states klora's version, address and installation. Builds read it, too."""

from __future__ import annotations

#: Of both distributions, ``klora-compile`` and ``klora-runtime``.
__version__ = "0.1.0"

#: The page of klora's repository, such as ``https://HOST/OWNER/klora``; None until its owner
#: fills it in. Project links, and the pictures of the README on a package index, come from it.
REPOSITORY: str | None = None


def install_command(*extras: str) -> str:
    """The command that installs both distributions, run in klora's source folder.

    Args:
        extras: of ``klora-compile``, such as ``plot``.
    """
    return f"pip install ./runtime '.[{','.join(extras)}]'"


#: What errors, cards and documents advise: no package index has klora.
INSTALL = install_command("plot", "sample")
