"""Layouts in one spelling, and weights that their rows can part."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from support.form_files import Array

from klora_compile.reading.layers import Layer
from klora_runtime.families.rows import Layout, Row
from klora_runtime.families.text_encoders import TextModel

WIDTH = 16


@dataclass(frozen=True)
class Cell:
    """One layout in one spelling."""

    layout: Layout
    spelling: str
    """``dots`` or ``underscores``."""
    prefix: str

    def __str__(self) -> str:
        return f"{self.layout.family}, {self.layout.name}, {self.prefix}"

    def key(self, source: str) -> str:
        """A module's name in a file."""
        joint = "." if self.spelling == "dots" else "_"
        return self.prefix + source.replace(".", joint)


def shape(row: Row) -> tuple[int, int]:
    """A weight that the row's rule can part."""
    ratio = row.ratio
    if ratio is None:
        rule = "" if row.split is None else row.split.__name__
        ratio = Fraction({"thirds": 3, "square_thirds_and_rest": 7, "": 1}.get(rule, 2))
    inner = WIDTH * ratio.denominator
    return int(ratio * inner), inner


def lines(values: Array, rows: tuple[range, ...] | None) -> Array:
    return values if rows is None else values[[i for part in rows for i in part]]


def values_of(layer: Layer) -> Array:
    return layer.scaling * layer.delta.matrix().reshape(layer.shape).numpy()


def encoder_names(model: TextModel, component: str = "text_encoder") -> Layout:
    """klora's names of a text encoder."""
    return replace(model.names, component=component)


def encoder_inside(model: TextModel, component: str = "text_encoder") -> Layout:
    """Its names with that of the module in front that holds it."""
    assert model.inside is not None
    return replace(model.inside, component=component)
