"""Whether LoRAs fit together: by their layers and base models, so many pairs share a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from klora_compile.cataloguing.selecting import StoredLora
from klora_compile.planning.pairing import check_loras, families_together
from klora_compile.profiles.profile import Profile, ProfiledLayer, shape_told
from klora_compile.reading.layers import LayerFacts
from klora_compile.settings.config import Config
from klora_compile.slots import half_of, slot_of
from klora_runtime.artifact.schedule import STEPLESS
from klora_runtime.catalogue.document import WHOLE, Kind
from klora_runtime.catalogue.fusing import source_name
from klora_runtime.errors import ConfigError, PairingError
from klora_runtime.linking.meeting import Meeting
from klora_runtime.linking.numbers import Place

#: What two LoRAs have in common with two others if they get the same verdict.
_Group = tuple[object, ...]

#: Why a LoRA is not paired with itself.
ITSELF = "both are one LoRA; name two."

_SHOWN_ISSUES = 3


@dataclass(frozen=True)
class _Told:
    """A LoRA by its profile, under a name that many of its kind share."""

    path: Path
    families: tuple[str, ...]
    layers: tuple[LayerFacts, ...]


@dataclass
class Verdicts:
    """Gives the verdict of two LoRAs.

    Args:
        config: the rule and the shared settings.
        always: slot -> LoRA that acts beside every pair.
    """

    config: Config
    always: Mapping[str, StoredLora]
    known: dict[tuple[int, int], Kind] = field(default_factory=dict)
    groups: dict[_Group, int] = field(default_factory=dict)
    told: dict[_Group, _Told] = field(default_factory=dict)

    def of(self, content: StoredLora, style: StoredLora, meeting: Meeting) -> Kind:
        """Return the verdict of two LoRAs that meet there."""
        if content.id == style.id:
            return Kind(ITSELF)
        group = self.group(content), self.group(style)
        if group not in self.known:
            self.known[group] = self._verdict(content, style, meeting)
        return self.known[group]

    def group(self, lora: StoredLora) -> int:
        """Return a number that LoRAs share which get the same verdicts."""
        return self.groups.setdefault(_group(lora), len(self.groups))

    def _verdict(self, content: StoredLora, style: StoredLora, meeting: Meeting) -> Kind:
        loras = {"content": content, "style": style, **self.always}
        told = {
            source_name(slot, half): self._told(profile, half)
            for slot, lora in loras.items()
            for half, profile in lora.profiles.items()
        }
        try:
            check_loras(told, self.config.rule)
            self._refuse_settings(loras, meeting)
        except (PairingError, ConfigError) as error:
            return Kind(_sentence(error))
        places = {place for lora in loras.values() for place in _places(lora)}
        shapes = {(p.component, p.module): p.shape for p in places if p.parameter == "weight"}
        families = families_together(list(told.values()), shapes)
        one = families[0] if len(families) == 1 else None
        return Kind(None, one, families if len(families) > 1 else ())

    def _refuse_settings(self, loras: Mapping[str, StoredLora], meeting: Meeting) -> None:
        """Refuse what the settings do not allow, as planning does."""
        settings = self.config.settings
        halves = {
            f"{slot}.{half_of(place.component)}"
            for slot, lora in loras.items()
            for place in _places(lora)
        }
        for name in settings.weights:
            if slot_of(name) != name and name not in halves:
                raise ConfigError(f"weights: {name} is for a half that the LoRA lacks.")
        if settings.unpaired != "error":
            return
        alone = sum(
            (content is None) != (style is None) and place.component not in STEPLESS
            for place, content, style in zip(
                meeting.places, meeting.own["content"], meeting.own["style"], strict=True
            )
        )
        if alone:
            raise PairingError(f"only one LoRA adapts {alone} of the denoiser's layers.")

    def _told(self, profile: Profile, half: str) -> _Told:
        key = (half, profile.families, profile.layers)
        if key not in self.told:
            path = Path("LoRA" if half == WHOLE else f"LoRA ({half})")
            self.told[key] = _Told(path, profile.families, tuple(map(_facts, profile.layers)))
        return self.told[key]


def _group(lora: StoredLora) -> _Group:
    return tuple(
        (half, each.families, tuple((v.place, v.is_shaped) for v in each.layers))
        for half, each in lora.profiles.items()
    )


def _places(lora: StoredLora) -> Sequence[Place]:
    return [layer.place for profile in lora.profiles.values() for layer in profile.layers]


def _facts(layer: ProfiledLayer) -> LayerFacts:
    place = layer.place
    return LayerFacts(
        place.component,
        place.module,
        place.parameter,
        "lora",
        layer.rank,
        None,
        "none",
        shape_told(layer),
    )


def _sentence(error: PairingError | ConfigError) -> str:
    """Return an error in one line, with its first issues."""
    issues = error.issues
    if not issues:
        return str(error)
    first = "; ".join(issues[:_SHOWN_ISSUES])
    more = f"; and {len(issues) - _SHOWN_ISSUES} more" if len(issues) > _SHOWN_ISSUES else ""
    return f"{str(error).splitlines()[0]} ({first}{more})"
