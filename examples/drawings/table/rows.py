"""The rows of the table: rules on pairs of LoRAs, between a floor and three ceilings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawings.base.subjects import HELD_OUT_SUBJECTS, prompt
from drawings.loras.files import lora_path
from drawings.loras.recipes import Recipe
from drawings.table.rules import RULES, Way

#: Subjects of a style's own training that its ceiling is drawn with.
_OWN_SUBJECTS = 3


@dataclass(frozen=True)
class Cell:
    """One place in a row: what is asked for, and the true drawing that it is compared with."""

    subject: str
    style: str
    prompt: str
    files: tuple[tuple[str, str], ...]
    """Kind and name of each LoRA that acts."""

    @property
    def truth(self) -> tuple[str, str]:
        """Subject and style of the true drawing."""
        return self.subject, self.style


@dataclass(frozen=True)
class Material:
    """What the cells of one regime are made of."""

    subjects: Sequence[Recipe]
    """Of the held-out subjects of this run."""
    styles: Sequence[Recipe]
    exists: Callable[[str, str], bool]
    """Whether there is a true drawing of a subject in a style."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every subject in every style that has a true drawing."""
        return [
            (subject.name, style.name)
            for subject in self.subjects
            for style in self.styles
            if self.exists(subject.name, style.name)
        ]


@dataclass(frozen=True)
class Row:
    """A row: its cells, and how LoRAs act in them."""

    name: str
    """Unique label."""
    cells: Callable[[Material], list[Cell]]
    act: Callable[[Any, Sequence[Path]], AbstractContextManager[object]]
    """(pipeline, LoRA files) -> context in which the pipeline draws."""


def fusions(material: Material) -> list[Cell]:
    """Return the cells of a rule: both LoRAs, and the joint prompt in both regimes."""
    return [
        Cell(subject, style, prompt(subject, style), (("subject", subject), ("style", style)))
        for subject, style in material.pairs
    ]


def own_subjects(material: Material) -> list[Cell]:
    """Return a cell for each drawing that a subject LoRA was trained on, with its prompt."""
    return [
        Cell(*drawing, text, (("subject", recipe.name),))
        for recipe in material.subjects
        for drawing, text in zip(recipe.drawings, recipe.prompts, strict=True)
    ]


def own_styles(material: Material) -> list[Cell]:
    """Return cells for a few drawings that each style LoRA was trained on, with their prompts."""
    return [
        Cell(*drawing, text, (("style", recipe.name),))
        for recipe in material.styles
        for drawing, text in list(zip(recipe.drawings, recipe.prompts, strict=True))[:_OWN_SUBJECTS]
    ]


def true_fusions(material: Material) -> list[Cell]:
    """Return the cells of LoRAs that were trained on the true drawing of a fusion.

    Each subject has one, since each is a training. The styles take turns in the order of the
    held-out subjects.
    """
    cells = []
    for subject in (recipe.name for recipe in material.subjects):
        turn = HELD_OUT_SUBJECTS.index(subject) % len(material.styles)
        styles = [*material.styles[turn:], *material.styles[:turn]]
        for style in [s.name for s in styles if material.exists(subject, s.name)][:1]:
            files = (("fused", f"{subject}-{style}"),)
            cells.append(Cell(subject, style, prompt(subject, style), files))
    return cells


def rule(name: str, way: Way) -> Row:
    """Return the row of a rule."""

    def act(pipe: Any, files: Sequence[Path]) -> AbstractContextManager[object]:
        content, style = files
        return way(pipe, content, style)

    return Row(name, fusions, act)


@contextmanager
def alone(pipe: Any, files: Sequence[Path]) -> Iterator[None]:
    """Let one LoRA act at weight 1."""
    (file,) = files
    pipe.unet.load_lora_adapter(str(file), adapter_name="alone", prefix="unet")
    try:
        yield
    finally:
        pipe.unet.unload_lora()


CEILINGS = (
    Row("ceiling: subject LoRA alone, its own prompt", own_subjects, alone),
    Row("ceiling: style LoRA alone, its own prompt", own_styles, alone),
    Row("ceiling: LoRA of the true drawing", true_fusions, alone),
)
#: Ceilings first. The floor, the base by its prompt alone, is among the rules.
ROWS = (*CEILINGS, *(rule(name, way) for name, way in RULES.items()))

#: The rule that all others are compared with.
REFERENCE = "direct sum 1 : 1"


def files(folder: Path, cell: Cell) -> list[Path]:
    """Return the LoRA files of a cell.

    Raises:
        ValueError: one is missing.
    """
    paths = [lora_path(folder, kind, name) for kind, name in cell.files]
    for path in paths:
        if not path.is_file():
            raise ValueError(
                f"{path} is missing. Train it with 'python -m drawings.loras ... {folder.name} "
                f"{path.stem}'."
            )
    return paths
