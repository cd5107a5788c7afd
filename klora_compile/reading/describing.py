"""Descriptions of a file's modules: their layers, form, rank and scale.

They follow from the file's header and its alphas, so a file can be shown without computing
weights. A module of the file may be several layers (fused rows). A piece is its weight or its bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, Protocol

from klora_compile.families.convolutions import folded_kernel
from klora_compile.reading.checking import dtype_problems, form_problems, size_problems
from klora_compile.reading.forms.catalogue import BIASES, MAGNITUDES
from klora_compile.reading.forms.dora import ROW_MAGNITUDE, Axis, axes
from klora_compile.reading.forms.full import Full, as_bias
from klora_compile.reading.forms.lora import UP_BIAS, without_ones
from klora_compile.reading.forms.parts import ALPHA, Form, Header, Need, Part, Settings, Shape
from klora_compile.reading.layers import LayerFacts, layer_name
from klora_compile.reading.names.account import Account, Module
from klora_compile.reading.names.keys import UnplacedModule
from klora_compile.reading.names.placing import in_diffusers_names, placements, targets_of
from klora_compile.reading.pieces import Piece
from klora_compile.reading.scale.peft_config import MAX_ALPHA
from klora_compile.reading.scale.scale import MIN_ALPHA, RECORD, LayerScale, Scales
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.artifact.file_tensor import FileTensor
from klora_runtime.artifact.safetensors_file import TensorInfo
from klora_runtime.families.rows import Placement
from klora_runtime.lazy_torch import torch

#: The source of an alpha if no alpha acts.
NO_ALPHA = "none"


class Tensors(Protocol):
    """A file with a parsed header."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def number(self, name: str) -> float: ...

    def stored(self, name: str) -> FileTensor | None: ...

    def tensor(self, name: str) -> torch.Tensor: ...


class Base(Protocol):
    """A base model with parsed headers."""

    def shape(self, component: str, module: str, parameter: str = "weight") -> Shape | None: ...


class Description(NamedTuple):
    """The description of a file's module."""

    pieces: tuple[Piece, ...] = ()
    """The parameters that it changes; empty if they are unknown."""
    problems: tuple[str, ...] = ()
    """Its problems, one sentence each."""


class _Subject(NamedTuple):
    """A module whose tensors are consistent."""

    module: Module
    component: str
    """Component in the file; see :meth:`Account.place`."""
    path: str
    form: Form | None
    """Form of the weight's delta; None if only a bias changes."""
    header: Header
    rank: int | None
    """Rank that its tensors declare; None if the form has none."""
    shape: Shape | None
    """Shape of the weight's delta; None if there is none, or only the base model shows it."""
    magnitude: Part | None
    """The part with DoRA's magnitude, if there is one."""

    @property
    def shapes(self) -> Mapping[Part, Shape]:
        """Shapes of its tensors."""
        return self.header.shapes


class _Stated(NamedTuple):
    """What the file states of a whole component."""

    hindrance: str | None
    settings: Settings
    is_dora: bool


class _Scale(NamedTuple):
    """A module's scale, as the file states it."""

    rank: int | None
    """Declared rank; None if the form has none."""
    alpha: float | None = None
    source: str = NO_ALPHA
    problems: tuple[str, ...] = ()


class Describer:
    """Describes the modules of a file.

    Args:
        file: the file's header, and the tensors of its alphas.
        account: the account of its keys.
        scales: its statements about alphas.
        options: options of reading.
        base: the base model, if one is given.
    """

    def __init__(
        self,
        file: Tensors,
        account: Account,
        scales: Scales,
        options: ReadOptions,
        base: Base | None,
    ) -> None:
        self._file, self._account = file, account
        self._scales, self._options = scales, options
        self._base = base
        self._of_components: dict[str, _Stated] = {}

    def describe(self, module: Module) -> Description:
        """Return the parameters that a module changes, and its problems."""
        component, path = self._account.place(module)
        form = self._stated(component).hindrance or module.form
        if isinstance(form, str):
            return Description(problems=(form,))
        subject = self._subject(module, component, path, form)
        if not isinstance(subject, _Subject):
            return Description(problems=subject)
        scale = self._scale(subject)
        weights = [] if form is None else [self._weight(subject, form, scale)]
        biases = list(self._biases(subject, scale))
        if form is not None and form.changes_bias(subject.header):
            biases.append(self._bias_of_base(subject, form))
        problems = [p for weight in weights for p in self._magnitude_problems(subject, weight)]
        problems += size_problems(weights, biases)
        if problems:
            return Description(problems=tuple(problems))
        shapes = [weight.facts.shape for weight in weights]
        inner = next((shape[1] for shape in shapes if shape is not None and len(shape) > 1), None)
        return self._placed([*weights, *biases], inner, scale.problems)

    def _stated(self, component: str) -> _Stated:
        found = self._of_components.get(component)
        if found is None:
            scales = self._scales
            found = self._of_components[component] = _Stated(
                scales.hindrance(component), scales.settings(component), scales.is_dora(component)
            )
        return found

    def _subject(
        self, module: Module, component: str, path: str, form: Form | None
    ) -> _Subject | tuple[str, ...]:
        """Return a module with its header, or the problems of its tensors."""
        header = self._header(module, component, path, form)
        if isinstance(header, str):
            return (header,)
        problems = (*self._dtype_problems(module), *form_problems(form, header))
        if problems:
            return problems
        return _Subject(
            module=module,
            component=component,
            path=path,
            form=form,
            header=header,
            rank=None if form is None else form.rank(header),
            shape=None if form is None else form.shape(header),
            magnitude=next((part for part in MAGNITUDES if part in header.shapes), None),
        )

    def _header(self, module: Module, component: str, path: str, form: Form | None) -> Header | str:
        """Return the header of a module, or why the base model does not complete it."""
        parts = dict(module.parts)
        weight, has_bias = None, False
        if form is not None:
            parts |= {p: key for p, key in self._account.shared.items() if form.shares(p)}
            if form.needs is not Need.NOTHING and self._base is not None:
                found = self._base_shape(module, component, path)
                if isinstance(found, str):
                    return found
                weight, has_bias = found
        return Header(
            shapes={part: self._file.tensors[key].shape for part, key in parts.items()},
            kernel=folded_kernel(component, self._targets(module, path)[0].path),
            weight=weight,
            has_bias=has_bias,
            settings=self._stated(component).settings,
            spelled=module.key.raw,
        )

    def _base_shape(self, module: Module, component: str, path: str) -> tuple[Shape, bool] | str:
        """Return the shape of a module's weight from the base model's layers, and whether they have
        a bias; or the problem."""
        assert self._base is not None
        component = self._denoiser(component)
        shapes, biases = [], []
        for target in self._targets(module, path):
            parameter = target.parameter or "weight"
            shape = self._base.shape(component, target.module, parameter)
            if not shape:
                name = layer_name(component, target.module, parameter)
                return f"the base model has no {name}{'' if target.parameter else '.weight'}"
            shapes.append((shape[0], *shape[1:2], *without_ones(shape[2:])))
            biases.append(self._base.shape(component, target.module, "bias") is not None)
        if len({shape[1:] for shape in shapes}) > 1:
            return "the base model's layers that it joins have different widths"
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]), all(biases)

    def _denoiser(self, component: str) -> str:
        """Return the component of the pipeline, which the file may not state."""
        return self._options.denoiser or component if component == "transformer" else component

    def _targets(self, module: Module, path: str) -> tuple[Placement, ...]:
        """Return the modules of diffusers that a file's module becomes."""
        if not isinstance(module.key, UnplacedModule):
            return (in_diffusers_names(path),)
        assert self._account.table is not None
        return targets_of(self._account.table, module.key.stem)

    def _dtype_problems(self, module: Module) -> Iterator[str]:
        tensors = self._file.tensors
        return dtype_problems({part: tensors[key] for part, key in module.parts.items()})

    def _scale(self, subject: _Subject) -> _Scale:
        """Return rank and alpha, and their problems."""
        form = subject.form
        rank = declared = subject.rank
        if form is not None and form.settings_state_rank and rank is None:
            rank = self._scales.rank(subject.component, subject.path)
        if form is None or rank is None:
            return _Scale(rank)
        layer = self._layer_scale(subject, form, rank)
        wrong_rank = None if declared is None else self._scales.rank_problem(layer)
        if wrong_rank is not None:
            return _Scale(rank, problems=(wrong_rank,))
        alpha, other = self._scales.alpha(layer)
        if layer.tensor is None and alpha.source in RECORD and self._is_record_stale:
            alpha, other = self._scales.alpha(layer, is_record_stale=True)
        if alpha.value and not MIN_ALPHA <= abs(alpha.value) <= MAX_ALPHA:
            expected = f"0 or {MIN_ALPHA:g} to {MAX_ALPHA:g}"
            problem = f"alpha is {alpha.value}, expected {expected}"
            return _Scale(rank, None, alpha.source, (problem,))
        if other is None or self._options.alpha_conflict == "first":
            return _Scale(rank, alpha.value, alpha.source)
        problem = (
            f"alpha is {alpha.value:g} by {alpha.source} and {other.value:g} by "
            f"{other.source}; --alpha-conflict first takes the first"
        )
        return _Scale(rank, alpha.value, alpha.source, (problem,))

    def _layer_scale(self, subject: _Subject, form: Form, rank: int) -> LayerScale:
        key = subject.module.parts.get(ALPHA)
        return LayerScale(
            subject.component,
            subject.path,
            rank,
            kernel=len(subject.shape or ()) > 2,
            by_kohya=subject.module.key.layout == "kohya",
            whole=subject.rank is None,
            root_is_folded=form.root_is_folded,
            tensor=None if key is None else self._file.number(key),
        )

    @cached_property
    def _is_record_stale(self) -> bool:
        """Whether the tensors of some layer contradict kohya's record."""
        for module in self._account.modules:
            form = module.form
            if ALPHA not in module.parts or form is None or isinstance(form, str):
                continue
            subject = self._subject(module, *self._account.place(module), form)
            if not isinstance(subject, _Subject) or subject.rank is None:
                continue
            if self._scales.is_contradicted(self._layer_scale(subject, form, subject.rank)):
                return True
        return False

    def _weight(self, subject: _Subject, form: Form, scale: _Scale) -> Piece:
        shape = subject.shape
        name = form.title(subject.header) if subject.magnitude is None else "dora"
        needs = form.needs if subject.magnitude is None else Need.WEIGHT
        facts = LayerFacts(
            component=self._denoiser(subject.component),
            module=subject.path,
            parameter="weight",
            form=name,
            rank=scale.rank,
            alpha=scale.alpha,
            alpha_source=scale.source,
            shape=shape,
        )
        return Piece(
            facts=facts,
            module=subject.module,
            form=form,
            part=None,
            header=subject.header,
            needs=needs,
            shared={p: key for p, key in self._account.shared.items() if form.shares(p)},
            grows=name == "dora" or form.is_dense(subject.header),
            axis=_axes(subject, shape),
        )

    def _bias_of_base(self, subject: _Subject, form: Form) -> Piece:
        """Return the bias that a form changes along with its weight."""
        shape = subject.shape
        facts = LayerFacts(
            component=self._denoiser(subject.component),
            module=subject.path,
            parameter="bias",
            form=form.title(subject.header),
            rank=None,
            alpha=None,
            alpha_source=NO_ALPHA,
            shape=None if shape is None else shape[:1],
        )
        return Piece(
            facts, subject.module, form=form, part=None, header=subject.header, needs=Need.WEIGHT
        )

    def _biases(self, subject: _Subject, scale: _Scale) -> Iterator[Piece]:
        for part, form in BIASES.items():
            if part not in subject.shapes:
                continue
            scaled = part == UP_BIAS  # (up @ down + up's bias) * alpha / rank
            facts = LayerFacts(
                component=self._denoiser(subject.component),
                module=subject.path,
                parameter="bias",
                form=form,
                rank=scale.rank if scaled else None,
                alpha=scale.alpha if scaled else None,
                alpha_source=scale.source if scaled else NO_ALPHA,
                shape=as_bias(part, subject.shapes[part]),
            )
            yield Piece(facts, subject.module, form=None, part=part)

    def _magnitude_problems(self, subject: _Subject, weight: Piece) -> Iterator[str]:
        if subject.magnitude is not None and not weight.axis:
            yield (
                f"its magnitude {list(subject.shapes[subject.magnitude])} matches neither the "
                f"rows nor the columns of its weight {list(weight.facts.shape or ())}"
            )
        if weight.facts.form == "lora" and self._stated(subject.component).is_dora:
            yield "its metadata says DoRA, but it has no magnitude"

    def _placed(
        self, pieces: Sequence[Piece], inner: int | None, conflicts: Sequence[str]
    ) -> Description:
        """Return the pieces with their layers of diffusers.

        Args:
            inner: columns of the module's weight; None if it has no weight.
            conflicts: problems of the scale, which do not prevent the placing.
        """
        placed, problems = [], []
        for piece in pieces:
            places = self._places(piece, inner)
            if isinstance(places, str):
                problems.append(places)
            elif places[0].parameter is not None and not isinstance(piece.form, Full):
                problems.append(
                    f"{places[0].path} is a parameter and no layer, expected its difference alone"
                )
            else:
                placed.append(replace(piece, places=places))
        return Description(tuple(placed), (*problems, *conflicts))

    def _places(self, piece: Piece, inner: int | None) -> tuple[Placement, ...] | str:
        key, table = piece.module.key, self._account.table
        if not isinstance(key, UnplacedModule):
            return (in_diffusers_names(piece.facts.module),)
        assert table is not None
        if piece.facts.shape is None:  # the piece is only shown
            return targets_of(table, key.stem)
        return placements(table, key.stem, piece.facts.shape[0], inner)


def _axes(subject: _Subject, shape: Shape | None) -> frozenset[Axis]:
    """Return the axes that DoRA's magnitude may belong to; empty without a fitting magnitude."""
    if subject.magnitude is None or shape is None or len(shape) < 2:
        return frozenset()
    magnitude = subject.shapes[subject.magnitude]
    if subject.magnitude == ROW_MAGNITUDE:
        return frozenset([Axis.OUTPUT] if math.prod(magnitude) == shape[0] else [])
    return axes(magnitude, shape)
