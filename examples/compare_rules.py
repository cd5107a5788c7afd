"""The schedules of all rules side by side, for one pair of the demo's LoRAs.

python examples/compare_rules.py docs/pictures/rules.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from drawings.shipped import STYLES, SUBJECTS, style_lora, subject_lora
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from klora_compile import compile_fusion
from klora_compile.report.plot import draw_heat
from klora_compile.rules.lookup import RULES
from klora_runtime.artifact.blocks import blocks
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.artifact.palette import colours

SHOWN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("klora", {}),
    ("klora", {"bias": 0.5}),
    ("klora", {"pattern": "s*"}),
    ("np+klora", {}),
    ("est", {}),
    ("np", {}),
    ("direct", {}),
    ("switch", {"steps": 20}),
    ("phases", {"content_phases": "0:1,0.6:0.3", "style_phases": "0:0.3,0.4:1"}),
)


@click.command()
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--subject", type=click.Choice(SUBJECTS), default="penguin", show_default=True)
@click.option("--style", type=click.Choice(STYLES), default="ink", show_default=True)
def main(picture: Path, subject: str, style: str) -> None:
    """Draw the schedule of each rule for a subject and a style into PICTURE."""
    loras = subject_lora(subject), style_lora(style)
    figure = Figure(figsize=(12, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    fusion = None
    for place, (rule, options) in zip(axes, SHOWN, strict=True):
        fusion = compile_fusion(*loras, RULES[rule](**options))
        draw(place, fusion, "\n".join([rule, *(f"{k} {v}" for k, v in options.items())]))
    assert fusion is not None
    names = {"content": subject, "style": style}
    patches = [
        Patch(color=[value / 255 for value in colour], label=names[slot])
        for slot, colour in colours(fusion.slots).items()
    ]
    figure.legend(handles=patches, loc="outside upper center", ncols=2, frameon=False)
    words = "progress of sampling, from left to right; each row is a layer of the denoiser"
    figure.supxlabel(words, fontsize=9)
    figure.savefig(picture, facecolor="white")


def draw(axes: Any, fusion: Fusion, title: str) -> None:
    """Draw one rule's map."""
    layers = [entry for block in blocks(fusion) for entry in block.acting().entries]
    draw_heat(axes, fusion, layers)
    axes.set_title(title.replace("_phases", ""), fontsize=7)
    axes.set_xlabel("")
    axes.set_xticks([])
    axes.set_yticks([])


if __name__ == "__main__":
    main()
