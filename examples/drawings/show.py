"""One contact sheet: each subject's LoRA alone, each style's alone, and both fused by klora.

python -m drawings.show WEIGHTS OUT.png penguin octopus --style ink --style soft
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from PIL import Image, ImageDraw

from drawings.pipeline import DrawingPipeline
from drawings.subjects import TRAINING_STYLES, prompt
from klora_compile import Config, compile_fusion
from klora_runtime import apply_fusion
from klora_runtime.fusion import Fusion

_CELL, _GAP, _LABEL = 96, 6, 18


@click.command()
@click.argument("weights", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("subjects", nargs=-1, required=True)
@click.option("--style", "styles", multiple=True, required=True)
@click.option("--pattern", type=click.Choice(["s", "s*"]), default="s", show_default=True)
@click.option("--seeds", default=2, show_default=True)
def main(
    weights: Path,
    output: Path,
    subjects: tuple[str, ...],
    styles: tuple[str, ...],
    pattern: Any,
    seeds: int,
) -> None:
    """Draw SUBJECTS in styles with the base and LoRAs of the folder WEIGHTS into OUTPUT."""
    pipe = load(weights)
    rows = []
    for subject in subjects:
        for style in styles:
            content, look = (weights / f"{name}.safetensors" for name in names(subject, style))
            known = next(iter(TRAINING_STYLES))
            shown = {
                f"{subject} LoRA": alone(pipe, content, prompt(subject, known), seeds),
                f"{style} LoRA": alone(pipe, look, prompt("fox", style), seeds),
                "fused": fused(
                    pipe,
                    compile_fusion(content, look, Config(pattern=pattern)),
                    prompt(subject, style),
                    seeds,
                ),
            }
            rows.append(shown)
    sheet(rows).save(output)
    click.echo(f"wrote {output}")


def load(weights: Path) -> DrawingPipeline:
    """The base model of a folder of weights, float32."""
    pipe = DrawingPipeline.from_pretrained(weights / "base").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def names(subject: str, style: str) -> tuple[str, str]:
    """File names of two LoRAs, without ending."""
    return f"subject-{subject}", f"style-{style}"


def draw(pipe: DrawingPipeline, text: str, seeds: int) -> list[Image.Image]:
    """Pictures of one prompt, with noise of seeds 0, 1, ..."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    return list(pipe([text] * seeds, generator=generators).images)


def alone(pipe: DrawingPipeline, lora: Path, text: str, seeds: int) -> list[Image.Image]:
    """With one LoRA, as diffusers and PEFT load it."""
    pipe.unet.load_lora_adapter(str(lora), prefix="unet")
    try:
        return draw(pipe, text, seeds)
    finally:
        pipe.unet.unload_lora()


def fused(pipe: DrawingPipeline, fusion: Fusion, text: str, seeds: int) -> list[Image.Image]:
    """With two LoRAs, fused."""
    with apply_fusion(pipe, fusion):
        return draw(pipe, text, seeds)


def sheet(rows: list[dict[str, list[Image.Image]]]) -> Image.Image:
    """A row for each pair, a labelled group of pictures for each column."""
    columns = sum(len(pictures) for pictures in rows[0].values())
    width = columns * (_CELL + _GAP) + (len(rows[0]) + 1) * _GAP
    height = len(rows) * (_CELL + _LABEL + _GAP)
    paper = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(paper)
    for row, shown in enumerate(rows):
        left, top = _GAP, row * (_CELL + _LABEL + _GAP)
        for label, pictures in shown.items():
            pen.text((left, top + 2), label, fill="black")
            for picture in pictures:
                large = picture.resize((_CELL, _CELL), Image.Resampling.LANCZOS)
                paper.paste(large, (left, top + _LABEL))
                left += _CELL + _GAP
            left += _GAP
    return paper


if __name__ == "__main__":
    main()
