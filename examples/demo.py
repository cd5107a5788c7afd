"""The demo, from LoRAs of subjects and styles to pictures of their fusions (``make demo``).

The model is small but real: it was trained from scratch on drawings (``drawings/README.md``). The
base has seen neither these subjects nor these styles, and no LoRA has seen a subject in its new
style.

    python examples/demo.py out/demo penguin octopus --style ink --style soft
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from drawings.evaluation.rules import added
from drawings.loras.files import lora_path
from drawings.pipeline import DrawingPipeline, load
from drawings.sheet import Pictures, Table, draw_sheet
from drawings.subjects import HELD_OUT_STYLES, HELD_OUT_SUBJECTS, prompt

from klora_runtime import apply_fusion

WEIGHTS = Path(__file__).parent / "drawings" / "weights"
SUBJECTS = ("penguin", "octopus", "mushroom", "rocket")
STEPS = 16

#: Subjects and styles that the base knows, for pictures of a single LoRA.
KNOWN_SUBJECTS, KNOWN_STYLES = ("fox", "house", "snowman"), ("noto", "twemoji", "flat")


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("subjects", nargs=-1, type=click.Choice(HELD_OUT_SUBJECTS))
@click.option("--style", "styles", multiple=True, type=click.Choice(list(HELD_OUT_STYLES)))
@click.option("--seeds", type=click.IntRange(1, 3), default=2, show_default=True)
def main(folder: Path, subjects: Sequence[str], styles: Sequence[str], seeds: int) -> None:
    """Fuse the LoRAs of SUBJECTS and styles, and write artifacts and pictures into FOLDER."""
    subjects, styles = subjects or SUBJECTS, styles or tuple(HELD_OUT_STYLES)
    folder.mkdir(parents=True, exist_ok=True)
    pipe = load(WEIGHTS)
    known = [prompt(subject, KNOWN_STYLES[0]) for subject in KNOWN_SUBJECTS[:seeds]]
    bare = draw(pipe, known)
    artifacts = {
        (subject, style): compiled(subject, style, folder)
        for subject in subjects
        for style in styles
    }
    table = Table(
        styles={style: style_alone(pipe, style, seeds) for style in styles},
        subjects={subject: subject_alone(pipe, subject, seeds) for subject in subjects},
        fused={pair: fused(pipe, pair, path, seeds) for pair, path in artifacts.items()},
    )
    sheet, schedule = folder / "pictures.png", folder / "schedule.png"
    draw_sheet(table, "K-LoRA s, by klora: each LoRA alone, and fused").save(sheet)
    example = artifacts[subjects[0], styles[0]]
    klora("inspect", example, "--plot", schedule)
    sources = (lora_path(WEIGHTS, "subject", subjects[0]), lora_path(WEIGHTS, "style", styles[0]))
    klora("verify", example, "--against", *sources)
    restored = draw(pipe, known) == bare
    print(f"\nafter remove() the bare model's pictures are {'the same' if restored else 'CHANGED'}")
    print(f"The pictures are {sheet} and {schedule}; the artifacts are beside them.")
    if not restored:
        sys.exit(1)


def klora(*arguments: object) -> None:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "klora_compile.cli", *map(str, arguments)]
    print(f"\n$ klora {' '.join(map(str, arguments))}", flush=True)
    subprocess.run(command, check=True)


def compiled(subject: str, style: str, folder: Path) -> Path:
    """Return the artifact of two LoRAs, by ``klora compile``."""
    artifact = folder / f"{subject}-{style}.klora.safetensors"
    sources = (lora_path(WEIGHTS, "subject", subject), lora_path(WEIGHTS, "style", style))
    klora("compile", *sources, "-o", artifact, "--force")
    return artifact


def draw(pipe: DrawingPipeline, prompts: Sequence[str]) -> Pictures:
    """Return a picture of each prompt, with noise of seeds 0, 1, 2, …"""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    pictures = pipe(prompts, num_inference_steps=STEPS, generator=generators).images
    return list(pictures)


def style_alone(pipe: DrawingPipeline, style: str, seeds: int) -> Pictures:
    """Return pictures of a style's LoRA on subjects that the base knows, loaded with PEFT."""
    lora = lora_path(WEIGHTS, "style", style)
    with added(0, 1)(pipe, lora, lora):
        return draw(pipe, [prompt(subject, style) for subject in KNOWN_SUBJECTS[:seeds]])


def subject_alone(pipe: DrawingPipeline, subject: str, seeds: int) -> Pictures:
    """Return pictures of a subject's LoRA in styles that the base knows, loaded with PEFT."""
    lora = lora_path(WEIGHTS, "subject", subject)
    with added(1, 0)(pipe, lora, lora):
        return draw(pipe, [prompt(subject, style) for style in KNOWN_STYLES[:seeds]])


def fused(pipe: DrawingPipeline, pair: tuple[str, str], artifact: Path, seeds: int) -> Pictures:
    """Return pictures of both LoRAs, by klora's runtime."""
    with apply_fusion(pipe, artifact):
        return draw(pipe, [prompt(*pair)] * seeds)


if __name__ == "__main__":
    main()
