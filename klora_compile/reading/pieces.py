"""Pieces: the parameters that a file changes, with their form and their destination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from klora_compile.reading.forms.dora import Axis, common_axis
from klora_compile.reading.forms.parts import Form, Header, Need, Part, Peers
from klora_compile.reading.layers import LayerFacts
from klora_compile.reading.names.account import Module
from klora_runtime.families.rows import Placement


@dataclass(frozen=True)
class Piece:
    """The description of one parameter of one module of a file."""

    facts: LayerFacts
    """Facts about the whole module, under the file's name if a table places it."""
    module: Module
    form: Form | None
    """Form; None for a bias."""
    part: Part | None
    """The tensor of a bias."""
    header: Header = field(default_factory=lambda: Header({}))
    """Header of the module."""
    needs: Need = Need.NOTHING
    """The part of the base model's layer that its delta depends on."""
    shared: Mapping[Part, str] = field(default_factory=dict)
    """Part -> key, for its tensors that the file has once for all modules."""
    places: tuple[Placement, ...] = ()
    """Its layers of diffusers, and their rows."""
    grows: bool = False
    """Whether its lossless delta is dense although the file does not hold it as dense."""
    axis: frozenset[Axis] = frozenset()
    """For DoRA, the axes that its magnitude may belong to."""

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on the base model's layer."""
        return self.needs is not Need.NOTHING

    @cached_property
    def layers(self) -> tuple[LayerFacts, ...]:
        """The layers that it becomes."""
        return tuple(self._layer(place) for place in self.places)

    def _layer(self, place: Placement) -> LayerFacts:
        facts = self.facts
        parameter, shape = place.parameter or facts.parameter, facts.shape
        if shape is not None and place.rows is not None:
            shape = (sum(map(len, place.rows)), *shape[1:])
        if (place.module, parameter, shape) == (facts.module, facts.parameter, facts.shape):
            return facts
        return replace(facts, module=place.module, parameter=parameter, shape=shape)


def file_axis(pieces: Sequence[Piece]) -> Axis | str | None:
    """Return the axis of a file's magnitudes, which all its layers together determine.

    Returns:
        The axis; None if there is no DoRA layer; or the problem.
    """
    found = [piece.axis for piece in pieces if piece.axis]
    if not found:
        return None
    axis = common_axis(found)
    if axis is not None:
        return axis
    if any(len(each) == 1 for each in found):
        return "some magnitudes belong to rows, others to columns"
    return (
        "its magnitudes are vectors and its weights are square, so rows and columns look "
        "alike; save it with magnitudes of (out, 1) or (1, in)"
    )


def peers(pieces: Sequence[Piece]) -> Mapping[str, Peers]:
    """Return form -> all weights of this form."""
    found: dict[str, Peers] = {}
    for piece in pieces:
        shape = piece.facts.shape
        if piece.form is not None and shape is not None and len(shape) > 1:
            own = found.get(piece.form.name, Peers())
            found[piece.form.name] = Peers(
                own.count + 1, max(own.rows, shape[0]), max(own.columns, shape[1])
            )
    return found
