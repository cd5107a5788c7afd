"""``klora cache``: how much klora keeps of what it measured, and how to delete it."""

from __future__ import annotations

from pathlib import Path

import click

from klora_compile.commands.result import json_option, print_json


@click.command("cache")
@click.option(
    "--store",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The store of klora profile.  [default: the cache of klora compile]",
)
@click.option("--info", "action", flag_value="info", help="Print how much it holds.")
@click.option("--clear", "action", flag_value="clear", help="Delete what it holds.")
@json_option
def cache_command(store: Path | None, action: str | None, as_json: bool) -> None:
    """Print or delete what klora keeps of measured LoRAs.

    Nothing is lost but time: what is missing or damaged is measured again. The cache of klora
    compile stays within 1 GiB; what was not used for longest goes first.
    """
    if action is None:
        raise click.UsageError("say what to do: --info or --clear.")
    from klora_compile.profiles.store import CACHE_BYTES, Store, cache_folder
    from klora_compile.report.summary import bytes_text
    from klora_compile.report.table import labelled
    from klora_runtime.errors import KloraError, shown

    folder = store or cache_folder()
    if folder is None:
        raise KloraError("no folder for the cache can be made; set KLORA_CACHE to one.")
    held = Store(folder)
    found = held.clear() if action == "clear" else held.contents()
    refused = [] if action == "clear" else list(held.quarantined())
    if as_json:
        facts = {
            "folder": str(folder),
            "cleared": action == "clear",
            "files": dict(found.files),
            "bytes": found.nbytes,
            "limit": CACHE_BYTES if store is None else None,
            "quarantine": [vars(each) for each in refused],
        }
        print_json("cache", facts)
        return
    rows = [("folder", shown(folder))]
    rows += [(name, f"{count} files") for name, count in found.files.items()]
    rows.append(("size", bytes_text(found.nbytes)))
    click.echo(labelled(rows))
    for each in refused:
        click.echo(f"refused {shown(each.path)}: {shown(each.reason, 1000)}")
    if action == "clear":
        click.echo("deleted")
