"""The one place that states klora's version, address and installation. Builds also read it."""

from __future__ import annotations

#: The version of both distributions, ``klora-compile`` and ``klora-runtime``.
__version__ = "0.1.0"

#: The address of klora's repository, such as ``https://HOST/OWNER/klora``; None until its owner
#: fills it in. Project links, and README pictures on a package index, are built from it.
REPOSITORY: str | None = None


def install_command(*extras: str) -> str:
    """Return the command that installs both distributions, run in klora's source folder.

    Args:
        extras: extras of ``klora-compile``, such as ``plot``.
    """
    return f"pip install ./runtime '.[{','.join(extras)}]'"


#: The command that errors, cards and documents advise; klora is on no package index.
INSTALL = install_command("plot", "sample")

#: The command that installs what a recipient of an artifact needs, and diffusers.
INSTALL_RUNTIME = "pip install './runtime[hub]' diffusers transformers accelerate"
