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


def material_of(packages: Path, regime: Regime, subjects: Sequence[str], folder: Path) -> Material:
    """Return these subjects and all held-out styles, as the LoRAs of a regime saw them.

    A subject takes no part if its LoRA did not reach ``ENOUGH`` on its own training drawings,
    however often it was trained. No rule was drawn before that is known.

    Args:
        folder: of the regime's LoRAs.

    Raises:
        ValueError: a LoRA is missing.
    """

    def exists(subject: str, style: str) -> bool:
        return drawing(packages, STYLES[style], subject) is not None

    seen = things(packages)
    recipes = [subject_recipe(regime, subject, exists) for subject in subjects]
    styles = [style_recipe(regime, style, seen, exists) for style in HELD_OUT_STYLES]
    entries = Ledger(folder).read()
    for recipe in (*recipes, *styles):
        if recipe.stem not in entries:
            raise ValueError(
                f"{recipe.stem} is not trained yet. Run 'python -m drawings.loras PACKAGES RUN "
                f"{folder.parent} {folder.name}' first."
            )
    return Material([r for r in recipes if entries[r.stem].accepted], styles, exists)


def digests(run: Path, folder: Path, material: Material) -> dict[str, str]:
    """Return the digests of the base, the judges and the LoRAs of the cells."""
    recipes = (*material.subjects, *material.styles)
    return {
        "base": digest((run / "base").rglob("*.safetensors")),
        "judges": digest([run / "judges.pt"]),
        "loras": digest(lora_path(folder, each.kind, each.name) for each in recipes),
    }
