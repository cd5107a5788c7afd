"""The demo's 12 subjects in its 3 styles: one catalogue, one pipeline, one sheet of all 36 pairs.

    python examples/catalogue.py out/catalogue

Each LoRA is measured once, and no artifact is written: a library links each pair when its picture
is drawn, and the handle swaps to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import demo
from drawings.loras.files import lora_path
from drawings.pipeline import load
from drawings.sheet import Table, draw_sheet
from drawings.subjects import HELD_OUT_STYLES, HELD_OUT_SUBJECTS, prompt

from klora_runtime import Catalogue, Fusion, FusionLibrary, apply_fusion

BUDGET = 2**30


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("subjects", nargs=-1, type=click.Choice(HELD_OUT_SUBJECTS))
def main(folder: Path, subjects: Sequence[str]) -> None:
    """Fuse SUBJECTS, or all of them, with every style, and draw them into FOLDER."""
    subjects, styles = subjects or HELD_OUT_SUBJECTS, tuple(HELD_OUT_STYLES)
    folder.mkdir(parents=True, exist_ok=True)
    file, store = folder / "demo.klora-catalogue.safetensors", folder / "store"
    files = {
        "--content": [lora_path(demo.WEIGHTS, "subject", name) for name in subjects],
        "--style": [lora_path(demo.WEIGHTS, "style", name) for name in styles],
    }
    demo.klora("profile", *files["--content"], *files["--style"], "--store", store)
    named = [word for role, own in files.items() for file_ in own for word in (role, file_.stem)]
    demo.klora("catalogue", store, *named, "--force", "-o", file)
    pipe = load(demo.WEIGHTS)
    library = FusionLibrary(BUDGET, catalogue=Catalogue.open(file, loras=demo.WEIGHTS))
    fused = {}
    with apply_fusion(pipe, _fusion(library, subjects[0], styles[0])) as handle:
        for subject in subjects:
            for style in styles:
                handle.swap(_fusion(library, subject, style))
                fused[subject, style] = demo.draw(pipe, [prompt(subject, style)])
    table = Table(
        styles={style: demo.style_alone(pipe, style, 1) for style in styles},
        subjects={subject: demo.subject_alone(pipe, subject, 1) for subject in subjects},
        fused=fused,
    )
    sheet = folder / "pictures.png"
    draw_sheet(table, "K-LoRA s, by a catalogue of klora").save(sheet)
    print(f"\n{len(fused)} pairs are on {sheet}; the catalogue is {file}.")


def _fusion(library: FusionLibrary, subject: str, style: str) -> Fusion:
    pair = (("subject", subject), ("style", style))
    return library.pair(*(lora_path(demo.WEIGHTS, role, name).stem for role, name in pair))


if __name__ == "__main__":
    main()
