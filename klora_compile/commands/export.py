"""``klora export``: write an artifact as ordinary LoRAs, for tools without schedules."""

from __future__ import annotations

from pathlib import Path

import click

from klora_compile.commands.names import artifact_argument
from klora_compile.commands.output import check_output
from klora_compile.commands.parameters import shift_option, source_option
from klora_compile.commands.result import json_option, print_json
from klora_compile.export.schedule import MAX_STEPS, STEPS, is_export
from klora_compile.export.settings import ExportSettings, Keys, Precision


@click.command("export")
@artifact_argument
@click.option("--static", is_flag=True, help="One LoRA: the average over all of the sampling.")
@click.option(
    "--phases",
    type=click.IntRange(2, 100),
    metavar="N",
    help="N LoRAs, each the average over one of N equal ranges of progress, and schedule.json.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The .safetensors file to write; with --phases the folder.",
)
@click.option(
    "--keys",
    type=click.Choice(["kohya", "peft"]),
    default="kohya",
    show_default=True,
    help="kohya: the names that ComfyUI, A1111 and Forge read. peft: the names of diffusers, which "
    "no other tool reads whole.",
)
@click.option(
    "--rank",
    type=click.IntRange(1, 4096),
    help="Cut every layer to this rank, by SVD.  [default: the sum of the ranks of all LoRAs, "
    "and of all modules that kohya's names fuse]",
)
@click.option(
    "--gain",
    type=float,
    default=1.0,
    show_default=True,
    help="Factor on the denoiser's deltas. An average of choices is weaker than a sum.",
)
@click.option(
    "--dtype",
    "--torch-dtype",
    "dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    help="Type of the tensors.  [default: the widest type of the sources; float16 if they are "
    "compressed]",
)
@click.option(
    "--steps",
    "--num-inference-steps",
    "steps",
    type=click.IntRange(1, MAX_STEPS),
    multiple=True,
    help="A number of steps for which schedule.json states the steps of each phase. Repeat it for "
    f"several.  [default: {', '.join(map(str, STEPS))}]",
)
@source_option
@shift_option
@click.option("--force", is_flag=True, help="Overwrite an existing file, or an earlier export.")
@json_option
def export_command(
    file: Path,
    static: bool,
    phases: int | None,
    output: Path,
    keys: Keys,
    rank: int | None,
    gain: float,
    dtype: Precision | None,
    steps: tuple[int, ...],
    sources: tuple[tuple[str, Path], ...],
    shift: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the artifact FILE as ordinary LoRAs.

    Ordinary LoRAs hold no schedule: every layer gets the average of its schedule. The output states
    how far the schedule is from the average; more phases lose less.

    With --phases, schedule.json says when each LoRA acts: as steps for one KSamplerAdvanced of
    ComfyUI per phase, as a fraction of the steps, and as a percentage of the timesteps (ComfyUI's
    start_percent). The last two are equal only if the sampler's timesteps are spaced linearly. If
    the schedule follows the noise, it says so by noise level, and for the shifts that it assumes
    (--shift).
    """
    settings = ExportSettings(keys=keys, rank=rank, gain=gain, dtype=dtype)
    if static == (phases is not None):
        raise click.UsageError("name one of --static and --phases N.")
    if static and shift is not None:
        raise click.UsageError("--shift is for schedule.json, which --phases writes.")
    if static and steps:
        raise click.UsageError("--steps is for schedule.json, which --phases writes.")
    inputs = (file, *(path for _, path in sources))
    check_output(output, force, inputs, folder_of=None if phases is None else is_export)

    from klora_compile.export.writing import export_phases, export_static
    from klora_compile.report.exported import phase_lines, static_lines
    from klora_compile.report.table import labelled
    from klora_runtime.artifact.file import load_fusion
    from klora_runtime.artifact.references import complete
    from klora_runtime.errors import shown

    fusion = complete(load_fusion(file, check="full"), dict(sources))
    if phases is None:
        lora = export_static(fusion, output, settings, overwrite=force)
        facts, rows = lora.json(), static_lines(lora)
    else:
        folder = export_phases(
            *(fusion, output, phases, settings),
            overwrite=force,
            shift=shift,
            steps=steps or STEPS,
        )
        facts, rows = folder.json(), phase_lines(folder)
    if as_json:
        print_json("export", {"output": str(output), **facts})
        return
    click.echo(labelled([("LoRA" if phases is None else "LoRAs", shown(output)), *rows]))
