"""The demo's subjects in its styles: one catalogue, one pipeline, one sheet of all pairs.

    python examples/catalogue.py out/catalogue

Each LoRA is measured once, and no artifact is written: a library links each pair when its picture
is drawn, and the handle swaps to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import demo
from drawings.base.subjects import prompt
from drawings.sheet import draw_sheet
from drawings.shipped import (
    LORAS,
    OWN_STYLE,
    OWN_SUBJECTS,
    STYLES,
    SUBJECTS,
    base,
    style_lora,
    subject_lora,
)
from PIL import Image

from klora_runtime import Catalogue, Fusion, FusionLibrary, apply_fusion

BUDGET = 2**30


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("subjects", nargs=-1, type=click.Choice(SUBJECTS))
def main(folder: Path, subjects: Sequence[str]) -> None:
    """Fuse SUBJECTS, or all of them, with every style, and draw them into FOLDER."""
    subjects = subjects or SUBJECTS
    folder.mkdir(parents=True, exist_ok=True)
    file, store = folder / "demo.klora-catalogue.safetensors", folder / "store"
    files = {
        "--content": [subject_lora(name) for name in subjects],
        "--style": [style_lora(name) for name in STYLES],
    }
    demo.klora("profile", *files["--content"], *files["--style"], "--store", store)
    named = [word for role, own in files.items() for file_ in own for word in (role, file_.stem)]
    demo.klora("catalogue", store, *named, "--force", "-o", file)
    pipe = base()
    library = FusionLibrary(BUDGET, catalogue=Catalogue.open(file, loras=LORAS))
    styles = [
        demo.alone(pipe, style_lora(style), prompt(OWN_SUBJECTS[style], style)) for style in STYLES
    ]
    rows: dict[str, list[Image.Image | None]] = {"style LoRA\nalone": [None, *styles]}
    for subject in subjects:
        rows[subject] = [demo.alone(pipe, subject_lora(subject), prompt(subject, OWN_STYLE))]
    with apply_fusion(pipe, _fusion(library, subjects[0], STYLES[0])) as handle:
        for subject in subjects:
            for style in STYLES:
                handle.swap(_fusion(library, subject, style))
                rows[subject].append(demo.draw(pipe, prompt(subject, style)))
    sheet = folder / "pictures.png"
    title = "K-LoRA s, by a catalogue of klora"
    draw_sheet(title, ["subject LoRA\nalone", *STYLES], rows).save(sheet)
    count = len(subjects) * len(STYLES)
    print(f"\n{count} pairs are on {sheet}; the catalogue is {file}.")


def _fusion(library: FusionLibrary, subject: str, style: str) -> Fusion:
    return library.pair(subject_lora(subject).stem, style_lora(style).stem)


if __name__ == "__main__":
    main()
