"""``klora compile``: two LoRAs in, one artifact out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klora_compile.commands.output import check_output
from klora_compile.commands.parameters import LORA, Device, NumberOr, reading_options
from klora_compile.commands.progress import layer_bar
from klora_compile.config import Config
from klora_compile.reading.options import ReadOptions

if TYPE_CHECKING:
    from klora_compile.reading.adapter import Adapter
    from klora_runtime.fusion import Fusion


@click.command("compile")
@click.argument("content", type=LORA)
@click.argument("style", type=LORA)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The artifact to write, by custom NAME.klora.safetensors.",
)
@click.option(
    "--semantics",
    type=click.Choice(["paper", "authors"]),
    default="paper",
    show_default=True,
    help="K-LoRA as published, or as its authors' code computes: their gamma, their offset of s*, "
    "ties to the style, the network alpha ignored.",
)
@click.option(
    "--pattern",
    type=click.Choice(["s", "s*"]),
    default="s",
    show_default=True,
    help="s: content early, style late. s*: style, content, style; suggested for FLUX.",
)
@click.option("--alpha", type=float, help="Slope of S over progress.  [default: 1.5]")
@click.option(
    "--beta",
    type=float,
    help="S at progress 0; higher favours style.  [default: 0.5; for s* 1.3, authors 0.85 alpha]",
)
@click.option(
    "--gamma",
    type=NumberOr("paper", "code"),
    help="Balance of magnitudes: ratio of sums, mean of ratios, or a number; higher favours "
    "style.  [default: as the semantics]",
)
@click.option(
    "--top-k",
    type=NumberOr("auto", whole=True),
    default="auto",
    show_default=True,
    help="Weights of a layer that count; auto is the product of its two ranks.",
)
@click.option(
    "--content-weight",
    type=float,
    default=1.0,
    show_default=True,
    help="Factor on the content's deltas where they are applied; does not change the choice.",
)
@click.option(
    "--style-weight",
    type=float,
    default=1.0,
    show_default=True,
    help="Factor on the style's deltas where they are applied; does not change the choice.",
)
@click.option(
    "--text-encoder",
    type=click.Choice(["both", "content", "style", "none"]),
    default="both",
    show_default=True,
    help="Whose text encoder layers act; they have no steps.",
)
@click.option(
    "--unpaired",
    type=click.Choice(["keep", "drop", "error"]),
    default="keep",
    show_default=True,
    help="Denoiser layers that only one LoRA adapts.",
)
@reading_options
@click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Where to measure; auto takes a GPU where there is one.",
)
@click.option(
    "--no-cache",
    is_flag=True,
    help="Measure both LoRAs, and keep nothing for the next time.",
)
@click.option(
    "--compress",
    type=click.FloatRange(1e-5, 0.5),
    metavar="TOL",
    help="Store each delta in the fewest bits that lose at most this share of it, such as 0.01.  "
    "[default: lose nothing]",
)
@click.option(
    "--thin",
    "as_thin",
    is_flag=True,
    help="Store the schedule alone; applying it needs both LoRA files.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
def compile_command(
    content: Path,
    style: Path,
    output: Path,
    device: str,
    no_cache: bool,
    compress: float | None,
    as_thin: bool,
    force: bool,
    as_json: bool,
    top_k: str | int,
    reading: ReadOptions,
    **settings: Any,
) -> None:
    """Fuse the LoRAs CONTENT (a subject) and STYLE into one artifact.

    Each is a file (.safetensors, .pt, .bin, .ckpt) or a folder as PEFT and diffusers save it.

    In every layer, at every step of sampling, the one acts whose largest weights matter more
    (K-LoRA). All of that is computed here, once, for any prompt and any number of steps.
    """
    config = Config(top_k=None if top_k == "auto" else int(top_k), **settings)
    if as_thin and compress is not None:
        raise click.UsageError("--thin stores no factors, so there is nothing to --compress.")
    if content.samefile(style):
        raise click.UsageError(f"{content} and {style} are one file; name two LoRAs.")
    check_output(output, force, inputs=(content, style))

    from klora_compile.compiler import compile_fusion
    from klora_compile.report.compression import compression_of, storage_lines
    from klora_compile.report.reading import reading_json, reading_lines
    from klora_compile.report.summary import bytes_text, summarise, summary_lines, table
    from klora_compile.statistics_cache import cache_file
    from klora_runtime.artifact import save_fusion
    from klora_runtime.errors import shown

    begin = time.perf_counter()
    adapters = {
        role: _read(role, path, reading) for role, path in (("content", content), ("style", style))
    }
    cache = None if no_cache else cache_file()
    with layer_bar("measuring") as on_layer:
        pair = adapters["content"], adapters["style"]
        fusion = compile_fusion(*pair, config, device=device, cache=cache, on_layer=on_layer)
    if compress is not None:
        fusion = _compressed(fusion, compress)
    if as_thin:
        from klora_compile.thin import thin

        fusion = thin(fusion, adapters)
    size = save_fusion(fusion, output, overwrite=force)
    seconds = time.perf_counter() - begin
    summary = summarise(fusion)
    if as_json:
        facts = {"output": str(output), "bytes_out": size, "seconds": seconds}
        facts["reading"] = {role: reading_json(adapter) for role, adapter in adapters.items()}
        found = compression_of(fusion)
        facts |= {"thin": as_thin, "compression": None if found is None else found.json()}
        click.echo(json.dumps(facts | summary.json()))
        return
    rows = [("artifact", shown(output)), *reading_lines(adapters), *summary_lines(summary)]
    rows += storage_lines(fusion)
    read = " + ".join(bytes_text(count) for count in summary.bytes_in.values())
    share = size / sum(summary.bytes_in.values())
    rows.append(("bytes", f"{read} in, {bytes_text(size)} out ({share:.1%})"))
    rows.append(("seconds", f"{seconds:.1f}"))
    click.echo(table(rows))


def _compressed(fusion: Fusion, tolerance: float) -> Fusion:
    from klora_compile.compress import compress

    with layer_bar("compressing") as on_layer:
        return compress(fusion, tolerance, on_layer=on_layer)


def _read(role: str, path: Path, options: ReadOptions) -> Adapter:
    from klora_compile.reading.adapter import read_adapter

    with layer_bar(f"reading {role}") as on_module:
        return read_adapter(path, options, on_module=on_module)
