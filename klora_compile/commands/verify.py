"""``klora verify``: whether an artifact is whole, and what its sources give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from klora_compile.commands.parameters import ARTIFACT, LORA, Device, base_option
from klora_compile.commands.progress import layer_bar


@click.command("verify")
@click.argument("file", type=ARTIFACT)
@click.option(
    "--against",
    nargs=2,
    type=LORA,
    metavar="CONTENT STYLE",
    help="Compile these LoRAs again with the artifact's settings and compare everything.",
)
@click.option(
    "--device", type=Device(), default="auto", show_default=True, help="Where to measure."
)
@base_option
def verify_command(
    file: Path, against: tuple[Path, Path] | None, device: str, base: Path | None
) -> None:
    """Check the artifact FILE: structure, digests, every tensor.

    Exit status 0: good. 1: not. 2: the command was not understood.
    """
    from klora_compile.reading.adapter import read_adapter
    from klora_compile.reading.options import ReadOptions
    from klora_compile.verify import differences
    from klora_runtime.artifact import load_fusion
    from klora_runtime.errors import KloraError, shown

    fusion = load_fusion(file, check="full")
    if against is None:
        click.echo(f"{shown(file)}: good ({len(fusion.entries)} layers, structure and digests)")
        return
    content, style = (
        read_adapter(path, ReadOptions.from_notes(_notes(fusion, role), base))
        for path, role in zip(against, ("content", "style"), strict=True)
    )
    with layer_bar("comparing") as on_layer:
        found = differences(fusion, content, style, device=device, on_layer=on_layer)
    if found:
        names = [shown(path) for path in (file, *against)]
        raise KloraError(f"{names[0]} is not what {names[1]} and {names[2]} give:", found)
    small = any(f.quantised for entry in fusion.entries for f in entry.factors.values())
    how = "as near to its sources as it states" if small else "equal to its sources"
    click.echo(f"{shown(file)}: good ({len(fusion.entries)} layers, {how})")


def _notes(fusion: Any, role: str) -> Mapping[str, Any]:
    source = fusion.sources.get(role)
    return {} if source is None else source.notes
