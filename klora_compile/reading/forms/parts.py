"""Parts of a layer in a file, and the interface of forms, which turn parts into a delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

from klora_runtime.artifact.delta import Delta
from klora_runtime.lazy_torch import torch


class Part(NamedTuple):
    """A kind of tensor of a layer, in the terms of its form."""

    name: str
    """Name in errors."""
    endings: tuple[str, ...] = ()
    """Endings of its keys after the module's name; empty for a dot and the name."""
    beside: str | None = None
    """An ending that the module must also have for the ending to be this part's."""
    whole_numbers: bool = False
    """Whether its values are integers."""

    @property
    def all_endings(self) -> tuple[str, ...]:
        """Endings of its keys."""
        return self.endings or (f".{self.name}",)


#: Advice in errors about missing settings of a form.
KEEP_CONFIG = "keep adapter_config.json beside the file"

#: Alpha: divided by the rank, it multiplies a delta; for rotations, it limits the angle.
ALPHA = Part("alpha")

Shape = tuple[int, ...]
Shapes = Mapping[Part, Shape]
Tensors: TypeAlias = "Mapping[Part, torch.Tensor]"
Settings = Mapping[str, Any]


class Need(Enum):
    """The part of the base model's layer that a form needs."""

    NOTHING = "nothing"
    SHAPE = "shape"
    WEIGHT = "weight"


class Header(NamedTuple):
    """The facts about a layer before any values are read."""

    shapes: Shapes
    """Shapes of the layer's tensors, and of those that the file has once for all layers."""
    kernel: Shape = ()
    """Kernel of a convolution whose tensors do not show it; empty for a linear layer."""
    weight: Shape | None = None
    """Shape of the base model's weight; None without a base model."""
    has_bias: bool = False
    """Whether the base model's layer has a bias; False without a base model."""
    settings: Settings = MappingProxyType({})
    """PEFT's configuration of the component; empty if the file has none."""
    spelled: str = ""
    """Prefix of the module's name, if it identifies a trainer."""


@dataclass(frozen=True)
class Peers:
    """Facts about all layers of one form in a file."""

    count: int = 0
    """Number of modules."""
    rows: int = 0
    """The most of any weight."""
    columns: int = 0
    """The most of any weight."""


@dataclass(frozen=True)
class Values:
    """The values of a layer."""

    tensors: Tensors
    """Tensors of the layer, and those that the file has once for all layers."""
    error: float = 0.0
    """Greatest relative error of a delta if only an approximation is smaller."""
    weight: torch.Tensor | None = None
    """The base model's weight, float64, if the form needs it."""
    bias: torch.Tensor | None = None
    """The base model's bias, float64, if the form changes it."""
    peers: Peers = Peers()
    """Facts about all layers of this form."""


class WrongValuesError(ValueError):
    """The values of a layer contradict its header; the text says how."""


class Form(Protocol):
    """A form of a weight's delta in a file. Headers are checked before values are read.

    A form subclasses this and overrides what differs.
    """

    name: str
    """Name in reports."""
    parts: Sequence[Part]
    """Parts that only this form has."""
    shared: Sequence[Part] = ()
    """Parts that a file has once, for all layers."""
    shared_beginnings: Sequence[str] = ()
    """Beginnings of further keys that are such parts; the part's name is the key."""
    alone: str = ""
    """Problem to report if the file has such parts but no layer of the form."""
    needs: Need = Need.NOTHING
    """The part of the base model's layer that the delta depends on."""
    settings_state_rank: bool = False
    """Whether the file's settings may state a rank that its tensors do not show."""
    root_is_folded: bool = True
    """Whether a trainer that divides alpha by the root of the rank writes an alpha that gives the
        same scale when divided by the rank."""
    peft: Mapping[str, str | None] = MappingProxyType({})
    """PEFT's name of the form -> key of its alpha; None if it has none."""

    def shares(self, part: Part) -> bool:
        """Return whether a part that the file has once belongs to this form."""
        return part in self.shared or part.name.startswith(tuple(self.shared_beginnings))

    def title(self, layer: Header) -> str:
        """Return the name in reports, which may depend on the layer."""
        return self.name

    def problems(self, layer: Header) -> list[str]:
        """Return the problems of a layer; empty if it can be read."""
        ...

    def rank(self, layer: Header) -> int | None:
        """Return the declared rank, which alpha is divided by; None if there is neither."""
        return None

    def shape(self, layer: Header) -> Shape | None:
        """Return the shape of the weight; None if only the base model shows it."""
        return layer.weight

    def is_dense(self, layer: Header) -> bool:
        """Return whether the lossless delta has more numbers than the file has for it."""
        return True

    def delta(self, layer: Header, values: Values) -> tuple[Delta, float]:
        """Return the weight's delta without alpha / rank, and its relative error.

        Raises:
            WrongValuesError: values, such as indices, contradict the header.
        """
        ...

    def changes_bias(self, layer: Header) -> bool:
        """Return whether the bias of the base model's layer also changes."""
        return False

    def bias_delta(self, layer: Header, values: Values) -> torch.Tensor:
        """Return the delta of that bias, (out,)."""
        raise AssertionError(f"{self.name} changes no bias")


def missing(needed: Sequence[Part], shapes: Shapes) -> list[str]:
    """Return one sentence if parts are missing, else an empty list."""
    absent = [part.name for part in needed if part not in shapes]
    return [f"has no {' and no '.join(absent)}"] if absent else []


def shapes_text(parts: Sequence[Part], shapes: Shapes) -> str:
    """Return parts with their shapes, for an error."""
    return ", ".join(f"{part.name} {list(shapes[part])}" for part in parts if part in shapes)
