"""The arguments of commands that draw with the base, the judges and the LoRAs of one regime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from drawings.loras.recipes import Regime

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)

_PLACES = (
    click.argument("packages", type=_FOLDER),
    click.argument("run", type=_FOLDER),
    click.argument("loras", type=_FOLDER),
    click.argument("out", type=click.Path(file_okay=False, path_type=Path)),
    click.argument("regime", type=click.Choice([regime.value for regime in Regime])),
)


def places(command: Callable[..., None]) -> Callable[..., None]:
    """Add PACKAGES, RUN, LORAS, OUT and REGIME to a command."""
    for place in reversed(_PLACES):
        command = place(command)
    return command
