"""What the cells of a run are made of: subjects and styles, and the digests of base and LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drawings.base.subjects import HELD_OUT_STYLES, STYLES, things
from drawings.loras.acceptance import Ledger
from drawings.loras.files import lora_path
from drawings.loras.recipes import Regime, style_recipe, subject_recipe
from drawings.material import drawing
from drawings.table.kept import digest
from drawings.table.rows import Material


def material_of(packages: Path, regime: Regime, subjects: Sequence[str]) -> Material:
    """Return these subjects and all held-out styles, as the LoRAs of a regime saw them."""

    def exists(subject: str, style: str) -> bool:
        return drawing(packages, STYLES[style], subject) is not None

    seen = things(packages)
    return Material(
        [subject_recipe(regime, subject, exists) for subject in subjects],
        [style_recipe(regime, style, seen, exists) for style in HELD_OUT_STYLES],
        exists,
    )


def digests(run: Path, folder: Path, material: Material) -> dict[str, str]:
    """Return the digests of the base, the judges and the LoRAs of the cells.

    Raises:
        ValueError: a LoRA is missing, or does not draw what it was trained on.
    """
    entries = Ledger(folder).read()
    recipes = (*material.subjects, *material.styles)
    for recipe in recipes:
        entry = entries.get(recipe.stem)
        if entry is None or not entry.accepted:
            state = "is not trained yet" if entry is None else "does not draw its subject yet"
            raise ValueError(
                f"{recipe.stem} {state}. Run 'python -m drawings.loras PACKAGES RUN "
                f"{folder.parent} {folder.name}' first."
            )
    return {
        "base": digest((run / "base").rglob("*.safetensors")),
        "judges": digest([run / "judges.pt"]),
        "loras": digest(lora_path(folder, each.kind, each.name) for each in recipes),
    }
