"""A profile: one LoRA file, its layers, and where their statistics are; without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klora_compile.reading.adapter import Adapter
from klora_compile.reading.forms.parts import Shape
from klora_runtime.artifact.document import source_json, source_of
from klora_runtime.artifact.schedule import Source
from klora_runtime.linking.numbers import Place

#: Increases when a profile would hold other facts.
PROFILE_VERSION = 1


@dataclass(frozen=True)
class ProfiledLayer:
    """One layer of a profile."""

    place: Place
    rank: int
    scaling: float
    pair: tuple[str, str, tuple[tuple[int, int], ...] | None] | None
    """Keys of down and up in the file, and the rows of up; None if the factors are computed."""
    is_shaped: bool
    """Whether the file's header shows the shape of the layer."""


@dataclass(frozen=True)
class Profile:
    """What is known of one LoRA file."""

    key: str
    path: str
    """Where the file was when it was profiled."""
    source: Source
    families: tuple[str, ...]
    """Sorted keys of the base models that the file allows."""
    layers: tuple[ProfiledLayer, ...]
    """In the order of the statistics."""
    norms: tuple[float, ...]
    """Frobenius norm of each delta, from products of its factors, without the scaling."""
    statistics: str
    """Key of the statistics of its layers in the store."""
    half: str | None
    """``high`` or ``low`` for a LoRA in two files, else None."""
    lora: str
    """Digest of the files of the LoRA: one file, or two halves."""
    options: Mapping[str, Any]
    """Field of :class:`~klora_compile.settings.read_options.ReadOptions` -> its value."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Distinct ranks, ascending."""
        return tuple(sorted({layer.rank for layer in self.layers}))


def profile_from(
    adapter: Adapter,
    source: Source,
    *,
    key: str,
    statistics: str,
    norms: Mapping[str, float],
    half: str | None,
    lora: str,
    options: Mapping[str, Any],
) -> Profile:
    """Return the profile of a LoRA that was read and measured.

    Args:
        adapter: the LoRA.
        source: its file, as an artifact states it.
        key: the profile's key.
        statistics: key of its statistics.
        norms: layer name -> norm.
        half: see :class:`Profile`.
        lora: see :class:`Profile`.
        options: see :class:`Profile`.
    """
    shaped = {facts.name for facts in adapter.survey.layers if facts.shape is not None}
    layers = []
    for name, layer in adapter.layers.items():
        pair = None
        if layer.pair is not None and layer.form == "lora" and _is_safetensors(adapter):
            rows = layer.pair.rows
            ranges = None if rows is None else tuple((each.start, each.stop) for each in rows)
            pair = (layer.pair.down, layer.pair.up, ranges)
        place = Place(layer.component, layer.module, layer.parameter, layer.shape)
        layers.append(ProfiledLayer(place, layer.rank, layer.scaling, pair, name in shaped))
    return Profile(
        key,
        str(adapter.survey.path.absolute()),
        source,
        adapter.survey.families,
        tuple(layers),
        tuple(norms[name] for name in adapter.layers),
        statistics,
        half,
        lora,
        options,
    )


def written(profile: Profile) -> tuple[dict[str, Any], Sequence[float]]:
    """Return the JSON of a profile, and its norms."""
    facts = {
        "version": PROFILE_VERSION,
        "path": profile.path,
        "source": source_json(profile.source),
        "families": profile.families,
        "layers": [
            [*each.place[:3], each.place.shape, each.rank, each.scaling, each.pair, each.is_shaped]
            for each in profile.layers
        ],
        "statistics": profile.statistics,
        "half": profile.half,
        "lora": profile.lora,
        "options": dict(profile.options),
    }
    return facts, profile.norms


def profile_of(key: str, facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> Profile:
    """Return the profile of :func:`written`.

    Raises:
        KeyError, TypeError, ValueError: the facts are not those of a profile.
    """
    if facts["version"] != PROFILE_VERSION:
        raise ValueError("another version")
    (norms,) = arrays["norms"]
    layers = tuple(
        ProfiledLayer(Place(c, m, p, tuple(shape)), rank, float(scaling), _pair(pair), shaped)
        for c, m, p, shape, rank, scaling, pair, shaped in facts["layers"]
    )
    if len(layers) != len(norms):
        raise ValueError("other norms than layers")
    return Profile(
        key,
        facts["path"],
        source_of(facts["source"]),
        tuple(facts["families"]),
        layers,
        tuple(norms),
        facts["statistics"],
        facts["half"],
        facts["lora"],
        facts["options"],
    )


def _pair(value: Any) -> tuple[str, str, tuple[tuple[int, int], ...] | None] | None:
    if value is None:
        return None
    down, up, rows = value
    return down, up, None if rows is None else tuple((begin, end) for begin, end in rows)


def _is_safetensors(adapter: Adapter) -> bool:
    return adapter.survey.path.suffix == ".safetensors"


def shape_told(layer: ProfiledLayer) -> Shape | None:
    """Return the shape that the file's header shows."""
    return layer.place.shape if layer.is_shaped else None
