"""``klora compile``: compile LoRAs to one artifact."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from klora_compile.commands.beside import Beside
from klora_compile.commands.calibration_options import Calibrating, calibration_options
from klora_compile.commands.lora_arguments import NamedLoras, lora_arguments
from klora_compile.commands.lora_files import Files
from klora_compile.commands.output import check_output
from klora_compile.commands.parameters import (
    Device,
    artifact_output,
    drop_unused_option,
    shift_option,
)
from klora_compile.commands.progress import layer_bar, part_bar
from klora_compile.commands.result import json_option, print_result
from klora_compile.commands.rule_options import RuleCommand, rule_option
from klora_compile.commands.setting_options import given, reading_options, shared_options
from klora_compile.commands.user_cache import no_cache_option, user_cache
from klora_compile.rules.lookup import DEFAULT_RULE, RULE_OF_A_MODEL
from klora_compile.settings.read_options import ReadOptions
from klora_compile.slots import slots_of
from klora_compile.storing.tolerances import BY, By

if TYPE_CHECKING:
    from klora_compile.reading.adapter import Adapter
    from klora_runtime.artifact.fusion import Fusion


@click.command("compile", cls=RuleCommand)
@lora_arguments
@artifact_output
@rule_option(DEFAULT_RULE)
@shared_options()
@reading_options
@click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Where to measure. auto takes a GPU if there is one.",
)
@no_cache_option
@calibration_options
@drop_unused_option
@click.option(
    "--compress",
    type=click.FloatRange(1e-5, 0.5),
    metavar="TOL",
    help="Store each delta in the fewest bits that lose at most this share of it, such as 0.01.  "
    "[default: lose nothing]",
)
@click.option(
    "--compress-by",
    type=click.Choice(BY),
    help="What TOL of --compress holds for: each layer's delta, or each LoRA as a whole. The "
    "latter takes fewer bytes for equal pictures; strong layers lose less than weak ones.  "
    "[default: layer]",
)
@click.option(
    "--thin",
    "as_thin",
    is_flag=True,
    help="Store the schedule alone; applying it needs the LoRA files.",
)
@shift_option
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
def compile_command(
    loras: tuple[Files, ...],
    content: tuple[Files, ...],
    style: tuple[Files, ...],
    always: tuple[Beside, ...],
    halves: str | None,
    both_denoisers: bool,
    weight_names: tuple[tuple[str | None, str], ...],
    output: Path,
    device: str,
    no_cache: bool,
    calibrating: Calibrating | None,
    drop_unused: bool,
    compress: float | None,
    compress_by: By | None,
    as_thin: bool,
    shift: float | None,
    force: bool,
    as_json: bool,
    reading: ReadOptions,
    rule: str,
    **settings: Any,
) -> None:
    """Fuse the LoRAs CONTENT (a subject) and STYLE into one artifact.

    Each LoRA is a file (.safetensors, .pt, .bin, .ckpt) or a folder that PEFT or diffusers saved,
    or a name on the Hugging Face Hub: OWNER/NAME, OWNER/NAME/FILE, hf://OWNER/NAME@REVISION/FILE.
    Name more than two LoRAs with --content and --style, once for each. One LoRA alone, or beside
    those of --always, acts at constant weight. For base models with two denoisers, name a
    LoRA's file for high noise and its file for low noise together, as HIGH,LOW.

    A rule decides which LoRA acts in every layer at every step of sampling. This command computes
    all choices once, for any prompt and any number of steps (unless a setting of the rule names a
    number).

    Text encoders have no steps: with every rule, their layers act at constant weight.
    """
    if as_thin and compress is not None:
        raise click.UsageError("--thin stores no factors, so there is nothing to --compress.")
    if compress_by is not None and compress is None:
        raise click.UsageError("--compress-by acts with --compress TOL only; add that.")
    found = NamedLoras(loras, content, style, always, halves, both_denoisers, weight_names).found(
        settings["weights"], lambda: check_output(output, force, inputs=())
    )
    settings["weights"] += tuple(found.factors.items())
    base = () if reading.base is None else (Path(reading.base),)
    check_output(output, force, inputs=(*found.files, *base))

    from klora_compile.compiler import compile_sources, default_rule, refuse_uncalibrated
    from klora_compile.measuring.places import place_of
    from klora_compile.profiles.store import CACHE_BYTES, Store
    from klora_compile.report.compilation import Compilation
    from klora_compile.runs import runs_of
    from klora_compile.settings.config import Config
    from klora_compile.sources import by_source, read_sources
    from klora_runtime.artifact.file import save_fusion

    sources = by_source(found.contents, found.styles, found.always)
    if not _is_named("rule"):
        rule = RULE_OF_A_MODEL if calibrating else default_rule(slots_of(sources)).name
    config = Config.named(rule, **given(settings))
    refuse_uncalibrated(config.rule, calibrating is not None)
    runs_of(config.settings.clock, shift)
    where, begin = place_of(device), time.perf_counter()
    with layer_bar("reading") as on_module:
        adapters = read_sources(sources, config, reading, on_module=on_module)
    cache = user_cache(no_cache)
    store = None if cache is None else Store(cache, limit=CACHE_BYTES)
    if calibrating is None:
        with layer_bar("measuring") as on_layer:
            fusion = compile_sources(adapters, config, device=where, store=store, on_layer=on_layer)
    else:
        with part_bar("calibrating") as on_part:
            fusion = calibrating.compiled(
                adapters, config, output, device, on_part, measured_on=where, store=store
            )
    fusion = _as_stored(fusion, adapters, drop_unused, compress, compress_by or "layer", as_thin)
    size = save_fusion(fusion, output, overwrite=force)
    seconds = time.perf_counter() - begin
    compilation = Compilation(fusion, adapters, output, size, seconds, shift)
    print_result(as_json, "compilation", compilation.json, compilation.text)


def _as_stored(
    fusion: Fusion,
    adapters: Mapping[str, Adapter],
    drop_unused: bool,
    tolerance: float | None,
    by: By,
    as_thin: bool,
) -> Fusion:
    """Return the fusion in the form in which the artifact holds it."""
    if drop_unused:
        from klora_compile.storing.dropping import drop_unused as without_unused

        fusion = without_unused(fusion)
    if tolerance is not None:
        from klora_compile.storing.compress import compress

        with layer_bar("compressing") as on_layer:
            fusion = compress(fusion, tolerance, by=by, on_layer=on_layer)
    if as_thin:
        from klora_compile.storing.thin import thin

        fusion = thin(fusion, adapters)
    return fusion


def _is_named(parameter: str) -> bool:
    """Return whether an option of this command was given."""
    source = click.get_current_context().get_parameter_source(parameter)
    return source is not ParameterSource.DEFAULT
