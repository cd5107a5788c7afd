"""What a tensor is to its layer, and what a form makes of a layer's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Protocol

import torch

from klora_runtime.artifact.delta import Delta


@dataclass(frozen=True)
class Part:
    """A tensor of a layer, in the words of the form that it belongs to."""

    name: str
    """As errors call it."""
    endings: tuple[str, ...] = ()
    """Of its keys, behind the module's name; empty for a dot and the name."""
    beside: str | None = None
    """The ending is this part's only where the module has a key with this ending as well."""
    whole_numbers: bool = False
    """Whether its values are integers."""

    @property
    def all_endings(self) -> tuple[str, ...]:
        """Endings of its keys."""
        return self.endings or (f".{self.name}",)


#: What to do where a form's settings are missing.
KEEP_CONFIG = "keep adapter_config.json beside the file"

#: What divided by the rank multiplies a delta; of rotations, how far they may turn.
ALPHA = Part("alpha")

Shape = tuple[int, ...]
Shapes = Mapping[Part, Shape]
Tensors = Mapping[Part, torch.Tensor]
Settings = Mapping[str, Any]


class Need(Enum):
    """What a form needs of the base model's layer."""

    NOTHING = "nothing"
    SHAPE = "shape"
    WEIGHT = "weight"


@dataclass(frozen=True)
class Header:
    """What is known of a layer before any number is read."""

    shapes: Shapes
    """Of the layer's tensors, and of those that the file has once for all layers."""
    kernel: Shape = ()
    """The convolution's, where the tensors do not say it; empty for a linear layer."""
    weight: Shape | None = None
    """Shape of the base model's weight; None where no base model is at hand."""
    has_bias: bool = False
    """Whether the base model's layer has a bias; false where no base model is at hand."""
    settings: Settings = field(default_factory=dict)
    """PEFT's configuration of the component; empty where the file has none."""
    spelled: str = ""
    """What stands before the module's name, where that tells a trainer."""


@dataclass(frozen=True)
class Peers:
    """All layers of one form in a file."""

    count: int = 0
    """Modules of the file."""
    rows: int = 0
    """The most of any weight."""
    columns: int = 0
    """The most of any weight."""


@dataclass(frozen=True)
class Values:
    """The numbers of a layer."""

    tensors: Tensors
    """Of the layer, and those that the file has once for all layers."""
    error: float = 0.0
    """How much of a delta's norm may be lost where only an approximation is smaller."""
    weight: torch.Tensor | None = None
    """The base model's, float64, where the form needs it."""
    bias: torch.Tensor | None = None
    """The base model's, float64, where the form changes it."""
    peers: Peers = Peers()
    """All layers of this form."""


class WrongValuesError(ValueError):
    """Numbers of a layer contradict its header; the text says how."""


class Form(Protocol):
    """How a weight's delta is written. Headers come before values: they are cheap to look at.

    A form subclasses this; what it does not define is as here.
    """

    name: str
    """As in a report."""
    parts: Sequence[Part]
    """The parts that only this form has."""
    shared: Sequence[Part] = ()
    """Parts that a file has once, for all layers."""
    shared_beginnings: Sequence[str] = ()
    """How keys begin that are such parts too, each of them called as the key."""
    alone: str = ""
    """What to say of such parts where the file has no layer of the form."""
    needs: Need = Need.NOTHING
    """What of the base model's layer the delta depends on."""
    settings_state_rank: bool = False
    """Whether the file's settings may state the rank where its tensors do not."""
    root_is_folded: bool = True
    """Whether a trainer that divides alpha by the root of the rank writes another alpha, which
    divided by the rank is the same."""
    peft: Mapping[str, str | None] = MappingProxyType({})
    """PEFT's name of the form -> the key of its alpha, None where it has none."""

    def shares(self, part: Part) -> bool:
        """Whether a part that the file has once is one of this form's."""
        return part in self.shared or part.name.startswith(tuple(self.shared_beginnings))

    def title(self, layer: Header) -> str:
        """As in a report, where it depends on the layer."""
        return self.name

    def problems(self, layer: Header) -> list[str]:
        """What is wrong with a layer of these parts; empty where it can be read."""
        ...

    def rank(self, layer: Header) -> int | None:
        """The rank that the trainer declared, which alpha is divided by; None where there is none,
        and with it no alpha."""
        return None

    def shape(self, layer: Header) -> Shape | None:
        """Shape of the weight; None where only a base model would tell."""
        return layer.weight

    def is_dense(self, layer: Header) -> bool:
        """Whether the delta becomes more numbers than the file has for it, if nothing is lost."""
        return True

    def delta(self, layer: Header, values: Values) -> tuple[Delta, float]:
        """The weight's delta without alpha / rank, and the share of its norm that is lost.

        Raises:
            WrongValuesError: numbers, such as positions, contradict the header.
        """
        ...

    def changes_bias(self, layer: Header) -> bool:
        """Whether the bias of the base model's layer changes too."""
        return False

    def bias_delta(self, layer: Header, values: Values) -> torch.Tensor:
        """The change of that bias, (out,)."""
        raise AssertionError(f"{self.name} changes no bias")


def missing(needed: Sequence[Part], shapes: Shapes) -> list[str]:
    """One sentence where parts are missing."""
    absent = [part.name for part in needed if part not in shapes]
    return [f"has no {' and no '.join(absent)}"] if absent else []


def shapes_text(parts: Sequence[Part], shapes: Shapes) -> str:
    """Parts with their shapes, for an error."""
    return ", ".join(f"{part.name} {list(shapes[part])}" for part in parts if part in shapes)
