"""``klora verify``: check an artifact, alone or against its sources."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from klora_compile.commands.lora_files import (
    Files,
    LoraFiles,
    halves_order,
    lora_of,
    refuse_idle_order,
)
from klora_compile.commands.names import Named, artifact_argument, located_files
from klora_compile.commands.parameters import Device, signed_by_option
from klora_compile.commands.progress import layer_bar
from klora_compile.commands.result import json_option, print_json
from klora_compile.commands.setting_options import base_option
from klora_compile.halves import Halves
from klora_compile.slots import in_order, slots_of

if TYPE_CHECKING:
    from klora_compile.report.verification import Verification
    from klora_runtime.artifact.fusion import Fusion


@click.command("verify")
@artifact_argument
@click.argument("loras", nargs=-1, type=LoraFiles(), metavar="[CONTENT STYLE]")
@click.option(
    "--against",
    is_flag=True,
    help="Compile the LoRAs that follow FILE, contents first, with the artifact's settings and "
    "compare everything.",
)
@click.option(
    "--device", type=Device(), default="auto", show_default=True, help="Where to measure."
)
@halves_order
@base_option
@signed_by_option
@json_option
def verify_command(
    file: Path,
    loras: tuple[Files, ...],
    against: bool,
    halves: str | None,
    device: str,
    base: Named | None,
    signed_by: Path | None,
    as_json: bool,
) -> None:
    """Check the artifact FILE: structure, digests, every tensor; with --signed-by its signature.

    With --against CONTENT STYLE, also compile these LoRAs and compare; name more than two in the
    order in which they were compiled, and after them those that always act, by name.

    Exit status 0: good. 1: not. 2: the command was not understood.
    """
    if bool(loras) != against:
        raise click.UsageError("name the artifact's LoRAs after FILE together with --against.")

    from klora_compile.report.verification import Verification
    from klora_runtime.artifact.whole_document import load_whole_document
    from klora_runtime.errors import ArtifactError

    named = {str(place): given for place, given in enumerate(loras)}
    loras = tuple(located_files(named, ()).values())
    files = tuple(Path(path) for lora in loras for path in lora)
    try:
        if against:
            verification = _compared(file, files, loras, halves, device, base, signed_by)
        else:
            document = load_whole_document(file, signed_by)
            verification = Verification(file, files, document, signed_by=signed_by)
    except ArtifactError as unreadable:
        if as_json:
            print_json("verification", Verification(file, files).json(unreadable))
        raise
    error = verification.error()
    if as_json:
        print_json("verification", verification.json(error))
    if error is not None:
        raise error
    if not as_json:
        click.echo(verification.text())


def _compared(
    file: Path,
    files: tuple[Path, ...],
    loras: tuple[Files, ...],
    halves: str | None,
    device: str,
    base: Named | None,
    signed_by: Path | None,
) -> Verification:
    """Compile the LoRAs again and compare."""
    from klora_compile.report.verification import Verification
    from klora_compile.verify import not_compared, not_computed, verify_fusion
    from klora_runtime.artifact.file import load_fusion

    fusion = load_fusion(file, check="full", signed_by=signed_by)
    sources = _by_slot(file, fusion, loras, halves)
    with layer_bar("comparing") as on_layer:
        found = verify_fusion(fusion, sources, base=base, device=device, on_layer=on_layer)
    return Verification(
        file,
        files,
        fusion,
        tuple(found),
        skipped=not_compared(fusion),
        taken=tuple(not_computed(fusion)),
        signed_by=signed_by,
    )


def _by_slot(
    file: Path, fusion: Fusion, loras: tuple[Files, ...], halves: str | None
) -> dict[str, Path | Halves[Path]]:
    """Return the LoRAs in the order of the artifact's slots."""
    from klora_runtime.errors import shown

    refuse_idle_order(halves, loras)
    names = in_order(slots_of(fusion.sources))
    if len(names) != len(loras):
        raise click.UsageError(
            f"{file} was compiled from {len(names)} LoRAs ({', '.join(map(shown, names))}), "
            f"{len(loras)} were named; name all of them in this order."
        )
    return {
        name: lora_of(files, halves, both=name not in fusion.sources)
        for name, files in zip(names, loras, strict=True)
    }
