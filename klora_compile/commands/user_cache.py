"""The user's cache of statistics, for commands that measure."""

from __future__ import annotations

from pathlib import Path

import click

no_cache_option = click.option(
    "--no-cache",
    is_flag=True,
    help="Measure all LoRAs, and keep nothing for the next time.",
)


def user_cache(no_cache: bool) -> Path | None:
    """Return the folder of the user's cache; None, with a warning, if there can be none.

    Args:
        no_cache: whether the user wants none.
    """
    if no_cache:
        return None
    from klora_compile.profiles.store import cache_folder

    folder = cache_folder()
    if folder is None:
        click.echo(
            "no folder for the cache can be made, so no statistics are kept; set KLORA_CACHE to "
            "one, or add --no-cache.",
            err=True,
        )
    return folder
