"""What is checked of an output file before the work begins."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click

from klora_compile.writing import require_writable


def check_output(output: Path, force: bool, inputs: Iterable[Path]) -> None:
    """See, before the work, that its result can be written."""
    if any(output.exists() and output.samefile(path) for path in inputs):
        raise click.UsageError(f"{output} is one of the inputs; name another file.")
    if not output.parent.is_dir():
        raise click.UsageError(f"{output.parent} is not a folder; make it first.")
    if output.exists() and not output.is_file():
        raise click.UsageError(f"{output} is not a regular file; name another.")
    if os.path.lexists(output) and not force:
        raise click.ClickException(f"{output} exists already; add --force to overwrite it.")
    require_writable(output)
