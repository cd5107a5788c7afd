"""FRoD (PEFT): the weight is changed in a basis that layers of one kind share.

W = U diag(l) V^T, with columns of U of length one, becomes U (S + diag(l')) V^T with a sparse S.
The file has l', S, and V once per kind of layer; U follows from W and V.
"""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.forms.parts import (
    Form,
    Header,
    Need,
    Part,
    Values,
    WrongValuesError,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

DIAGONAL, SPARSE = Part("frod_lambda_l"), Part("frod_lambda_s_values")

_BASIS, _PLACES = "frod_V.", "frod_s_indices."

#: Length below which PEFT takes a column as zero.
_LEAST = 1e-12


class Frod(Form):
    """The form of FRoD; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "frod"
    parts = (DIAGONAL, SPARSE)
    shared_beginnings = (_BASIS, _PLACES, "frod_s_size.")
    needs = Need.WEIGHT
    peft = MappingProxyType({"FROD": None})

    def problems(self, layer: Header) -> list[str]:
        shapes = layer.shapes
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        basis, places = _of_kind(layer)
        if basis not in shapes or places not in shapes:
            return [f"the file has no {basis.name}; save it with save_projection=True"]
        size = shapes[basis][0]
        fits = shapes[basis] == (size, size) and shapes[DIAGONAL] == (size,)
        if not fits or shapes[places] != (2, *shapes[SPARSE]) or len(shapes[SPARSE]) != 1:
            found = shapes_text((*self.parts, basis, places), shapes)
            return [f"{found} do not fit each other"]
        if layer.weight is not None and (len(layer.weight) != 2 or layer.weight[1] != size):
            return [f"its basis is of {size} columns, and the base's is {list(layer.weight)}"]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        basis, places = (values.tensors[part] for part in _of_kind(layer))
        middle = torch.diag(values.tensors[DIAGONAL].double())
        rows, columns = places.long()
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < len(middle):
            raise WrongValuesError(f"its indices are outside of {list(middle.shape)}")
        middle.index_put_((rows, columns), values.tensors[SPARSE].double(), accumulate=True)
        v = basis.double()
        u = _written_in(v, values.weight)
        lengths = u.norm(dim=0)
        u = torch.where(lengths > _LEAST, u / lengths.clamp_min(_LEAST), torch.zeros_like(u))
        return Dense((u @ middle @ v.T - values.weight).float()), 0.0


def _written_in(basis: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return X with X V^T = W, or the nearest one if V is singular."""
    found: torch.Tensor
    try:
        found = torch.linalg.solve(basis, weight.T).T
    except RuntimeError:
        found = weight @ torch.linalg.pinv(basis, rtol=1e-6).T
    return found


def _of_kind(layer: Header) -> tuple[Part, Part]:
    """Return the basis of a layer's kind, and the indices of its sparse part.

    PEFT names the kind by the last two names of the path, or by the last name if the one before it
    is a number; the output of BERT's attention has its own kind.
    """
    *rest, last = layer.spelled.split(".")
    kind = last
    if rest and not rest[-1].isdigit():
        kind = f"{rest[-1]}_{last}"
        if kind == "output_dense" and rest[-2:-1] == ["attention"]:
            kind = "attention_output"
    return Part(_BASIS + kind), Part(_PLACES + kind)
