"""``klora inspect``: show the contents of an artifact or a LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klora_compile.commands.names import file_argument
from klora_compile.commands.parameters import shift_option
from klora_compile.commands.result import json_option, print_json
from klora_compile.commands.setting_options import reading_options
from klora_compile.report.plot_theme import THEMES
from klora_compile.settings.read_options import ReadOptions

if TYPE_CHECKING:
    from klora_runtime.artifact.fusion import Fusion


@click.command("inspect")
@file_argument
@json_option
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the schedule as a heat map into this picture (.png, .pdf, .svg).",
)
@click.option(
    "--theme",
    type=click.Choice(list(THEMES)),
    help="Colours of that picture.  [default: light]",
)
@shift_option
@click.option(
    "--norms",
    "numbers",
    is_flag=True,
    help="Read the numbers too, which takes longer. Of a LoRA: the norms, and whether the values "
    "can be compiled. Of a compressed artifact: how much all deltas lost, and the bytes of each.",
)
@reading_options
def inspect_command(
    file: Path,
    as_json: bool,
    plot: Path | None,
    theme: str | None,
    shift: float | None,
    numbers: bool,
    reading: ReadOptions,
) -> None:
    """Show the contents of FILE, an artifact, a LoRA, or a picture of klora sample.

    For an artifact: sources, rule, and each layer's schedule. For a LoRA (a file, or a folder that
    PEFT or diffusers saved): base model, layout, trainer, trigger words, forms, ranks, alphas and
    their sources, and keys that cannot be used. For a picture (.png): how it was made. Exit status
    1: the LoRA cannot be compiled.
    """
    from klora_runtime.artifact.document import is_artifact

    if theme is not None and plot is None:
        raise click.UsageError("--theme is of the picture that --plot draws; name one.")
    if file.suffix.lower() == ".png":
        _inspect_picture(file, as_json)
    elif is_artifact(file):
        _inspect_artifact(file, as_json, plot, theme or next(iter(THEMES)), shift, numbers)
    elif plot is not None:
        raise click.UsageError(f"{file} is not an artifact: --plot draws a schedule.")
    elif shift is not None:
        raise click.UsageError(f"{file} is not an artifact: --shift is of a schedule.")
    else:
        _inspect_lora(file, as_json, numbers, reading)


def _inspect_picture(file: Path, as_json: bool) -> None:
    from klora_compile.sampling.making import read_making
    from klora_runtime.errors import shown

    making = read_making(file)
    if as_json:
        print_json("picture", {"file": str(file), **making.json()})
        return
    for line in making.parameters().splitlines():
        click.echo(shown(line, limit=10_000))
    named = {**({"artifact": making.artifact} if making.artifact else {}), **making.loras}
    for name, each in named.items():
        hashes = (f"{kind} {each[kind]}" for kind in ("sha256", "autov2", "autov3") if kind in each)
        click.echo(f"{shown(name)}: {shown(each['file'])}, {shown(', '.join(hashes))}")


def _inspect_lora(file: Path, as_json: bool, numbers: bool, options: ReadOptions) -> None:
    from klora_compile.reading.adapter import look_into
    from klora_compile.report.lora import lora_json, lora_lines
    from klora_compile.report.summary import bytes_text
    from klora_compile.report.table import labelled
    from klora_runtime.errors import LoraError, shown

    found, result = look_into(file, options, values=numbers)
    adapter = None if isinstance(result, LoraError) else result
    if as_json:
        print_json("lora", lora_json(found, adapter))
    else:
        size = bytes_text(found.nbytes)
        click.echo(
            labelled([("LoRA", f"{shown(found.path)}, {size}"), *lora_lines(found, adapter)])
        )
    if isinstance(result, LoraError):
        raise result


def _inspect_artifact(
    file: Path,
    as_json: bool,
    plot: Path | None,
    theme: str,
    shift: float | None,
    numbers: bool,
) -> None:
    from klora_compile.report.compression import storage_lines
    from klora_compile.report.inspection import inspection
    from klora_compile.report.summary import bytes_text, summarise, summary_lines
    from klora_compile.report.table import labelled
    from klora_runtime.artifact.document import Document, load_document
    from klora_runtime.errors import shown

    document = load_document(file)
    fusion: Document | Fusion = document
    if numbers:
        if not document.is_compressed:
            raise click.UsageError(
                f"{file} is an artifact that is not compressed, so --norms adds nothing; leave it "
                "out."
            )
        from klora_runtime.artifact.file import load_fusion  # it imports torch

        fusion = load_fusion(file)
    if plot is not None:
        from klora_compile.report.plot import plot_schedule

        plot_schedule(fusion, plot, overwrite=True, shift=shift, theme=theme)
        click.echo(f"wrote {plot}", err=True)
    if as_json:
        print_json("fusion", inspection(fusion, shift))
        return

    from klora_compile.report.schedule_map import text_map

    rows = [("artifact", f"{shown(file)}, {bytes_text(file.stat().st_size)}, {shown(fusion.tool)}")]
    for name, source in fusion.sources.items():
        words = ", ".join(shown(word) for word in source.trigger_words)
        facts = [shown(source.file), bytes_text(source.bytes), f"sha256 {source.sha256[:12]}…"]
        facts += [f"licence {shown(source.license)}"] if source.license else []
        facts += [f"trigger words: {words}"] if words else []
        facts += _notes(source)
        rows.append((shown(name), ", ".join(facts)))
    click.echo(labelled(rows + summary_lines(summarise(fusion, shift)) + storage_lines(fusion)))
    click.echo()
    columns = shutil.get_terminal_size((100, 24)).columns
    click.echo(text_map(fusion, max(20, min(60, columns - 48)), shift))


def _notes(source: Any) -> list[str]:
    """Return notes on how a source was read, if it was unusual."""
    from klora_runtime.errors import shown

    notes = source.notes
    facts = []
    if isinstance(notes.get("forms"), dict):
        facts.append(f"forms {', '.join(map(shown, notes['forms']))}")
    if isinstance(notes.get("error"), float):
        facts.append(f"at most {notes['error']:.1e} of a delta lost")
    if "base" in notes:
        facts.append(f"against the base {shown(notes['base'])}")
    if isinstance(notes.get("unused"), list):
        facts.append(f"{len(notes['unused'])} keys left out")
    return facts
