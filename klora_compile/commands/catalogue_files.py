"""``klora catalogue list``, ``show``, ``check``, ``get`` and ``steps``: commands on a catalogue."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klora_compile.commands.output import check_output
from klora_compile.commands.parameters import artifact_output, engine_option, workers_option
from klora_compile.commands.progress import lora_bar
from klora_compile.commands.result import json_option, print_json
from klora_compile.commands.setting_options import base_option

if TYPE_CHECKING:
    from klora_compile.commands.names import Named
    from klora_runtime.catalogue.document import CataloguedLora
    from klora_runtime.catalogue.opened import OpenCatalogue

_catalogue = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_loras = click.option(
    "--loras",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The folder with the LoRAs, which are found by their digests.",
)


@click.command("list")
@_catalogue
@click.option("--family", help="Only LoRAs that may be for this base model.")
@click.option("--licence", metavar="GLOB", help="Only LoRAs whose licence matches this.")
@click.option("--pairs", is_flag=True, help="List pairs instead of LoRAs.")
@json_option
def list_command(
    file: Path, family: str | None, licence: str | None, pairs: bool, as_json: bool
) -> None:
    """List the LoRAs of the catalogue FILE, or its pairs."""
    from klora_compile.cataloguing.table import row_of
    from klora_compile.report.table import text_table
    from klora_runtime.catalogue.opened import OpenCatalogue
    from klora_runtime.errors import shown

    catalogue = OpenCatalogue.open(file)
    taken = [
        number
        for number, lora in enumerate(catalogue.document.loras)
        if _is_taken(lora, family, licence)
    ]
    names = {catalogue.document.loras[number].name for number in taken}
    if pairs:
        rows = [row_of(f) for f in catalogue.pairs() if {f.content, f.style} <= names]
        if as_json:
            print_json("catalogue_pairs", {"pairs": rows})
            return
        cells = [
            [shown(r["content"]), shown(r["style"]), shown(r["reason"] or r["verdict"], 100)]
            for r in rows
        ]
        click.echo(text_table(cells, heads=("content", "style", "verdict")))
        return
    facts = [_lora_facts(catalogue, number) for number in taken]
    if as_json:
        print_json("catalogue_loras", {"loras": facts})
        return
    cells = [
        [
            shown(each["name"]),
            " ".join(each["roles"]),
            " or ".join(map(shown, each["families"])),
            " ".join(map(str, each["ranks"])),
            shown(each["license"] or "", 30),
            str(each["layers"]),
        ]
        for each in facts
    ]
    heads = ("LoRA", "roles", "base model", "ranks", "licence", "layers")
    click.echo(text_table(cells, heads=heads))


@click.command("show")
@_catalogue
@click.argument("subject")
@click.argument("style")
@json_option
def show_command(file: Path, subject: str, style: str, as_json: bool) -> None:
    """Show the pair SUBJECT in STYLE of the catalogue FILE: its verdict, gamma and schedule."""
    from klora_compile.cataloguing.table import row_of
    from klora_compile.report.table import labelled
    from klora_runtime.catalogue.opened import OpenCatalogue
    from klora_runtime.errors import shown
    from klora_runtime.linking.entries import layers_of

    catalogue = OpenCatalogue.open(file)
    facts = row_of(catalogue.facts(subject, style))
    fates: dict[str, int] = {}
    if facts["verdict"] == "linked":
        for layer in layers_of(catalogue.link(subject, style)):
            fates[layer.fate] = fates.get(layer.fate, 0) + 1
    if as_json:
        print_json("catalogue_pair", facts | {"layers": fates})
        return
    rows = [("pair", f"{shown(subject)} in {shown(style)}"), ("verdict", facts["verdict"])]
    if facts["reason"]:
        rows.append(("reason", shown(facts["reason"], 400)))
    rows += [("gamma", f"{name} {value}") for name, value in facts["gamma"].items()]
    rows += [("layers", f"{count} {shown(fate)}") for fate, count in sorted(fates.items())]
    rows.append(("rule", shown(catalogue.document.terms.rule)))
    click.echo(labelled(rows))


@click.command("check")
@_catalogue
@_loras
@click.option(
    "--all", "every", is_flag=True, help="Link every pair again, not some of each subject."
)
@workers_option
@engine_option
@json_option
def check_command(
    file: Path, loras: Path | None, every: bool, workers: int, engine: str, as_json: bool
) -> None:
    """Check the catalogue FILE: its format, its digests, and pairs that are linked again."""
    from klora_compile.cataloguing.checking import check
    from klora_compile.engines import engine_of
    from klora_runtime.catalogue.folder import LoraFolder
    from klora_runtime.catalogue.opened import OpenCatalogue
    from klora_runtime.errors import KloraError

    folder = None if loras is None else LoraFolder(loras)
    with lora_bar("linking") as on_pairs:
        found = check(
            OpenCatalogue.open(file),
            every=every,
            folder=folder,
            engine=engine_of(engine, workers),
            on_pairs=on_pairs,
        )
    if as_json:
        facts = {"loras": found.loras, "pairs": found.pairs, "files": found.files}
        print_json("catalogue_check", facts | {"problems": found.problems})
    if found.problems:
        raise KloraError(f"{len(found.problems)} problems:", found.problems)
    if not as_json:
        click.echo(
            f"{found.loras} LoRAs, {found.pairs} pairs linked again and {found.files} files of "
            "LoRAs are as the catalogue says"
        )


@click.command("get")
@_catalogue
@click.argument("subject")
@click.argument("style")
@artifact_output
@_loras
@base_option
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
def get_command(
    file: Path,
    subject: str,
    style: str,
    output: Path,
    loras: Path | None,
    base: Named | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the artifact of SUBJECT in STYLE, with the bytes of klora compile.

    Without --loras it is thin, as klora compile --thin writes it.
    """
    check_output(output, force, inputs=(file,))
    from klora_compile.report.summary import bytes_text
    from klora_runtime.artifact.file import save_fusion
    from klora_runtime.catalogue.opened import OpenCatalogue
    from klora_runtime.errors import shown

    catalogue = OpenCatalogue.open(file, loras=loras)
    fusion = _fusion(catalogue, subject, style, loras, base)
    size = save_fusion(fusion, output, overwrite=force)
    if as_json:
        print_json("catalogue_artifact", {"output": str(output), "bytes_out": size})
    else:
        click.echo(f"{shown(output)}, {bytes_text(size)}")


@click.command("steps")
@_catalogue
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The table to write.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
def steps_command(file: Path, output: Path, force: bool, as_json: bool) -> None:
    """Export the choices of FILE as a flat table for other programs.

    The table has 16 bits for each layer of each pair, so it is not exact; the catalogue is.
    """
    check_output(output, force, inputs=(file,))
    from klora_compile.cataloguing.steps import write_steps
    from klora_compile.report.summary import bytes_text
    from klora_runtime.catalogue.opened import OpenCatalogue
    from klora_runtime.errors import shown

    size = write_steps(OpenCatalogue.open(file), output, overwrite=force)
    if as_json:
        print_json("catalogue_steps", {"output": str(output), "bytes_out": size, "exact": False})
    else:
        click.echo(f"{shown(output)}, {bytes_text(size)}; rounded to 16 bits, not exact")


def _fusion(
    catalogue: OpenCatalogue, subject: str, style: str, loras: Path | None, base: Named | None
) -> Any:
    """Return the fusion of a pair; the compiler computes factors that no file holds."""
    slots = catalogue.slots_of(subject, style)
    own = {slot: catalogue.document.loras[number] for slot, number in slots.items()}
    if loras is None or all(lora.keys is not None for lora in own.values()):
        return catalogue.fusion(subject, style)
    from klora_compile.cataloguing.compiling import compiled

    catalogue.link(subject, style)  # refuses a pair that does not fit
    return compiled(catalogue.document.terms, own, loras, base)


def _is_taken(lora: CataloguedLora, family: str | None, licence: str | None) -> bool:
    stated = [(source.license or "").lower() for source in lora.sources.values()]
    return (family is None or family in lora.families) and (
        licence is None or all(fnmatchcase(each, licence.lower()) for each in stated)
    )


def _lora_facts(catalogue: OpenCatalogue, number: int) -> dict[str, Any]:
    document = catalogue.document
    lora = document.loras[number]
    roles = [
        role
        for role, numbers in (("content", document.contents), ("style", document.styles))
        if number in numbers
    ]
    return {
        "name": lora.name,
        "roles": roles + [slot for slot, each in document.always.items() if each == number],
        "families": lora.families,
        "ranks": lora.ranks.distinct,
        "license": next(iter(lora.sources.values())).license,
        "layers": len(lora.table.places),
        "files": {half: source.file for half, source in lora.sources.items()},
        "sha256": {half: source.sha256 for half, source in lora.sources.items()},
    }
