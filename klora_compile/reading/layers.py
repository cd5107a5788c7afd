"""The layers of diffusers' model that a LoRA changes: what each is, and its values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from klora_compile.reading.forms.parts import Shape
from klora_runtime.artifact.delta import Delta, LowRank


@dataclass(frozen=True)
class LayerFacts:
    """What one layer is, without its values."""

    component: str
    module: str
    """Dotted diffusers module path (CLIP without ``text_model.``)."""
    parameter: str
    """``weight`` or ``bias``."""
    form: str
    """The name of one of ``FORMS``, ``dora`` or ``bias``."""
    rank: int | None
    """As the trainer declared it; None where the form has none."""
    alpha: float | None
    """None where the form has no rank to divide it by."""
    alpha_source: str
    """What alpha was taken from: ``tensor``, the name of a metadata entry, ``rank``, ``none``."""
    shape: Shape | None
    """Of the delta: (out, in), (out, in, height, width), (n,); None where only the base model's
    weight would tell."""

    @property
    def name(self) -> str:
        """Component, dot, module path; with the parameter behind it where that is no weight."""
        return layer_name(self.component, self.module, self.parameter)


@dataclass(frozen=True)
class Pair:
    """Where a file holds a layer's factors as they are: delta = up[rows] @ down."""

    down: str
    """The file's key."""
    up: str
    rows: tuple[range, ...] | None
    """Rows of up, in this order; None for all."""


@dataclass(frozen=True)
class Layer:
    """One layer of an adapter: the parameter changes by scaling * delta."""

    component: str
    module: str
    """Dotted diffusers module path (CLIP without ``text_model.``)."""
    delta: Delta
    """In the dtype of the file where the form is kept, else float32."""
    rank: int
    """The declared one; where the form declares none, the numerical rank of the delta."""
    alpha: float | None
    alpha_source: str
    """See :class:`LayerFacts`."""
    scaling: float
    """alpha / rank; 1 where the form has no alpha or holds it already (DoRA)."""
    form: str = "lora"
    parameter: str = "weight"
    error: float = 0.0
    """The share of the delta's Frobenius norm that its form here does not hold, 0 to 1."""
    pair: Pair | None = None
    """Where its factors lie; None where they are computed from the file, or it is dense."""

    @classmethod
    def lora(
        cls,
        component: str,
        module: str,
        down: torch.Tensor,
        up: torch.Tensor,
        alpha: float,
        alpha_source: str = "rank",
    ) -> Layer:
        """A plain LoRA's layer."""
        rank = int(down.shape[0])
        return cls(
            component, module, LowRank(down, up), rank, alpha, alpha_source, scaling=alpha / rank
        )

    @property
    def name(self) -> str:
        """See :attr:`LayerFacts.name`."""
        return layer_name(self.component, self.module, self.parameter)

    @property
    def down(self) -> torch.Tensor:
        """Of a low-rank delta: (rank, in) or (rank, in, *kernel)."""
        assert isinstance(self.delta, LowRank)
        return self.delta.down

    @property
    def up(self) -> torch.Tensor:
        """Of a low-rank delta: (out, rank) or (out, rank, 1, ...)."""
        assert isinstance(self.delta, LowRank)
        return self.delta.up

    @property
    def shape(self) -> Shape:
        """Of the parameter: (out, in), (out, in, *kernel) or (n,)."""
        return self.delta.shape

    @property
    def numel(self) -> int:
        """Elements of the delta."""
        return math.prod(self.shape)


def layer_name(component: str, module: str, parameter: str) -> str:
    """See :attr:`LayerFacts.name`."""
    named = "" if parameter == "weight" else parameter
    return ".".join(filter(None, (component, module, named)))
