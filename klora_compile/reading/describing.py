"""What the modules of a file are: which layers, of which form, rank and scale.

All of it follows from the file's header and its alphas, so that a file can be shown without its
weights being computed. A module of the file may be several layers (fused rows), and a piece of it
the weight or the bias beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch

from klora_compile.reading.forms.catalogue import BIASES, MAGNITUDES, form_of
from klora_compile.reading.forms.dora import Axis, axes, common_axis
from klora_compile.reading.forms.parts import Form, Part, Shape
from klora_compile.reading.layers import LayerFacts
from klora_compile.reading.names.account import Account, Module
from klora_compile.reading.names.keys import UnplacedKey
from klora_compile.reading.names.placing import placements, targets_of
from klora_compile.reading.scale.peft_config import MAX_ALPHA
from klora_compile.reading.scale.scale import MIN_ALPHA, LayerScale, Scales
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.families.rows import Placement
from klora_runtime.families.unet import folded_kernel

#: dtypes of a file (by safetensors' name) -> what torch calls them. Those that are True are read.
_DTYPES: Mapping[str, tuple[str, bool]] = {
    "F32": ("float32", True),
    "F16": ("float16", True),
    "BF16": ("bfloat16", True),
    "F8_E4M3": ("float8_e4m3fn", True),
    "F8_E5M2": ("float8_e5m2", True),
    "F64": ("float64", False),
    "I64": ("int64", False),
    "I32": ("int32", False),
    "I16": ("int16", False),
    "I8": ("int8", False),
    "U8": ("uint8", False),
    "BOOL": ("bool", False),
}


#: Elements of one layer's delta, at most. The largest of a published model has 0.2 of this.
MAX_ELEMENTS = 2**29

#: Forms whose delta depends on the base model's weight.
BASE_FORMS = ("dora", "value")

#: An alpha's source where no alpha acts.
NO_ALPHA = "none"


class Tensors(Protocol):
    """A file whose header was read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Piece:
    """One parameter of one module of a file, described."""

    facts: LayerFacts
    """Of the whole module, under the file's name of it where a table places it."""
    module: Module
    form: Form | None
    """None for a bias."""
    part: Part | None
    """The tensor of a bias."""
    kernel: Shape
    places: tuple[Placement, ...]
    """The layers of diffusers that it is, and their rows."""
    grows: bool = False
    """Whether its delta becomes dense, if nothing is lost, and is not so in the file."""
    axis: frozenset[Axis] = frozenset()
    """Where it is DoRA's: what its magnitude may belong to."""

    @property
    def needs_base(self) -> bool:
        """Whether the delta depends on the base model's weight."""
        return self.facts.form in BASE_FORMS

    @cached_property
    def layers(self) -> tuple[LayerFacts, ...]:
        """The layers that it becomes."""
        return tuple(self._layer(place) for place in self.places)

    def _layer(self, place: Placement) -> LayerFacts:
        one = self.facts
        rows = one.shape[0] if place.rows is None else sum(map(len, place.rows))
        return replace(one, module=place.module, shape=(rows, *one.shape[1:]))


class Describer:
    """Says what the modules of a file are.

    Args:
        file: its header, and the tensors of its alphas.
        account: what its keys are.
        scales: what it says about alphas.
        options: how to read it.
    """

    def __init__(
        self, file: Tensors, account: Account, scales: Scales, options: ReadOptions
    ) -> None:
        self._file, self._account = file, account
        self._scales, self._options = scales, options

    def pieces(self, module: Module) -> Sequence[Piece | str]:
        """The parameters that a module changes, and what is wrong with it."""
        component, path = self._account.place(module)
        hindrance = self._scales.hindrance(component)
        if hindrance is not None:
            return [hindrance]
        problems = [*self._dtype_problems(module)]
        form = form_of(module.parts)
        if isinstance(form, str):
            return [form]
        infos = self._file.tensors
        shapes = {part: infos[key].shape for part, key in module.parts.items()}
        kernel = folded_kernel(component, self._diffusers_path(module, path))
        if form is not None:
            problems += form.problems(shapes, kernel)
        elif Part.UP_BIAS in module.parts:
            problems.append("has a bias of up, and no up")
        if problems:
            return problems
        rank = None if form is None else form.rank(shapes)
        if form is not None and form.name == "lokr" and rank is None:
            rank = self._scales.rank(component, path)
        shape = None if form is None else form.shape(shapes, kernel)
        whole = form is not None and form.rank(shapes) is None
        value, source, conflict = self._alpha(module, component, path, rank, shape, whole)
        pieces: list[Piece] = []
        if form is not None and shape is not None:
            axis = self._axes(module, shape)
            name = "dora" if axis is not None else form.name
            place = self._denoiser(component), path
            facts = LayerFacts(*place, "weight", name, rank, value, source, shape)
            grows = name in BASE_FORMS or form.is_dense(shapes, kernel)
            piece = Piece(facts, module, form, None, kernel, (), grows, axis or frozenset())
            if axis == frozenset():
                problems.append(
                    f"its magnitude {self._magnitude_shape(module)} has as many values as neither "
                    f"rows nor columns of the weight {list(shape)}"
                )
            if axis is None and self._scales.is_dora(component) and name == "lora":
                problems.append("is DoRA by its metadata, and has no magnitude")
            pieces.append(piece)
        pieces += self._biases(module, component, path, rank, value, source)
        problems += self._size_problems(pieces)
        if problems:
            return problems
        placed = [self._placed(piece, shape) for piece in pieces]
        return [*placed, *conflict]

    def _denoiser(self, component: str) -> str:
        """The component of the pipeline, which the file may not know."""
        return self._options.denoiser or component if component == "transformer" else component

    def _diffusers_path(self, module: Module, path: str) -> str:
        if not isinstance(module.key, UnplacedKey):
            return path
        assert self._account.table is not None
        return targets_of(self._account.table, module.key.stem)[0]

    def _biases(
        self,
        module: Module,
        component: str,
        path: str,
        rank: int | None,
        alpha: float | None,
        source: str,
    ) -> Iterator[Piece]:
        for part, form in BIASES.items():
            if part not in module.parts:
                continue
            shape = self._file.tensors[module.parts[part]].shape
            scaled = part is Part.UP_BIAS
            facts = LayerFacts(
                self._denoiser(component),
                path,
                "bias",
                form,
                rank if scaled else None,
                alpha if scaled else None,
                source if scaled else NO_ALPHA,
                shape,
            )
            yield Piece(facts, module, None, part, (), ())

    def _size_problems(self, pieces: Sequence[Piece]) -> Iterator[str]:
        for piece in pieces:
            shape = piece.facts.shape
            if math.prod(shape) > MAX_ELEMENTS:
                yield (
                    f"its delta {list(shape)} would have {math.prod(shape)} elements, at most "
                    f"{MAX_ELEMENTS} are read"
                )
            if piece.facts.parameter == "bias" and len(shape) != 1:
                yield f"its bias is {list(shape)}, expected one dimension"
        weights = [piece.facts.shape[0] for piece in pieces if piece.facts.parameter == "weight"]
        biases = [piece.facts.shape for piece in pieces if piece.facts.parameter == "bias"]
        if len(biases) > 1:
            yield "has two biases"
        if weights and biases and biases[0] != (weights[0],):
            yield f"its bias is {list(biases[0])}, expected [{weights[0]}] as its weight has rows"

    def _placed(self, piece: Piece, weight: Shape | None) -> Piece | str:
        """The piece with the layers of diffusers that it is."""
        key, table = piece.module.key, self._account.table
        if not isinstance(key, UnplacedKey):
            places: tuple[Placement, ...] | str = (Placement(piece.facts.module, None),)
        else:
            assert table is not None
            inner = weight[1] if weight is not None and len(weight) > 1 else None
            places = placements(table, key.stem, piece.facts.shape[0], inner)
        if isinstance(places, str):
            return places
        return replace(piece, places=places)

    def _dtype_problems(self, module: Module) -> Iterator[str]:
        for part, key in module.parts.items():
            info = self._file.tensors[key]
            if part is Part.ALPHA:
                if math.prod(info.shape) != 1:
                    yield "alpha is not one number"
                continue
            name, read = _DTYPES[info.dtype]
            if not read:
                yield (
                    f"{part.value} is torch.{name}, expected float32, float16, bfloat16 or float8"
                )

    def _axes(self, module: Module, shape: Shape) -> frozenset[Axis] | None:
        """What a DoRA's magnitude may belong to; None where it is none."""
        found = [part for part in MAGNITUDES if part in module.parts]
        if not found:
            return None
        magnitude = self._file.tensors[module.parts[found[0]]].shape
        if len(shape) < 2:
            return frozenset()
        if found[0] is Part.ROW_MAGNITUDE:
            return frozenset([Axis.OUTPUT] if math.prod(magnitude) == shape[0] else [])
        return axes(magnitude, shape)

    def _magnitude_shape(self, module: Module) -> list[int]:
        part = next(part for part in MAGNITUDES if part in module.parts)
        return list(self._file.tensors[module.parts[part]].shape)

    def _alpha(
        self,
        module: Module,
        component: str,
        path: str,
        rank: int | None,
        shape: Shape | None,
        whole: bool,
    ) -> tuple[float | None, str, list[str]]:
        """Alpha, where it is from, and what is wrong with it."""
        if rank is None or shape is None:
            return None, NO_ALPHA, []
        tensor = None
        if Part.ALPHA in module.parts:
            tensor = float(self._file.tensor(module.parts[Part.ALPHA]))
        layer = LayerScale(
            component,
            path,
            rank,
            kernel=len(shape) > 2,
            by_kohya=module.key.layout == "kohya",
            whole=whole,
            tensor=tensor,
        )
        alpha, other = self._scales.alpha(layer)
        if alpha.value and not MIN_ALPHA <= abs(alpha.value) <= MAX_ALPHA:
            expected = f"0 or {MIN_ALPHA:g} to {MAX_ALPHA:g}"
            return None, alpha.source, [f"alpha is {alpha.value}, expected {expected}"]
        problems = []
        if other is not None and self._options.alpha_conflict == "error":
            problems.append(
                f"alpha is {alpha.value:g} by {alpha.source} and {other.value:g} by "
                f"{other.source}; --alpha-conflict first takes the first"
            )
        return alpha.value, alpha.source, problems


def file_axis(pieces: Sequence[Piece]) -> Axis | str | None:
    """What the magnitudes of a file belong to, for which all of its layers speak.

    Returns:
        The axis, None where no layer is DoRA's, or what is wrong.
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
        "its magnitudes are vectors and its weights are square: it cannot be told whether they "
        "belong to rows or to columns; save it with magnitudes of (out, 1) or (1, in)"
    )
