"""``klora card``: a model card for an artifact."""

from __future__ import annotations

import os
from pathlib import Path

import click

from klora_compile.commands.names import artifact_argument
from klora_compile.commands.output import check_output
from klora_compile.commands.parameters import HubId, samples_option
from klora_compile.commands.result import json_option, print_json

_STDOUT = Path("-")


@click.command("card")
@artifact_argument
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The card to write, README.md on the Hub; - prints it.",
)
@click.option("--base-model", type=HubId(), help="The base model's id on the Hub.")
@click.option(
    "--license",
    "licence",
    metavar="LICENCE",
    help="Licence of the fused file.  [default: as its sources state]",
)
@click.option(
    "--map",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PICTURE.png",
    help="Draw the schedule as a heat map into this file too, and show it in the card.",
)
@samples_option
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@json_option
def card_command(
    file: Path,
    output: Path,
    base_model: str | None,
    licence: str | None,
    picture: Path | None,
    samples: tuple[tuple[Path, str], ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write a model card for the artifact FILE, as the Hugging Face Hub reads it.

    The card says where the LoRAs come from, which of them acts when, and how to load the file.
    Equal input gives equal bytes.
    """
    if output == _STDOUT and as_json:
        raise click.UsageError("-o - prints the card, so --json has no place; name a file.")
    _check_places(file, output, picture, force)

    from klora_compile.report.card import model_card
    from klora_compile.report.card_facts import CardFacts, Sample
    from klora_runtime.artifact.replacing import replacing
    from klora_runtime.artifact.whole_document import load_whole_document
    from klora_runtime.errors import shown

    fusion = load_whole_document(file)
    folder = Path() if output == _STDOUT else output.parent

    def link(place: Path) -> str:
        return Path(os.path.relpath(place, folder)).as_posix()

    facts = CardFacts.of(
        file,
        base_model=base_model,
        licence=licence,
        picture=None if picture is None else link(picture),
        samples=tuple(Sample(link(place), prompt) for place, prompt in samples),
    )
    card = model_card(fusion, facts)
    if picture is not None:
        from klora_compile.report.plot import plot_schedule  # it imports numpy

        plot_schedule(fusion, picture, overwrite=force)
        if not as_json:
            click.echo(f"wrote {shown(picture)}", err=output == _STDOUT)
    if output == _STDOUT:
        click.echo(card, nl=False)
        return
    with replacing(output, overwrite=force) as temporary:
        temporary.write_bytes(card.encode())
    if as_json:
        drawn = None if picture is None else str(picture)
        print_json("card", {"output": str(output), "bytes_out": len(card.encode()), "map": drawn})
        return
    click.echo(f"wrote {shown(output)}")


def _check_places(file: Path, output: Path, picture: Path | None, force: bool) -> None:
    """Check, before the work, that the card and the map can be written."""
    if output != _STDOUT:
        check_output(output, force, inputs=(file,))
    if picture is None:
        return
    if picture.suffix.lower() != ".png":
        raise click.UsageError(f"--map {picture}: expected a name that ends in .png.")
    check_output(picture, force, inputs=(file,))
    if output.absolute() == picture.absolute():
        raise click.UsageError(f"-o and --map are both {output}; name two files.")
