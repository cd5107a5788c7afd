"""From statistics to a plan: the slots and timeline of every layer of the LoRAs.

A plan is pure numbers, without tensors or files. The rule chooses inside a layer; this module adds
what is the same for every rule: layers of only one LoRA, zero deltas, text encoders, biases and
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klora_compile.planning.fates import BESIDE
from klora_compile.rules.kit.numbers import LayerNumbers
from klora_compile.rules.kit.outcomes import Choice, Segment
from klora_compile.settings.config import Config
from klora_compile.settings.shared import Settings
from klora_compile.slots import half_of, role_of, slot_of
from klora_runtime.artifact.timeline import Timeline
from klora_runtime.errors import ConfigError, PairingError

_NOTHING: tuple[Segment, ...] = ((0.0, {}),)


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one layer."""

    fate: str
    """A key of :data:`klora_compile.planning.fates.FATES` or of the rule's fates."""
    timeline: Timeline
    present: tuple[str, ...]
    """Slots whose delta is not zero."""
    scales: Mapping[str, float]
    """Slot -> factor on its delta: alpha / rank, or 1 if the network alpha is ignored. Every slot
        that adapts the layer has one."""
    scores: Mapping[str, Any]
    """Measured numbers for reports and new schedules; they decide nothing in an artifact."""

    @property
    def used(self) -> tuple[str, ...]:
        """Slots that act at some progress."""
        return tuple(slot for slot in self.present if self.timeline.uses(slot))


@dataclass(frozen=True)
class Plan:
    """The plan of the whole model."""

    derived: Mapping[str, Any]
    """Numbers that the rule computed for the model, such as ``gamma`` by component."""
    layers: Mapping[str, LayerPlan]
    """Layer name -> plan, in the given order."""


def make_plan(numbers: Mapping[str, LayerNumbers], config: Config) -> Plan:
    """Apply a rule to the statistics of LoRAs, and add those that always act.

    Args:
        numbers: layer name -> numbers of all LoRAs.
        config: the rule and the shared settings.

    Raises:
        ConfigError: a weight is for a half that a LoRA lacks.
        PairingError: only one LoRA adapts some layers, and ``unpaired`` is ``"error"``.
    """
    _refuse_lacking_halves(numbers, config.settings.weights)
    if config.settings.unpaired == "error":
        _refuse_unpaired(numbers)
    derived = config.rule.weigh({name: each for name, each in numbers.items() if each.owners})
    return Plan(
        derived=derived,
        layers={
            name: _plan_layer(layer, numbers, derived, config) for name, layer in numbers.items()
        },
    )


def _refuse_lacking_halves(
    numbers: Mapping[str, LayerNumbers], weights: Mapping[str, float]
) -> None:
    """Refuse weights of one half (``content.low``) if it has no layers."""
    there = {
        f"{slot}.{half_of(layer.component)}"
        for layer in numbers.values()
        for slot, side in (*layer.sides.items(), *layer.beside.items())
        if side is not None
    }
    for name in weights:
        slot = slot_of(name)
        if slot != name and name not in there:
            half = name.removeprefix(f"{slot}.")
            raise ConfigError(
                f"weights: the LoRA {slot} changes no denoiser for {half} noise; leave {name} out."
            )


def _refuse_unpaired(numbers: Mapping[str, LayerNumbers]) -> None:
    issues = [
        f"{name}: only the {layer.owners[0]} LoRA has it"
        for name, layer in numbers.items()
        if not layer.is_stepless and len(layer.owners) == 1 < len(layer.sides)
    ]
    if issues:
        raise PairingError(
            f"only one LoRA adapts {len(issues)} of the denoiser's layers. Keep them with "
            "--unpaired keep, or leave them out with --unpaired drop.",
            issues,
        )


def _plan_layer(
    layer: LayerNumbers,
    numbers: Mapping[str, LayerNumbers],
    derived: Mapping[str, Any],
    config: Config,
) -> LayerPlan:
    weight = None if layer.weight is None else numbers.get(layer.weight)
    if weight is None or not weight.owners or config.rule.whole:
        choice = _choose(layer, derived, config)
    else:
        choice = _follow(layer, _choose(weight, derived, config))
    made = tuple(slot for slot, side in layer.made.items() if side and not side.is_zero)
    beside = tuple(slot for slot, side in layer.beside.items() if side and not side.is_zero)
    timeline = _timeline(layer, choice.segments, beside, config.settings)
    fate = choice.fate
    if beside and not any(row for _, row in choice.segments):
        fate = BESIDE
    scores: dict[str, Any] = {"k": layer.k, "ratio": choice.ratio}
    if layer.products is not None:
        scores["products"] = {" ".join(pair): value for pair, value in layer.products.items()}
    sides = {**layer.sides, **layer.made, **layer.beside}
    scores |= {slot: side and side.scores for slot, side in sides.items()}
    scales = {slot: side.scaling for slot, side in sides.items() if side is not None}
    return LayerPlan(fate, timeline, (*layer.present, *made, *beside), scales, scores)


def _choose(layer: LayerNumbers, derived: Mapping[str, Any], config: Config) -> Choice:
    """Choose for a layer other than a bias."""
    present = tuple(layer.present)
    if not present:
        return Choice("zero", _NOTHING)
    if layer.is_stepless:
        asked = config.settings.text_encoder
        acting = [slot for slot in present if asked in ("both", role_of(slot))]
        return Choice("constant" if acting else "dropped", _constant(acting))
    if len(layer.owners) == 1 < len(layer.sides) and config.settings.unpaired == "drop":
        return Choice("dropped", _NOTHING)
    if len(present) == 1 and not config.rule.whole:
        return Choice("one-sided", _constant(present))
    return config.rule.choose(layer, derived)


def _follow(layer: LayerNumbers, chosen: Choice) -> Choice:
    """Choose for a bias: the LoRA that acts on its weight acts on the bias, if it adapts it."""
    present = layer.present
    if not present:
        return Choice("zero", _NOTHING, chosen.ratio)
    segments = [
        (start, {slot: value for slot, value in row.items() if slot in present})
        for start, row in chosen.segments
    ]
    acts = any(row for _, row in segments)
    return Choice("with its weight" if acts else "dropped", tuple(segments), chosen.ratio)


def _constant(slots: Iterable[str]) -> tuple[Segment, ...]:
    return ((0.0, dict.fromkeys(slots, 1.0)),)


def _timeline(
    layer: LayerNumbers, segments: Iterable[Segment], beside: Sequence[str], settings: Settings
) -> Timeline:
    """Return the timeline of all slots with weights applied; equal neighbouring segments join."""
    rows: list[Segment] = []
    for start, row in segments:
        acting = {slot: value for slot, value in row.items() if value} | dict.fromkeys(beside, 1.0)
        if not rows or rows[-1][1] != acting:
            rows.append((start, acting))
    slots = (*layer.sides, *layer.made, *layer.beside)
    weights = {slot: settings.weight(slot, layer.component) for slot in slots}
    return Timeline(
        tuple(start for start, _ in rows),
        {
            slot: tuple(weight * row[slot] if slot in row else 0.0 for _, row in rows)
            for slot, weight in weights.items()
        },
    )
