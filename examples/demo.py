"""The demo, from LoRAs of subjects and styles to pictures of their fusions (``make demo``).

The model is small but real: it was trained from scratch on drawings (``drawings/README.md``). The
base has seen neither these subjects nor these styles, and no LoRA has seen a subject in its new
style.

    python examples/demo.py out/demo

Every picture is written as soon as it is drawn; out/demo/pictures.png shows them side by side.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from drawings.accelerator.trajectories import few_step_scheduler
from drawings.base.subjects import prompt
from drawings.sheet import draw_sheet
from drawings.shipped import (
    ACCELERATOR,
    GUIDANCE,
    OWN_STYLE,
    OWN_SUBJECTS,
    PAIRS,
    STEPS,
    base,
    style_lora,
    subject_lora,
    true_drawing,
)
from PIL import Image

from klora_compile import compile_fusion
from klora_compile.rules import Direct
from klora_runtime import Fusion, apply_fusion

#: The rule of klora that is best on the drawings, and the options of ``klora compile`` for it.
BEST, BEST_OPTIONS = "NP-LoRA", ("--rule", "np")
#: Rules that the command line compiles.
RULES: Mapping[str, tuple[str, ...]] = {"K-LoRA s": (), BEST: BEST_OPTIONS}
SUM = "plain sum"
FUSED = (SUM, *RULES)
COLUMNS = ("subject LoRA\nalone", "style LoRA\nalone", *FUSED, "true drawing")

FEW = 4
#: Prompts that need no LoRA.
KNOWN = ("a fox, noto style", "a snowman, flat style")

Pair = tuple[str, str]


@dataclass(frozen=True)
class Studio:
    """Draws with the base, and writes each picture as it comes."""

    pipe: Any
    folder: Path

    def draw(
        self, name: str, text: str, steps: int | None = None, guidance: float = GUIDANCE
    ) -> Image.Image:
        """Return a picture, and write it as ``pictures/NAME.png``."""
        picture = draw(self.pipe, text, steps, guidance)
        path = self.folder / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        click.echo(f"{path}")
        return picture

    @contextmanager
    def few_steps(self) -> Iterator[None]:
        """Sample as an accelerator wants it: by a scheduler of order 1."""
        before = self.pipe.scheduler
        self.pipe.scheduler = few_step_scheduler(self.pipe)
        try:
            yield
        finally:
            self.pipe.scheduler = before


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Fuse LoRAs of subjects and styles, and write artifacts and pictures into FOLDER."""
    begin = time.perf_counter()
    torch.set_num_threads(1)  # two threads of so small a model wait for each other
    click.echo(
        f"Fuses {len(PAIRS)} pairs of LoRAs by {len(FUSED)} rules, writes "
        f"{len(PAIRS) * len(RULES) + 1} artifacts, and draws {pictures()} pictures: about two "
        "minutes on two idle cores."
    )
    folder.mkdir(parents=True, exist_ok=True)
    studio = Studio(base(), folder)
    bare = [draw(studio.pipe, text) for text in KNOWN]
    show(studio)
    restored = [draw(studio.pipe, text) for text in KNOWN] == bare
    found = "the same" if restored else "CHANGED"
    click.echo(f"\nafter remove() the bare model's pictures are {found}")
    click.echo(f"The pictures are in {folder}, after {time.perf_counter() - begin:.0f} s.")
    if not restored:
        sys.exit(1)


def pictures() -> int:
    """Return the number of pictures that the demo draws."""
    return (2 + len(FUSED)) * len(PAIRS) + 2 * len(FUSED) + 2 * len(KNOWN)


def show(studio: Studio) -> None:
    """Draw every pair, and the first one in few steps; write the sheet and a schedule."""
    folder, first = studio.folder, PAIRS[0]
    rows: dict[str, list[Image.Image | None]] = {}
    for pair in PAIRS:
        fusions = compiled(pair, folder)
        rows[label(pair)] = row(studio, pair, fusions)
        if pair == first:
            few = few_rows(studio, pair, fusions)
            example = fusions["K-LoRA s"]
    title = f"Each LoRA alone, both fused, and the true drawing: {STEPS} steps, seed 0"
    draw_sheet(title, COLUMNS, rows | few).save(folder / "pictures.png")
    klora("inspect", example, "--plot", folder / "schedule.png")
    klora("verify", example, "--against", *sources(first))
    click.echo(f"\n{folder / 'pictures.png'} has all side by side, and")
    click.echo(f"{folder / 'schedule.png'} shows which LoRA acts in which layer, when.")


def klora(*arguments: object) -> None:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "klora_compile.cli", *map(str, arguments)]
    click.echo(f"\n$ klora {' '.join(map(str, arguments))}")
    sys.stdout.flush()
    subprocess.run(command, check=True)


def sources(pair: Pair) -> tuple[Path, Path]:
    """Return the LoRA files of a subject and a style."""
    return subject_lora(pair[0]), style_lora(pair[1])


def compiled(pair: Pair, folder: Path) -> dict[str, Fusion | Path]:
    """Return rule -> fusion; those of ``RULES`` are artifacts, by ``klora compile``."""
    found: dict[str, Fusion | Path] = {SUM: compile_fusion(*sources(pair), Direct())}
    for rule, options in RULES.items():
        artifact = folder / f"{'-'.join(pair)}-{slug(rule)}.klora.safetensors"
        klora("compile", *sources(pair), *options, "-o", artifact, "--force")
        found[rule] = artifact
    return found


def row(
    studio: Studio, pair: Pair, fusions: Mapping[str, Fusion | Path]
) -> list[Image.Image | None]:
    """Draw a pair: each LoRA alone with a prompt that it was trained on, and both by every rule."""
    subject, style = pair
    name = "-".join(pair)
    drawn: list[Image.Image | None] = []
    for kind, lora, text in (
        ("subject", subject_lora(subject), prompt(subject, OWN_STYLE)),
        ("style", style_lora(style), prompt(OWN_SUBJECTS[style], style)),
    ):
        with apply_fusion(studio.pipe, compile_fusion(lora)):
            drawn.append(studio.draw(f"{name}/{kind}-alone", text))
    for rule, fusion in fusions.items():
        with apply_fusion(studio.pipe, fusion):
            drawn.append(studio.draw(f"{name}/{slug(rule)}", prompt(*pair)))
    return [*drawn, Image.open(true_drawing(*pair)).convert("RGB")]


def few_rows(
    studio: Studio, pair: Pair, fusions: Mapping[str, Fusion | Path]
) -> dict[str, list[Image.Image | None]]:
    """Draw a pair in few steps: without the accelerator, and with it beside each fusion."""
    artifact = studio.folder / "accelerator.klora.safetensors"
    klora("compile", ACCELERATOR, "-o", artifact, "--force")
    text, named, name = prompt(*pair), label(pair), f"{'-'.join(pair)}/{FEW}-steps"
    without: list[Image.Image | None] = []
    fast: list[Image.Image | None] = []
    for rule, fusion in fusions.items():
        with apply_fusion(studio.pipe, fusion):
            without.append(studio.draw(f"{name}/{slug(rule)}", text, FEW))
        with studio.few_steps(), apply_fusion(studio.pipe, fusion, always={"turbo": artifact}):
            fast.append(studio.draw(f"{name}/{slug(rule)}-accelerated", text, FEW, 1.0))
    return {
        f"{named}\n{FEW} steps": [None, None, *without, None],
        f"{named}\n{FEW} steps with\naccelerator": [None, None, *fast, None],
    }


def alone(pipe: Any, lora: Path, text: str) -> Image.Image:
    """Return a picture of one LoRA."""
    with apply_fusion(pipe, compile_fusion(lora)):
        return draw(pipe, text)


def draw(pipe: Any, text: str, steps: int | None = None, guidance: float = GUIDANCE) -> Image.Image:
    """Return a picture of seed 0, in ``STEPS`` if ``steps`` is None."""
    picture: Image.Image = pipe(
        text,
        num_inference_steps=STEPS if steps is None else steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    return picture


def label(pair: Pair) -> str:
    """Return the name of a pair's row."""
    return "\n+ ".join(pair)


def slug(rule: str) -> str:
    """Return a rule's name as a file name."""
    return rule.lower().replace(" ", "-")


if __name__ == "__main__":
    main()
