"""Checks of an output before the work begins."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click

from klora_runtime.artifact.replacing import Ours, check_place, wrong_kind


def check_output(
    output: Path, force: bool, inputs: Iterable[Path], folder_of: Ours | None = None
) -> None:
    """Check, before the work, that its result can be written.

    Args:
        output: the file or folder.
        force: whether to replace an existing one.
        inputs: the input files and folders, of which nothing must be overwritten.
        folder_of: for a folder, returns whether an existing one may contain a file of that name.
    """
    is_folder = folder_of is not None
    for path in inputs:
        if _is_same(output, path):
            raise click.UsageError(f"{output} is one of the inputs; name another file.")
        if is_folder and _is_same(output, path.absolute().parent):
            raise click.UsageError(f"{output} is the folder of the input; name another.")
        if path.is_dir() and any(_is_same(output, file) for file in path.rglob("*")):
            raise click.UsageError(f"{output} is a file of the input {path}; name another file.")
    if not os.path.isdir(output.absolute().parent):
        raise click.UsageError(f"{output.parent} is not a folder; make it first.")
    if problem := wrong_kind(output, folder=is_folder):
        raise click.UsageError(problem)
    check_place(output, overwrite=force, folder_of=folder_of)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them does not exist
        return False
