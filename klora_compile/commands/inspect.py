"""``klora inspect``: what is inside an artifact, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from klora_compile.commands.parameters import ARTIFACT


@click.command("inspect")
@click.argument("file", type=ARTIFACT)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the schedule as a heat map into this picture (.png, .pdf, .svg).",
)
def inspect_command(file: Path, as_json: bool, plot: Path | None) -> None:
    """Show what the artifact FILE holds: sources, rule, and each layer's schedule."""
    from klora_compile.report.inspection import inspection
    from klora_compile.report.summary import bytes_text, summarise, summary_lines, table
    from klora_runtime.artifact import load_fusion
    from klora_runtime.errors import shown

    fusion = load_fusion(file)
    if plot is not None:
        from klora_compile.report.plot import plot_schedule

        plot_schedule(fusion, plot)
        click.echo(f"wrote {plot}", err=True)
    if as_json:
        click.echo(json.dumps(inspection(fusion)))
        return

    from klora_compile.report.schedule_map import text_map

    rows = [("artifact", f"{shown(file)}, {bytes_text(file.stat().st_size)}, {shown(fusion.tool)}")]
    for name, source in fusion.sources.items():
        words = ", ".join(shown(word) for word in source.trigger_words)
        facts = [shown(source.file), bytes_text(source.bytes), f"sha256 {source.sha256[:12]}…"]
        facts += [f"licence {shown(source.license)}"] if source.license else []
        facts += [f"trigger words: {words}"] if words else []
        rows.append((shown(name), ", ".join(facts)))
    click.echo(table(rows + summary_lines(summarise(fusion))))
    click.echo()
    columns = shutil.get_terminal_size((100, 24)).columns
    click.echo(text_map(fusion, width=max(20, min(60, columns - 48))))
