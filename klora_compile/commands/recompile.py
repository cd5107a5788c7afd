"""``klora recompile``: give an artifact another schedule, without its LoRAs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from klora_compile.commands.names import artifact_argument
from klora_compile.commands.output import check_output
from klora_compile.commands.parameters import (
    artifact_output,
    drop_unused_option,
    shift_option,
)
from klora_compile.commands.result import json_option, print_json
from klora_compile.commands.rule_options import AllRulesCommand, rule_option
from klora_compile.commands.setting_options import given, shared_options


@click.command("recompile", cls=AllRulesCommand)
@artifact_argument
@artifact_output
@rule_option(None)
@shared_options("as FILE")
@drop_unused_option
@shift_option
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
def recompile_command(
    file: Path,
    output: Path,
    rule: str | None,
    drop_unused: bool,
    shift: float | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Give the artifact FILE another schedule, from the scores that it holds.

    Settings that are not named stay as in FILE; a new rule starts with its own defaults. Settings
    that need the LoRAs themselves are refused, and so are schedules that use what
    klora compile --drop-unused left out of FILE.
    """
    check_output(output, force, inputs=(file,))

    from klora_compile.report.summary import bytes_text, summarise, summary_lines
    from klora_compile.report.table import labelled
    from klora_compile.rescheduling import reschedule
    from klora_compile.runs import runs_of
    from klora_compile.settings.config import Config
    from klora_runtime.artifact.file import load_fusion, save_fusion
    from klora_runtime.errors import shown

    before = load_fusion(file, check="full")  # new digests would hide damage
    begin = time.perf_counter()
    config = Config.of_fusion(before).changed(rule, **given(settings))
    runs_of(config.settings.clock, shift)
    fusion = reschedule(before, config.rule, config.settings)
    if drop_unused:
        from klora_compile.storing.dropping import drop_unused as without_unused

        fusion = without_unused(fusion)
    seconds = time.perf_counter() - begin
    size = save_fusion(fusion, output, overwrite=force)
    summary = summarise(fusion, shift)
    if as_json:
        facts = {"output": str(output), "bytes_out": size, "seconds": seconds}
        print_json("recompilation", facts | summary.json())
        return
    rows = [("artifact", f"{shown(output)}, {bytes_text(size)}"), *summary_lines(summary)]
    rows.append(("rescheduled", f"in {1e3 * seconds:.0f} ms"))
    click.echo(labelled(rows))
