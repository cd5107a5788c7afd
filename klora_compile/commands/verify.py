"""``klora verify``: whether an artifact is whole, and what its sources give."""

from __future__ import annotations

from pathlib import Path

import click

from klora_compile.commands.parameters import ARTIFACT, LORA, Device
from klora_compile.commands.progress import layer_bar
from klora_compile.commands.setting_options import base_option


@click.command("verify")
@click.argument("file", type=ARTIFACT)
@click.argument("loras", nargs=-1, type=LORA, metavar="[CONTENT STYLE]")
@click.option(
    "--against",
    is_flag=True,
    help="Compile the LoRAs that follow FILE, contents first, with the artifact's settings and "
    "compare everything.",
)
@click.option(
    "--device", type=Device(), default="auto", show_default=True, help="Where to measure."
)
@base_option
def verify_command(
    file: Path, loras: tuple[Path, ...], against: bool, device: str, base: Path | None
) -> None:
    """Check the artifact FILE: structure, digests, every tensor.

    With --against CONTENT STYLE also that it is what these LoRAs give; of more than two, in the
    order in which they were compiled.

    Exit status 0: good. 1: not. 2: the command was not understood.
    """
    if bool(loras) != against:
        raise click.UsageError("name the artifact's LoRAs after FILE together with --against.")

    from klora_compile.reading.adapter import read_adapter
    from klora_compile.settings.read_options import ReadOptions
    from klora_compile.slots import CONTENT, in_order, role_of
    from klora_compile.verify import differences, keeps_other_sums
    from klora_runtime.artifact.file import load_fusion
    from klora_runtime.errors import KloraError, shown

    fusion = load_fusion(file, check="full")
    if not against:
        click.echo(f"{shown(file)}: good ({len(fusion.entries)} layers, structure and digests)")
        return
    names = in_order(fusion.sources)
    if len(names) != len(loras):
        raise click.UsageError(
            f"{file} was compiled from {len(names)} LoRAs ({', '.join(map(shown, names))}), "
            f"{len(loras)} were named."
        )
    adapters = {
        name: read_adapter(path, ReadOptions.from_notes(fusion.sources[name].notes, base))
        for name, path in zip(names, loras, strict=True)
    }
    contents = [each for name, each in adapters.items() if role_of(name) == CONTENT]
    styles = [each for name, each in adapters.items() if role_of(name) != CONTENT]
    with layer_bar("comparing") as on_layer:
        found = differences(fusion, contents, styles, device=device, on_layer=on_layer)
    if found:
        given = " and ".join(shown(path) for path in loras)
        raise KloraError(f"{shown(file)} is not what {given} give:", found)
    small = any(f.quantised for entry in fusion.entries for f in entry.factors.values())
    how = "as near to its sources as it states" if small else "equal to its sources"
    if keeps_other_sums(fusion):
        how += "; sums of an earlier rule, which this one does not go by, were not compared"
    click.echo(f"{shown(file)}: good ({len(fusion.entries)} layers, {how})")
