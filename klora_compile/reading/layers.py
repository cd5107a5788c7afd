"""The layers of diffusers' model that a LoRA changes: their facts and their values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from klora_compile.reading.forms.parts import Shape
from klora_runtime.artifact.delta import Delta, LowRank
from klora_runtime.lazy_torch import torch


@dataclass(frozen=True)
class LayerFacts:
    """The facts about one layer, without its values."""

    component: str
    module: str
    """Dotted diffusers module path (CLIP without ``text_model.``)."""
    parameter: str
    """``weight`` or ``bias``."""
    form: str
    """Name of a form in ``FORMS``, ``dora`` or ``bias``."""
    rank: int | None
    """Rank that the trainer declared; None if the form has none."""
    alpha: float | None
    """Alpha; None if the form has no rank."""
    alpha_source: str
    """Source of alpha: ``tensor``, the name of a metadata entry, ``rank``, or ``none``."""
    shape: Shape | None
    """Shape of the delta: (out, in), (out, in, height, width), (n,); None if only the base model
        shows it."""

    @property
    def name(self) -> str:
        """Component, dot, module path, followed by the parameter unless it is a weight."""
        return layer_name(self.component, self.module, self.parameter)


@dataclass(frozen=True)
class Pair:
    """The keys of a layer's unchanged factors in a file: delta = up[rows] @ down."""

    down: str
    """Key in the file."""
    up: str
    rows: tuple[range, ...] | None
    """Rows of up, in this order; None for all rows."""


@dataclass(frozen=True)
class Layer:
    """One layer of an adapter: the parameter changes by scaling * delta."""

    component: str
    module: str
    """Dotted diffusers module path (CLIP without ``text_model.``)."""
    delta: Delta
    """Delta, in the file's dtype if the form is kept, else float32."""
    rank: int
    """Declared rank, or the numerical rank of the delta if the form declares none."""
    alpha: float | None
    alpha_source: str
    """See :class:`LayerFacts`."""
    scaling: float
    """alpha / rank; 1 if the form has no alpha or already includes it (DoRA)."""
    form: str = "lora"
    parameter: str = "weight"
    error: float = 0.0
    """Relative Frobenius error of the conversion to this form, 0 to 1."""
    pair: Pair | None = None
    """Keys of its factors; None if they are computed, or the delta is dense."""

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
        """Return the layer of a plain LoRA."""
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
        """Factor down of a low-rank delta: (rank, in) or (rank, in, *kernel)."""
        assert isinstance(self.delta, LowRank)
        return self.delta.down

    @property
    def up(self) -> torch.Tensor:
        """Factor up of a low-rank delta: (out, rank) or (out, rank, 1, ...)."""
        assert isinstance(self.delta, LowRank)
        return self.delta.up

    @property
    def shape(self) -> Shape:
        """Shape of the parameter: (out, in), (out, in, *kernel) or (n,)."""
        return self.delta.shape

    @property
    def numel(self) -> int:
        """Number of elements of the delta."""
        return math.prod(self.shape)


def layer_name(component: str, module: str, parameter: str) -> str:
    """See :attr:`LayerFacts.name`."""
    if component and module and parameter == "weight":
        return f"{component}.{module}"
    named = "" if parameter == "weight" else parameter
    return ".".join(filter(None, (component, module, named)))
