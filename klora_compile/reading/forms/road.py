"""RoAd (arXiv 2409.00119): pairs of the layer's outputs are rotated and scaled.

In each group of ``group_size`` outputs, one of the first half and one of the second half form a
pair. There is an angle and a length per pair (``road_1``), per output (``road_2``), or two per
output, for the cosine and for the sine (``road_4``). The bias rotates with the weight.
"""

from __future__ import annotations

from types import MappingProxyType

from klora_compile.reading.forms.parts import (
    KEEP_CONFIG,
    Form,
    Header,
    Need,
    Part,
    Values,
    missing,
    shapes_text,
)
from klora_runtime.artifact.delta import Dense
from klora_runtime.lazy_torch import torch

ANGLES, LENGTHS = Part("road_theta"), Part("road_alpha")

#: Variant -> number of angles per pair of rows.
_PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}


class Road(Form):
    """The form of RoAd; see :class:`~klora_compile.reading.forms.parts.Form`."""

    name = "road"
    parts = (ANGLES, LENGTHS)
    needs = Need.WEIGHT
    peft = MappingProxyType({"ROAD": None})

    def problems(self, layer: Header) -> list[str]:
        shapes, settings = layer.shapes, layer.settings
        absent = missing(self.parts, shapes)
        if absent:
            return absent
        group, per_pair = settings.get("group_size"), _PER_PAIR.get(str(settings.get("variant")))
        if type(group) is not int or per_pair is None:
            return [f"PEFT's configuration says its group_size and variant; {KEEP_CONFIG}"]
        if layer.weight is None:
            return []
        rows = layer.weight[0]
        sizes = {shapes[part] for part in self.parts}
        fits = group > 1 and group % 2 == 0 and rows % group == 0 and len(layer.weight) == 2
        if not fits or sizes != {(rows // 2 * per_pair,)}:
            found = shapes_text(self.parts, shapes)
            return [
                f"{found} in groups of {group} do not fit the base model's weight "
                f"{list(layer.weight)}"
            ]
        return []

    def delta(self, layer: Header, values: Values) -> tuple[Dense, float]:
        assert values.weight is not None
        return Dense((_turned(layer, values, values.weight) - values.weight).float()), 0.0

    def changes_bias(self, layer: Header) -> bool:
        return layer.has_bias

    def bias_delta(self, layer: Header, values: Values) -> torch.Tensor:
        assert values.bias is not None
        return _turned(layer, values, values.bias[:, None]).flatten() - values.bias


def _turned(layer: Header, values: Values, rows: torch.Tensor) -> torch.Tensor:
    """Return rows (out, n) with each pair rotated and scaled."""
    half = layer.settings["group_size"] // 2
    cosines, sines = _factors(layer, values)
    pairs = rows.view(-1, 2, half, rows.shape[1])
    across = torch.stack([-pairs[:, 1], pairs[:, 0]], dim=1).view_as(rows)
    return cosines[:, None] * rows + sines[:, None] * across


def _factors(layer: Header, values: Values) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors on each row and on its partner."""
    angles, lengths = (values.tensors[part].double() for part in (ANGLES, LENGTHS))
    variant, group = layer.settings["variant"], layer.settings["group_size"]
    if variant == "road_4":
        angles, lengths = (each.view(-1, 2, group).transpose(0, 1) for each in (angles, lengths))
        cosines, sines = lengths[0] * angles[0].cos(), lengths[1] * angles[1].sin()
        return cosines.flatten(), sines.flatten()
    if variant == "road_1":
        angles, lengths = (
            each.view(-1, 1, group // 2).expand(-1, 2, -1).flatten() for each in (angles, lengths)
        )
    return lengths * angles.cos(), lengths * angles.sin()
